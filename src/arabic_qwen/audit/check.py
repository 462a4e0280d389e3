"""`arabic-qwen data check`: one pass over data files that finds what is wrong with them."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arabic_qwen.audit.answer_checks import answer_findings, asked_dialect, nearly_equal, too_little_arabic
from arabic_qwen.audit.duplicates import Duplicates, exact_key
from arabic_qwen.audit.findings import CODES, Finding, Level
from arabic_qwen.audit.rows import check_method, duplicate_text, read_row, row_texts
from arabic_qwen.audit.statistics import Statistics
from arabic_qwen.audit.text_checks import NORMALISED, Found, about_encoding, around, html_finding, text_findings
from arabic_qwen.config import SFTConfig
from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.conversations import Conversation
from arabic_qwen.data.layouts import canonical
from arabic_qwen.data.normalization import Normalizer
from arabic_qwen.data.readers import Row
from arabic_qwen.data.sources import read_rows
from arabic_qwen.text.dialects import UNKNOWN, load_classifier

_BATCH = 1000  # rows: what is classified and hashed together
# A wrong dialect is said of answers of so many words, with this confidence, where one word at least leans so far to the
# dialect that was found, and none so far to the one asked for: borrowed words are many, function words tell.
_FEWEST_WORDS, _SURE, _FOR, _AGAINST = 5, 0.9, 6.0, -3.0
_SPEAKERS = {"system": "system prompt", "user": "prompt", "assistant": "answer"}


@dataclass
class Audit:
    """What was found in some files."""

    files: list[str]
    findings: list[Finding] = field(default_factory=list)  # by file and line; at most `keep` of each code
    counts: Counter[str] = field(default_factory=Counter)  # code → findings, all of them
    errors: int = 0  # findings of level error
    rows: int = 0
    statistics: Statistics = field(default_factory=Statistics)


def check(
    files: Sequence[str],
    method: str = "",
    *,
    keep: int | None = None,
    watch: Callable[[Iterable[tuple[int, Row | BadRow]]], Iterable[tuple[int, Row | BadRow]]] = iter,
) -> Audit:
    """Read each file once and check its rows; several files are splits of one data set.

    Args:
        files: named as in training: files, folders, hub ids, sample:sft.
        method: training method whose rows they are; "": as the columns of each row say.
        keep: findings of each code that are kept; None: all. All are counted.
        watch: wraps the rows as they are read, for a progress bar.

    Raises:
        ConfigurationError: no such method.
        DatasetError: a file does not exist or cannot be read.
    """
    check_method(method)
    doctor = _Doctor(Audit(list(files)), method, keep)
    rows = iter(watch(_read(files)))
    while batch := list(itertools.islice(rows, _BATCH)):
        doctor.examine(batch)
    return doctor.finish()


def _read(files: Sequence[str]) -> Iterator[tuple[int, Row | BadRow]]:
    for number, name in enumerate(files):
        yield from ((number, row) for row in read_rows(SFTConfig(), name))


def place_of(where: str) -> tuple[str, int]:
    """(file, line) of a row's place: "a.jsonl:3" or "a.parquet:row 3"."""
    file, _, line = where.rpartition(":")
    return file, int(line.removeprefix("row "))


