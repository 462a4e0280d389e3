"""Where rows come from, in little memory."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 10
_BITS = 40  # of a place's number, the last of what is written


class RowLocations:
    """RowLocations ("data.jsonl:12", "row 3") as one integer each; the texts before the numbers are kept once."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}

    def encode(self, place: str) -> int:
        text = place.rstrip("0123456789")
        number = place[len(text) :]
        return self._texts.setdefault(text, len(self._texts)) << _BITS | (int(number) + 1 if number else 0)

    def decode(self, code: int) -> str:
        number = code & ((1 << _BITS) - 1)
        return f"{list(self._texts)[code >> _BITS]}{number - 1 if number else ''}"


def name_rows(places: RowLocations | None, rows: Iterable[int]) -> str:
    """At most ten of the rows' places, by file and line, and how many more there are; rows below 0 have no place."""
    codes = sorted({row for row in rows if row >= 0})
    if places is None or not codes:
        return "rows whose place is not known"
    more = len(codes) - _SHOWN
    return ", ".join(places.decode(code) for code in codes[:_SHOWN]) + (f", … and {more:,} more" if more > 0 else "")
