"""Data workers that die, as one message."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from arabic_qwen.errors import TrainingError

_KILLED = re.compile(r"DataLoader worker \(pid[^)]*\) (is killed by signal: \w+|exited unexpectedly)")
_RAISED = re.compile(r"Caught \w+ in (DataLoader worker process|pin memory thread)")


@contextlib.contextmanager
def watched_workers() -> Iterator[None]:
    """A context in which data workers (`dataloader_num_workers`) are at work.

    PyTorch tells of a killed one in whatever the main process is doing just then.

    Raises:
        TrainingError: one was killed, ran out of memory, or raised a TrainingError, which then says what that said.
    """
    try:
        yield
    except (RuntimeError, MemoryError, TrainingError) as error:
        text = str(error)
        killed, raised = _KILLED.search(text), _RAISED.match(text)
        if killed or (raised and isinstance(error, MemoryError)):
            reason = killed[1] if killed else "had no memory left"
            raise TrainingError(
                f"dataloader_num_workers: a data worker {reason}, most likely because memory ran out; lower it, or "
                "set it to 0, or free memory (in a container: give it more shared memory); then the same command goes on"
            ) from None
        if raised and isinstance(error, TrainingError):
            raise type(error)(_own_message(text, type(error).__name__)) from None
        raise


def _own_message(text: str, name: str) -> str:
    """What the error said in its worker: PyTorch puts the worker's traceback before it."""
    return re.split(rf"^(?:[\w.]+\.)?{name}: ", text, maxsplit=1, flags=re.MULTILINE)[-1].strip()
