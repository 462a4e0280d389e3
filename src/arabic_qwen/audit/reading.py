"""The texts of data files, named as in training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arabic_qwen.audit.rows import known_method, method_of, read_row
from arabic_qwen.audit.statistics import RowTexts, Statistics, row_texts
from arabic_qwen.config import SFTConfig
from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import DatasetError

_CHUNK = 1000  # rows counted at a time
_HEAD = 1 << 20  # bytes


@dataclass
class Sample:
    """A seeded choice of rows."""

    rows: int = 0  # that could be chosen
    bad_rows: int = 0  # that cannot be trained on
    chosen: list[RowTexts] = field(default_factory=list)


def read_texts(files: Sequence[str], method: str = "") -> Iterator[RowTexts | BadRow]:
    """The texts of each row, or why it cannot be trained on; method "": as each row's columns say.

    Raises:
        DatasetError: a file does not exist or cannot be read.
        ConfigurationError: there is no such method.
    """
    known_method(method)
    for row in read_rows(SFTConfig(), list(files)):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield row_texts(read_row(row.values, method or method_of(row.values) or "sft"))
        except RowError as error:
            yield BadRow(row.where, str(error), row.values)


def expected_rows(files: Sequence[str]) -> int | None:
    """How many rows the files have, about, for a progress bar; None where they are not lines of text."""
    total = 0.0
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            return None
        if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv"):
            with path.open("rb") as file:
                head = file.read(_HEAD)
            total += head.count(b"\n") * path.stat().st_size / max(1, len(head))
        else:
            return None
    return round(total)


def measure(rows: Iterable[RowTexts | BadRow]) -> Statistics:
    """Statistics of all rows.

    Raises:
        DatasetError: none of them can be trained on.
    """
    statistics = Statistics()
    rows = iter(rows)
    first_bad = None
    while chunk := list(itertools.islice(rows, _CHUNK)):
        good = [row for row in chunk if isinstance(row, RowTexts)]
        first_bad = first_bad or next((row for row in chunk if isinstance(row, BadRow)), None)
        statistics.bad_rows += len(chunk) - len(good)
        statistics.add(good)
    if not statistics.rows and first_bad:
        raise _all_bad(first_bad)
    return statistics


def sample_rows(rows: Iterable[RowTexts | BadRow], number: int, seed: int = 0) -> Sample:
    """At most `number` of the rows, each as likely as the others (reservoir sampling).

    Raises:
        DatasetError: none of them can be trained on.
    """
    sample, generator, first_bad = Sample(), random.Random(seed), None
    for row in rows:
        if isinstance(row, BadRow):
            sample.bad_rows += 1
            first_bad = first_bad or row
            continue
        sample.rows += 1
        if len(sample.chosen) < number:
            sample.chosen.append(row)
        elif (place := generator.randrange(sample.rows)) < number:
            sample.chosen[place] = row
    if not sample.rows and first_bad:
        raise _all_bad(first_bad)
    return sample


def _all_bad(first: BadRow) -> DatasetError:
    return DatasetError(f"{first.where}: {first.reason}; no other row can be trained on either")
