"""Rows that cannot be trained on: left out and kept in a file, or an error where they are too many."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from arabic_qwen.errors import DatasetError

#: File of a run's output folder, one JSON object a line: `where`, `reason`, `row`.
BAD_ROWS_FILE = "bad_rows.jsonl"

_SHOWN = 10


class BadRow(NamedTuple):
    """A record that cannot be used."""

    where: str  # file:line
    reason: str
    row: Any  # its values, or its text where it has none


def count(number: int, noun: str) -> str:
    """ "1 row", "2 rows", "1,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class BadRows:
    """Collects bad rows in file order; one that is met again counts once.

    Args:
        limit: how many may be left out.
        file: where they are written, as they come; None: nowhere.
        resume: whether `file` is gone on with.
    """

    def __init__(self, limit: int = 0, file: Path | None = None, resume: bool = False):
        self.limit = limit
        self.file = file
        self._reasons: dict[str, str] = {}  # by place
        if resume and file and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._reasons[entry["where"]] = entry["reason"]

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, bad: BadRow) -> None:
        if bad.where in self._reasons:
            return
        if self.file and os.environ.get("RANK", "0") == "0":
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # JSON's own escapes for halves of surrogate pairs, which UTF-8 lacks
            with self.file.open("a" if self._reasons else "w", encoding="utf-8", errors="backslashreplace") as out:
                out.write(json.dumps(bad._asdict(), ensure_ascii=False, default=str) + "\n")
        self._reasons[bad.where] = bad.reason

    def check(self) -> None:
        """Raise DatasetError, naming the first ten, where there are more than the limit."""
        if len(self) <= self.limit:
            return
        places = list(self._reasons)
        more = len(places) - _SHOWN
        if len(places) > 1 and len(set(self._reasons.values())) == 1:
            rest = f", … and {more:,} more" if more > 0 else ""
            lines = [f"{', '.join(places[:_SHOWN])}{rest}: {self._reasons[places[0]]}"]
        else:
            lines = [f"{place}: {self._reasons[place]}" for place in places[:_SHOWN]]
            lines += [f"… and {more:,} more"] if more > 0 else []
        them = "it" if len(places) == 1 else "them"
        remedy = f"correct or remove {them}"
        if self.file:
            remedy += f", or raise max_bad_rows (now {self.limit}) to leave {them} out; listed in {self.file}"
        raise DatasetError("\n".join([*lines, f"{count(len(places), 'bad row')}; {remedy}"]))

    def summary(self) -> str:
        """One line for the log and the model card."""
        return f"{len(self):,} left out, listed in {BAD_ROWS_FILE}"
