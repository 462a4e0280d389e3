"""The rows of data files, named as in training, of any method: a conversation, and answers not to be learned."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from arabic_qwen.audit.answer_checks import asked_dialect
from arabic_qwen.audit.duplicates import Text
from arabic_qwen.audit.statistics import RowTexts, Statistics
from arabic_qwen.config import SFTConfig
from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.conversations import Message, to_conversation
from arabic_qwen.data.layouts import recognise
from arabic_qwen.data.preferences import Preference, to_contrast, to_feedback, to_measured_pair, to_pair
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text.normalization import fold

_CHUNK = 1000  # rows counted at a time
_HEAD = 1 << 20  # bytes

_PREFERENCES: dict[str, Callable[[dict[str, Any]], Preference]] = {
    "dpo": to_pair,
    "ipo": to_measured_pair,
    "cpo": to_contrast,
    "simpo": to_pair,
    "orpo": to_pair,
    "kto": to_feedback,
}
_METHODS = ("sft", *_PREFERENCES)


class Conversation(NamedTuple):
    """A row as training reads it."""

    messages: list[Message]  # the last is the answer, the chosen one where there are several
    rejected: list[str]
    learned: bool  # whether the answer is to be learned: not with KTO's label false

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def text(self) -> Text:
        """What is compared to find duplicates. Rows with different system prompts are of different kinds."""
        system = self.messages[0]["content"] if self.messages[0]["role"] == "system" else ""
        before = "\n".join(message["content"] for message in self.messages[:-1] if message["role"] != "system")
        kind = f"{self.learned} {asked_dialect(self.question)} {fold(system)}"
        return Text.of(before, "\n".join([self.answer, *self.rejected]), kind)


def known_method(method: str) -> None:
    """Raise ConfigurationError where there is no such method; "" is fine."""
    if method and method not in _METHODS:
        raise ConfigurationError(f"--method {method}: unknown method; choose one of {', '.join(_METHODS)}")


def method_of(values: dict[str, Any]) -> str:
    """The method that rows of these columns are for, cpo for all pairs; "" where there is none."""
    layout = recognise(values)
    if layout is None:
        return ""
    return "cpo" if "cpo" in layout.methods else layout.methods[0]


def read_row(values: dict[str, Any], method: str) -> Conversation:
    """The row's conversation.

    Raises:
        RowError: the row cannot be trained on.
    """
    if method == "sft":
        return Conversation(to_conversation(values), [], True)
    preference = _PREFERENCES[method](values)
    answer = {"role": "assistant", "content": preference.answers[0]}
    return Conversation([*preference.prompt, answer], preference.answers[1:], preference.label)


def row_texts(row: Conversation) -> RowTexts:
    turns = sum(message["role"] == "user" for message in row.messages)
    return RowTexts(row.question, (row.answer, *row.rejected), turns)


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
