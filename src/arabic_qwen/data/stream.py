"""Training data that is read as training goes on, for sets larger than memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from arabic_qwen.data.bad_rows import BadRow, BadRows
from arabic_qwen.data.dataset import GroupDataset, describe_counts
from arabic_qwen.data.readers import Row, Rows
from arabic_qwen.errors import DatasetError

#: Rows that are shuffled and packed together; all that is in memory.
WINDOW = 10_000


class GroupStream:
    """Windows of encoded examples, over and over; every process gets the same ones.

    Args:
        read: opens the rows from their beginning.
        encode: checks and encodes a window of rows, with what it gave of the window before, or None: (window, what the next
            one needs, as JSON can hold it).
        bad_rows: where it puts the rows that cannot be used.
        identify: says what the rows are read from, the same as long as that is not changed.

    Attributes:
        identity: what `identify` said first.
    """

    def __init__(
        self,
        read: Callable[[], Rows],
        encode: Callable[[list[Row | BadRow], Any], tuple[GroupDataset, Any]],
        bad_rows: BadRows,
        identify: Callable[[], list[str]],
    ):
        self._read = read
        self._encode = encode
        self._bad_rows = bad_rows
        self._identify = identify
        self.identity = identify()
        self.counts: dict[str, int] = {}

    def windows(self, start: dict[str, Any]) -> Iterator[tuple[dict[str, Any], GroupDataset]]:
        """(place, window) from `start` on, a place or {}.

        A place is what JSON can hold: `pass` and `window` count from 0, `counts` and `bad_rows` are of all windows before, `carried`
        is what the one before gave.

        Raises:
            DatasetError: the rows cannot be read or encoded, have changed since the beginning, or are none to train on.
        """
        self.counts = dict(start.get("counts", {}))
        if start:
            self._bad_rows.restore(start["bad_rows"])
        first, carried = start.get("window", 0), start.get("carried")
        for number in itertools.count(start.get("pass", 0)):
            empty = first == 0
            rows = itertools.islice(self._read(), first * WINDOW, None)
            for window in itertools.count(first):
                chunk = list(itertools.islice(rows, WINDOW))
                self._check_unchanged()
                if not chunk:
                    break
                place = {"pass": number, "window": window, "counts": dict(self.counts), "carried": carried}
                place["bad_rows"] = self._bad_rows.places
                dataset, carried = self._encode(chunk, carried)
                if len(dataset):
                    empty = False
                    for name, count in dataset.counts().items():
                        before = self.counts.get(name, 0)
                        self.counts[name] = max(before, count) if name == "longest" else before + count
                    yield place, dataset
            if empty:
                raise DatasetError("no rows are left to train on")
            first = 0

    def _check_unchanged(self) -> None:
        """A file that is cut short would only seem to end sooner."""
        now = self._identify()
        if set(now) != set(self.identity):
            before, after = (
                ", ".join(sorted(set(a) - set(b))) for a, b in ((self.identity, now), (now, self.identity))
            )
            raise DatasetError(
                f"dataset_path: the data changed while it was read ({before or 'nothing'} → {after or 'nothing'}); put back "
                "what was there"
            )

    def summary(self) -> str:
        """One line on what was read, for the model card."""
        return f"streamed, {describe_counts(self.counts)}" if self.counts else "streamed"
