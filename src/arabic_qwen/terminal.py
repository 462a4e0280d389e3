"""Arabic on a terminal. Pipes and files get text as it is: in logical order, unshaped, without marks.

Some terminals put right-to-left text in order themselves (they implement the Unicode bidirectional algorithm); all
others draw letters from left to right as they come, so they get the text in visual order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

#: Environment variable that says who orders the text on a terminal: `terminal`, or `visual` for this package.
VARIABLE = "ARABIC_QWEN_BIDI"

_ISOLATE, _END = "\u2068", "\u2069"
_TAG = "\u034f"  # a mark that is never seen
_CONTROLS = dict.fromkeys([0x034F, 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_MARKS = re.compile(
    r"([\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\ufe0f]+)(.)"
)
_PAIRS = "()[]{}<>«»‹›≤≥⟨⟩⟦⟧"
_MIRRORED = dict(zip(_PAIRS, re.sub("(.)(.)", r"\2\1", _PAIRS), strict=True))
_BRACKET = f"[{re.escape(_PAIRS)}]"
_TAGGED = re.compile(f"{_TAG}({_BRACKET})|({_BRACKET}){_TAG}")


def does_bidi(environment: Mapping[str, str]) -> bool:
    """Whether the terminal orders right-to-left text itself, by its environment variables."""
    if environment.get(VARIABLE) in ("terminal", "visual"):
        return environment[VARIABLE] == "terminal"
    if environment.get("TMUX") or environment.get("STY"):  # the variables may be of another terminal, left long ago
        return False
    vte = environment.get("VTE_VERSION", "")  # GNOME Terminal and its kin; since 0.58
    return (
        (vte.isdecimal() and int(vte) >= 5800)
        or "KONSOLE_VERSION" in environment
        or environment.get("TERM_PROGRAM") in ("mintty", "Apple_Terminal")
        or environment.get("TERM", "").startswith(("mlterm", "putty"))
    )


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


def is_visual(stream: TextIO | None = None) -> bool:
    """Whether text has to be put in visual order before it is printed to a stream (default: standard output)."""
    return (stream or sys.stdout).isatty() and not does_bidi(os.environ)


def displayed(text: str, stream: Any = None, indent: int = 0) -> str:
    """Whole lines of text as the stream needs them; `indent`: columns that are taken before the first line."""
    if not is_visual(stream) or not _is_right_to_left(text):
        return text
    width = max(shutil.get_terminal_size().columns - indent, 20)
    lines = [visual for line in text.split("\n") for visual in _visual_lines(line, width)]
    return ("\n" + " " * indent).join(lines)


def isolated(text: str, indent: int = 0) -> str:
    """Text for the middle of a left-to-right line: as :func:`displayed`.

    Where the terminal orders text itself, right-to-left text is isolated, so that its marks stay with it.
    """
    if is_visual():
        return displayed(text, indent=indent)
    if not sys.stdout.isatty() or not _is_right_to_left(text):
        return text
    return "\n".join(f"{_ISOLATE}{line}{_END}" for line in text.split("\n"))


class Formatter(logging.Formatter):
    """Log messages for standard error."""

    def format(self, record: logging.LogRecord) -> str:
        return displayed(super().format(record), sys.stderr)


def _is_right_to_left(text: str) -> bool:
    return not text.isascii() and any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


def _visual_lines(paragraph: str, width: int) -> list[str]:
    """The paragraph in lines of at most `width` columns, each in visual order.

    Lines are broken before they are reordered: the first line has to hold the first words. Those of a right-to-left
    paragraph end at the same column.
    """
    if not _is_right_to_left(paragraph):
        return [paragraph]
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    strong = (unicodedata.bidirectional(letter) for letter in paragraph)
    base = "L" if next((kind for kind in strong if kind in ("L", "R", "AL")), "") == "L" else "R"
    lines = [_reordered(line.plain.rstrip(), base) for line in Text(paragraph).wrap(Console(), width)]
    if base == "R":
        longest = max(map(cell_len, lines))
        lines = [" " * (longest - cell_len(line)) + line for line in lines]
    return lines


def _reordered(line: str, base: str) -> str:
    """The line in visual order; `base`: its paragraph's direction, L or R."""
    from bidi import get_display

    # get_display does not mirror brackets. A mark behind each tells how it went: before the bracket from right to left.
    tagged = re.sub(_BRACKET, rf"\g<0>{_TAG}", line.translate(_CONTROLS))
    visual = str(get_display(tagged, base_dir=base))
    visual = _TAGGED.sub(lambda found: found[2] or _MIRRORED[found[1]], visual)
    # Marks come before their letters now; a terminal draws them over the letter before.
    return _MARKS.sub(lambda found: found[2] + found[1][::-1], visual)
