"""One writer per output folder, held to it by the kernel: a killed process leaves no lock behind."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from arabic_qwen.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows: its locks are of another kind, and no trainer runs there on several GPUs
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"  # of an output folder; says who writes there

_held: set[int] = set()  # descriptors


def _let_go() -> None:
    """A forked data worker that outlives its killed parent must not keep the lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl:
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        ConfigurationError: another process holds it, or it is a link.
    """
    if not fcntl:
        yield
        return
    descriptor = _open(folder, os.O_RDWR | os.O_CREAT)
    _held.add(descriptor)
    try:
        _lock(folder, descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        if descriptor in _held:  # not so in a child that was forked here
            _held.discard(descriptor)
            os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise ConfigurationError where another process holds the folder's lock, or it is a link; changes nothing."""
    if fcntl and (folder / LOCK_FILE).is_file():
        descriptor = _open(folder, os.O_RDONLY)
        try:
            _lock(folder, descriptor)
        finally:
            os.close(descriptor)


def _open(folder: Path, flags: int) -> int:
    try:
        return os.open(folder / LOCK_FILE, flags | os.O_NOFOLLOW, 0o644)  # or what it leads to would be emptied
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigurationError(
            f"output_dir: {folder / LOCK_FILE} is a link; remove it, or choose another output_dir"
        ) from None


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "just started"
        raise ConfigurationError(
            f"output_dir: another run writes into {folder} (process {holder}); "
            "wait until it ends, stop it, or choose another output_dir"
        ) from None
