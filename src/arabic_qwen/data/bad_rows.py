"""Rows that cannot be trained on: left out and kept in a file, or an error where they are too many."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from arabic_qwen.errors import DatasetError
from arabic_qwen.files import write_atomically, writing
from arabic_qwen.redaction import redact

#: File of a run's output folder, one JSON object a line: `where`, `reason`, `row`.
BAD_ROWS_FILE = "bad_rows.jsonl"

_SHOWN = 10


class RowError(ValueError):
    """A row cannot be trained on; `code` says why in one word, a key of `arabic_qwen.audit.findings.CODES`."""

    def __init__(self, message: str, code: str = "broken_row"):
        super().__init__(message)
        self.code = code


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


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The file's entries by place; none where it is damaged, since it only informs."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        return {entry["where"]: entry for entry in map(json.loads, lines)}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


class BadRows:
    """Collects bad rows in file order; one that is met again counts once.

    Args:
        limit: how many may be left out.
        file: where they are written, once :meth:`keep` is called or they are too many; None: nowhere.
    """

    def __init__(self, limit: int = 0, file: Path | None = None):
        self.limit = limit
        self.file = file
        self._found: dict[str, dict[str, Any]] = {}  # by place, as they are written
        self._keeps = False
        self._earlier = _read(file) if file and file.is_file() else {}

    @property
    def places(self) -> list[str]:
        return list(self._found)

    def restore(self, places: list[str]) -> None:
        """Count what an earlier run, which this one goes on with, had found in these places."""
        unknown = {"reason": "", "row": None}
        self._found = {place: self._earlier.get(place, {"where": place, **unknown}) for place in places} | self._found
        self._write()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, bad: BadRow) -> None:
        if bad.where not in self._found:
            self._found[bad.where] = bad._asdict()
            if self._keeps:
                self._write()

    def keep(self) -> None:
        """Write what was found, and from now on what is found."""
        self._keeps = True
        self._write()

    def _write(self) -> None:
        if not self.file or not is_first_process():
            return
        with writing(self.file):
            if not self._found:
                self.file.unlink(missing_ok=True)
                return
            if not self._keeps:  # in a run the folder is there; one that vanished is not made again
                self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [redact(json.dumps(entry, ensure_ascii=False, default=str)) + "\n" for entry in self._found.values()]
        # JSON's own escapes for halves of surrogate pairs, which UTF-8 lacks
        write_atomically(self.file, "".join(lines).encode("utf-8", "backslashreplace"))

    def check(self) -> None:
        """Raise DatasetError, naming the first ten, where there are more than the limit."""
        if len(self) <= self.limit:
            return
        self._write()
        places = self.places
        reasons = [entry["reason"] for entry in self._found.values()]
        more = len(places) - _SHOWN
        if len(places) > 1 and len(set(reasons)) == 1:
            rest = f", … and {more:,} more" if more > 0 else ""
            lines = [f"{', '.join(places[:_SHOWN])}{rest}: {reasons[0]}"]
        else:
            lines = [f"{place}: {reason}" for place, reason in list(zip(places, reasons, strict=True))[:_SHOWN]]
            lines += [f"… and {more:,} more"] if more > 0 else []
        them = "it" if len(places) == 1 else "them"
        remedy = f"correct or remove {them}"
        if self.file:
            remedy += f", or raise max_bad_rows (now {self.limit}) to leave {them} out; listed in {self.file}"
        raise DatasetError("\n".join([*lines, f"{count(len(places), 'bad row')}; {remedy}"]))

    def summary(self) -> str:
        """One line for the log and the model card."""
        return f"{len(self):,} left out, listed in {BAD_ROWS_FILE}"
