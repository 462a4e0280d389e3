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


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate launch


class BadRows:
    """Collects bad rows in file order; one that is met again counts once.

    Args:
        limit: how many may be left out.
        file: where they are written, as they come; None: nowhere.
        append: `file` is an earlier run's, which :meth:`restore` will go on with.
    """

    def __init__(self, limit: int = 0, file: Path | None = None, append: bool = False):
        self.limit = limit
        self.file = file
        self._append = append
        self._reasons: dict[str, str] = {}  # by place

    @property
    def places(self) -> list[str]:
        return list(self._reasons)

    def restore(self, places: list[str]) -> None:
        """Count these as well, and take everything else that an earlier run found out of the file."""
        assert self.file
        kept = {}
        if self.file.is_file() and is_first_process():
            with self.file.open(encoding="utf-8") as lines:
                entries = {json.loads(line)["where"]: line for line in lines}
            kept = {place: line for place, line in entries.items() if place in {*places, *self._reasons}}
            self.file.write_text("".join(kept.values()), encoding="utf-8")
        found = {place: json.loads(line)["reason"] for place, line in kept.items()}
        self._reasons = dict.fromkeys(places, "") | self._reasons | found

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, bad: BadRow) -> None:
        if bad.where in self._reasons:
            return
        if self.file and is_first_process():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # JSON's own escapes for halves of surrogate pairs, which UTF-8 lacks
            with self.file.open(
                "a" if self._reasons or self._append else "w", encoding="utf-8", errors="backslashreplace"
            ) as out:
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
