"""The rows of data files, named as in training, of any method: a conversation, and answers not to be learned."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arabic_qwen.audit.answer_checks import asked_dialect
from arabic_qwen.audit.duplicates import Text
from arabic_qwen.audit.statistics import RowTexts, Statistics
from arabic_qwen.config import BaseConfig, SFTConfig
from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.conversations import Conversation, read_conversation
from arabic_qwen.data.layouts import RowKind, recognise
from arabic_qwen.data.preferences import to_contrast, to_feedback
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import DatasetError
from arabic_qwen.methods.registry import METHODS, known_method
from arabic_qwen.text.normalization import fold

_CHUNK = 1000  # rows counted at a time
_HEAD = 1 << 20  # bytes

# How rows are read whose method is not given.
_READERS: dict[RowKind, Callable[[dict[str, Any]], Conversation]] = {
    "conversation": read_conversation,
    "pair": to_contrast,
    "contrast": to_contrast,
    "feedback": to_feedback,
}


def check_method(method: str) -> None:
    """Raise ConfigurationError where there is no such method; "" is fine."""
    if method:
        known_method(method, "--method")


def read_row(values: dict[str, Any], method: str = "") -> Conversation:
    """What is learned of the row.

    Args:
        values: of its columns.
        method: that reads it; "": as its columns say.

    Raises:
        RowError: the row cannot be trained on.
    """
    if method:
        return METHODS[method].reader(values, _defaults(method))[0]
    layout = recognise(values)
    return _READERS[layout.kind if layout else "conversation"](values)


@functools.cache
def _defaults(method: str) -> BaseConfig:
    return METHODS[method].config()


def duplicate_text(row: Conversation) -> Text:
    """What is compared to find duplicates. Rows with different system prompts are of different kinds."""
    system = row.prompt[0]["content"] if row.prompt[0]["role"] == "system" else ""
    before = "\n".join(message["content"] for message in row.prompt if message["role"] != "system")
    kind = f"{row.desirable[0]} {asked_dialect(row.question)} {fold(system)}"
    return Text.of(before, "\n".join(row.answers), kind)


def row_texts(row: Conversation) -> RowTexts:
    turns = sum(message["role"] == "user" for message in row.messages)
    return RowTexts(row.question, tuple(row.answers), turns)


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
    check_method(method)
    for row in read_rows(SFTConfig(), list(files)):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield row_texts(read_row(row.values, method))
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
