"""Writing so that a crash leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: How names of what is being written begin; what a killed process left of it is removed by the next run.
UNFINISHED = ".unfinished-"


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace a file: it has its old content until it has all of the new one, on the disk."""
    path = Path(path)
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:  # a full disk
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder to write into; at the end its files are moved to `folder`, each only when all are on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / f"{UNFINISHED}{os.getpid()}"
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