class _Doctor:
    """Collects what is found, batch by batch."""

    def __init__(self, audit: Audit, method: str, keep: int | None):
        self.audit = audit
        self._keep = keep
        self._method = method
        self._normalizer = Normalizer(SFTConfig())
        self._duplicates = Duplicates()
        # Of the rows in `_duplicates`: file (its number in `_order`), line, and how each begins, in UTF-8.
        self._files, self._lines, self._ends = array("L"), array("Q"), array("Q")
        self._beginnings = bytearray()
        self._order: dict[str, int] = {}  # files in the order in which they are met
        self._kept: Counter[str] = Counter()

    def _add(self, file: str, line: int, found: Found) -> None:
        code = found.code
        level: Level = "error" if (found.level or CODES[code].level) == "error" else "warning"
        self.audit.counts[code] += 1
        self.audit.errors += level == "error"
        if self._keep is None or self._kept[code] < self._keep:
            self._kept[code] += 1
            self.audit.findings.append(Finding(code, level, file, line, found.message, found.example))

    def examine(self, batch: list[tuple[int, Row | BadRow]]) -> None:
        sound: list[tuple[int, str, Conversation]] = []  # (file, place, row)
        keys = []
        for file, row in batch:
            self.audit.rows += 1
            self._order.setdefault(place_of(row.where)[0], len(self._order))
            if isinstance(row, BadRow):
                self._add(*place_of(row.where), Found("broken_row", row.reason, _one_line(row.row)))
                continue
            try:
                values, codes = canonical(row.values)
                conversation = self._read(values)
            except RowError as error:
                self._add(*place_of(row.where), Found(error.code, str(error), _one_line(row.values)))
                continue
            sound.append((file, row.where, conversation))
            keys.append(exact_key(values))
            for found in [Found(code, CODES[code].title, _one_line(row.values)) for code in codes]:
                self._add(*place_of(row.where), found)
            for found in _findings(conversation):
                self._add(*place_of(row.where), found)
        self._check_dialects(sound)
        self.audit.statistics.add([row_texts(row) for _, _, row in sound])
        self.audit.statistics.bad_rows += len(batch) - len(sound)
        for file, group in itertools.groupby(zip(sound, keys, strict=True), key=lambda item: item[0][0]):
            self._remember(file, list(group))

    def _read(self, values: dict[str, Any]) -> Conversation:
        """The row as training reads it: as it stands, and once normalised, when an answer may turn out to be empty."""
        conversation = read_row(values, self._method)
        texts = [message["content"] for message in conversation.messages]
        if any(map(NORMALISED.search, (*texts, *conversation.answers[1:]))):
            (row,) = self._normalizer.rows([Row("", values)])
            assert isinstance(row, Row)
            read_row(row.values, self._method)
        return conversation

    def _check_dialects(self, rows: list[tuple[int, str, Conversation]]) -> None:
        asked = [
            (where, dialect, row.answers[0])
            for _, where, row in rows
            if row.desirable[0]
            and (dialect := asked_dialect(row.question))
            and len(row.answers[0].split()) >= _FEWEST_WORDS
        ]
        if not asked:
            return
        classifier = load_classifier()
        predictions = classifier.predict([answer for *_, answer in asked])
        for (where, dialect, answer), (found, confidence) in zip(asked, predictions, strict=True):
            # Dialects are taken for one another more easily than for standard Arabic.
            if found in (UNKNOWN, dialect) or "MSA" not in (found, dialect) or confidence < _SURE:
                continue
            most, least = classifier.leaning(answer, found, dialect)
            if most >= _FOR and least >= _AGAINST:
                message = f"asks for {dialect}, the answer is {found} ({confidence:.0%} sure)"
                self._add(*place_of(where), Found("dialect_mismatch", message, around(answer, 0, 60)))

    def _remember(self, file: int, rows: list[tuple[tuple[int, str, Conversation], int]]) -> None:
        """For the search for duplicates: rows and their keys."""
        self._duplicates.add(file, [duplicate_text(row) for (_, _, row), _ in rows], [key for _, key in rows])
        for (_, where, row), _ in rows:
            name, line = place_of(where)
            self._files.append(self._order[name])
            self._lines.append(line)
            self._beginnings += around(row.question, 0, 40).encode("utf-8", "surrogatepass")
            self._ends.append(len(self._beginnings))

    def _beginning(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._beginnings[start : self._ends[row]].decode("utf-8", "surrogatepass")

    def finish(self) -> Audit:
        names = list(self._order)
        for copies, suffix in ((self._duplicates.inside(), ""), (self._duplicates.across(), "_across_files")):
            for copy in copies:
                if copy.exact:
                    code, likeness = "duplicate", "is the same as"
                elif copy.similarity == 0:
                    code, likeness = "duplicate", "has the prompt of"
                elif copy.similarity == 1:
                    code, likeness = "near_duplicate", "is the same but for spelling as"
                else:
                    code, likeness = "near_duplicate", f"{copy.similarity:.0%} like"
                code += suffix
                file, other = self._files[copy.row], self._files[copy.original]
                place = "line " if file == other else f"{Path(names[other]).name}:"
                message = f"{likeness} {place}{self._lines[copy.original]}"
                self._add(names[file], self._lines[copy.row], Found(code, message, self._beginning(copy.row)))
        self.audit.findings.sort(key=lambda finding: (self._order[finding.file], finding.line))
        return self.audit


def _one_line(value: object) -> str:
    return around(str(value), 0, 60)


def _findings(row: Conversation) -> Iterator[Found]:
    """What is wrong with the row by itself, each code once."""
    seen = set()
    for found in _all_findings(row):
        if found.code not in seen:
            seen.add(found.code)
            yield found


def _all_findings(row: Conversation) -> Iterator[Found]:
    texts = [message["content"] for message in row.messages]
    prompts = [message["content"] for message in row.messages if message["role"] != "assistant"]
    answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
    for message in row.messages:
        for found in text_findings(message["content"], _SPEAKERS[message["role"]]):
            meant = found.code == "mojibake" and message["role"] != "assistant" and about_encoding(prompts, answers)
            if not meant:
                yield found
    for answer in row.answers[1:]:
        yield from text_findings(answer, "rejected answer")
    if html := html_finding([*texts, *row.answers[1:]]):
        yield html
    if row.desirable[0]:
        for position, message in enumerate(row.messages):
            if message["role"] == "assistant":
                context = "\n".join(texts[:position])
                yield from answer_findings(texts[position - 1], message["content"], context)
        if little := too_little_arabic(texts):
            yield little
    if row.answers[1:] and (equal := nearly_equal(row.question, row.answers[0], row.answers[1:])):
        yield equal
