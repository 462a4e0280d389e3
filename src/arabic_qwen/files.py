"""Writing so that a crash leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from arabic_qwen.errors import OutputError

#: How names of what is being written begin; what a killed process left of it is removed by the next run.
UNFINISHED = ".unfinished-"

_FREE = "free some space there, or choose another folder"

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Errors by which the place is at fault, not the program.
_OF_THE_PLACE = _FULL | {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE),
}


@contextlib.contextmanager
def writing(path: str | os.PathLike, needed: int = 0) -> Iterator[None]:
    """A context in which a file or folder is written.

    Args:
        path: what the user is told.
        needed: bytes that it takes, about; 0: not known.

    Raises:
        OutputError: the disk is full, or the place is gone or may not be written, as any library says it.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        name = getattr(error, "filename", None)
        elsewhere = isinstance(name, str) and not Path(name).absolute().is_relative_to(Path(path).absolute().parent)
        if number not in _OF_THE_PLACE or elsewhere:
            raise
        raise _output_error(Path(path), number, needed) from None


def check_space(path: Path, needed: int, remedy: str = _FREE) -> None:
    """Raise OutputError where fewer than `needed` bytes are free: sooner than a disk that is filled up says it.

    Args:
        path: what is to be written.
        needed: bytes.
        remedy: what the user is told to do.
    """
    usage = shutil.disk_usage(existing(path))
    if usage.total and usage.free < needed:  # some network file systems do not say
        raise _output_error(path, errno.ENOSPC, needed, remedy)


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers
    return int(found[1]) if found else None


def _output_error(path: Path, number: int, needed: int, full: str = _FREE) -> OutputError:
    reason = "its folder is gone" if number == errno.ENOENT else os.strerror(number)
    remedy = "correct that, or choose another folder"
    if number == errno.EFBIG:
        return OutputError(f"{path}: cannot be written ({reason}); raise the limit on the size of files (ulimit -f)")
    if number in _FULL:
        remedy = full
        reason += f": about {readable(needed)} needed" if needed else ""
        with contextlib.suppress(OSError):
            reason += f", {readable(shutil.disk_usage(existing(path)).free)} free"
    return OutputError(f"{path}: cannot be written ({reason}); {remedy}")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def readable(size: int) -> str:
    """Bytes as people read them: 512 bytes, 1.5 MB, 14.0 GB."""
    for unit, exponent in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**exponent:
            return f"{size / 10**exponent:,.1f} {unit}"
    return f"{size} bytes"


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a file: it has its old content until it has all of the new one, on the disk.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    with writing(path, len(data)):
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add lines to a file, which a crash may leave with half a line.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path, len(text.encode())), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def staged(folder: Path, needed: int = 0, make: bool = True) -> Iterator[Path]:
    """A new folder to write into; at the end its files are moved to `folder`, each only when all are on the disk.

    Args:
        folder: where they are moved to.
        needed: bytes that the files take, about.
        make: the folder, where it is not there.

    Raises:
        OutputError: there is less space than needed, or the folder cannot be written.
    """
    stage = folder / f"{UNFINISHED}{os.getpid()}"
    with writing(folder, needed):
        check_space(folder, needed)
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            yield stage
            files = sync_files(stage)
            for file in files:
                target = folder / file.relative_to(stage)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            sync_folder(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def sync_files(folder: Path) -> list[Path]:
    """Bring all files below a folder, and the folders, to the disk; the files in order of their names."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    for path in [folder, *paths]:
        if path.is_dir():
            sync_folder(path)
    return files


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a new or renamed file may be lost without."""
    if os.name == "nt":  # has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder that must never be seen in part: it loses its name first."""
    doomed = folder.with_name(f"{UNFINISHED}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder; nobody may be writing there."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
