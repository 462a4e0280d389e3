"""Arabic on a terminal. Pipes and files get text as it is: in logical order, unshaped, without marks."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterator

_ISOLATE, _END = "\u2068", "\u2069"


@contextlib.contextmanager
def direction_by_paragraph() -> Iterator[None]:
    """Ask the terminal to take a paragraph's direction from its first letter, instead of left to right for all.

    Mode 2501 of the terminal-wg's BiDi recommendation, which VTE (GNOME Terminal and its kin) and mintty know; others
    ignore it.
    """
    if not sys.stdout.isatty():
        yield
        return
    print("\x1b[?2501h", end="", flush=True)
    try:
        yield
    finally:
        print("\x1b[?2501l", end="", flush=True)


def isolated(text: str) -> str:
    """Right-to-left text for the middle of a left-to-right line: isolated on a terminal, so that its marks stay with it."""
    if not sys.stdout.isatty() or not any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text):
        return text
    return "\n".join(f"{_ISOLATE}{line}{_END}" for line in text.split("\n"))
