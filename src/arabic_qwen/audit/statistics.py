"""What a data set consists of, counted row by row in bounded memory."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from arabic_qwen.text.dialects import UNKNOWN, DialectClassifier, load_classifier
from arabic_qwen.text.rules import QURANIC, TANWIN_SHADDA, VOWELS
from arabic_qwen.text.scripts import letter_script
from arabic_qwen.text.spans import PLACEHOLDER, hide_spans

#: Kinds of texts by diacritics per Arabic letter: none, at most this, more.
SOME_DIACRITICS = 0.2
DIACRITICS = ("none", "some", "full")

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}

_CODE_POINTS = 0x110000


class RowTexts(NamedTuple):
    """What statistics look at in a row."""

    prompt: str  # the last question
    answers: tuple[str, ...]  # to it: the chosen one first
    turns: int = 1  # of the user


class Texts:
    """Counts of one side of the rows: the questions, say."""

    def __init__(self) -> None:
        self.count = 0
        # By exact length. Texts of n different lengths have n²/2 characters or more in all, so these stay small.
        self.characters: Counter[int] = Counter()
        self.words: Counter[int] = Counter()
        self.dialects: Counter[str] = Counter()
        self.diacritics: Counter[str] = Counter()  # texts by DIACRITICS
        self._code_points = np.zeros(_CODE_POINTS, np.int64)  # outside code and URLs

    def add(self, texts: Sequence[str], dialects: Sequence[str]) -> None:
        if not texts:
            return
        self.count += len(texts)
        self.characters.update(map(len, texts))
        self.words.update(len(text.split()) for text in texts)
        self.dialects.update(dialects)
        codes, starts = _code_points([hide_spans(text)[0] for text in texts])
        self.diacritics.update(_diacritic_kinds(codes, starts))
        self._code_points += np.bincount(codes, minlength=_CODE_POINTS)

    def scripts(self) -> dict[str, float]:
        """The share of each script in the letters, largest first."""
        counts: Counter[str] = Counter()
        for code in np.flatnonzero(self._code_points):
            if script := letter_script(chr(code)):
                counts[script] += int(self._code_points[code])
        return {script: count / counts.total() for script, count in counts.most_common()}

    def diacritics_per_letter(self) -> float:
        """Diacritics per Arabic letter."""
        letters, marks = _classes()
        found = int(self._code_points[letters].sum())
        return int(self._code_points[marks].sum()) / found if found else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "texts": self.count,
            "characters": _lengths(self.characters),
            "words": _lengths(self.words),
            "scripts": self.scripts(),
            "dialects": dict(self.dialects.most_common()),
            "diacritics": {
                "per_letter": self.diacritics_per_letter(),
                **{kind: self.diacritics[kind] for kind in DIACRITICS},
            },
        }


class Statistics:
    """Statistics of rows that come in batches; the result does not depend on how they are cut.

    Args:
        classifier: of dialects; default: the one that comes with the package, loaded at the first batch.
    """

    def __init__(self, classifier: DialectClassifier | None = None):
        self._classifier = classifier
        self.rows = 0
        self.bad_rows = 0  # that cannot be trained on; whoever reads the rows counts them
        self.turns: Counter[int] = Counter()  # rows by number of questions
        # Those that are not the first answer of their row are "rejected".
        self.sides = {"prompts": Texts(), "answers": Texts(), "rejected": Texts()}
        self.drift: Counter[tuple[str, str]] = Counter()  # (dialect of the prompt, dialect of the first answer)
        self._copies = _Copies()

    def add(self, batch: Sequence[RowTexts]) -> None:
        """Count some rows, about 1,000: the classifier is much faster on many texts than on one."""
        if not batch:
            return
        self.rows += len(batch)
        self.turns.update(row.turns for row in batch)
        texts = {
            "prompts": [row.prompt for row in batch],
            "answers": [row.answers[0] for row in batch],
            "rejected": [answer for row in batch for answer in row.answers[1:]],
        }
        classifier = self._classifier or load_classifier()
        predictions = iter(classifier.predict([text for side in texts.values() for text in side]))
        dialects = {
            side: [prediction.dialect for prediction in itertools.islice(predictions, len(texts[side]))]
            for side in texts
        }
        for side in texts:
            self.sides[side].add(texts[side], dialects[side])
        self.drift.update(zip(dialects["prompts"], dialects["answers"], strict=True))
        for row in batch:
            self._copies.add("\0".join((row.prompt, *row.answers)))

    @property
    def duplicate_share(self) -> float:
        """The share of rows whose prompt and answers an earlier row has too; an estimate beyond a million rows."""
        return self._copies.share()

    @property
    def drift_share(self) -> float | None:
        return drift_share(self.drift)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "turns": {str(turns): self.turns[turns] for turns in sorted(self.turns)},
            "duplicate_share": self.duplicate_share,
            **{side: texts.as_dict() for side, texts in self.sides.items() if texts.count},
            "drift": drift_by_prompt(self.drift),
            "drift_share": self.drift_share,
        }


class _Copies:
    """How many texts are copies of earlier ones, in bounded memory.

    Distinct sampling (Gibbons, "Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries", 2001):
    all copies of a text have one hash, so keeping the texts whose hash ends in `zeros` zero bits keeps all copies of a
    text or none. Exact until more than `limit` texts differ.
    """

    def __init__(self, limit: int = 1_000_000):
        self.limit = limit
        self.zeros = 0
        self._copies: Counter[int] = Counter()

    def add(self, text: str) -> None:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        if key % (1 << self.zeros) == 0:
            self._copies[key] += 1
        while len(self._copies) > self.limit:
            self.zeros += 1
            self._copies = Counter({k: n for k, n in self._copies.items() if k % (1 << self.zeros) == 0})

    def share(self) -> float:
        return 1 - len(self._copies) / self._copies.total() if self._copies else 0.0


def drift_share(drift: Counter[tuple[str, str]]) -> float | None:
    """The share of answers in another dialect than their prompt, where both are known; None where none are.

    Args:
        drift: rows by (dialect of the prompt, dialect of the answer).
    """
    known = Counter({pair: count for pair, count in drift.items() if UNKNOWN not in pair})
    return sum(count for (a, b), count in known.items() if a != b) / known.total() if known else None


def drift_by_prompt(drift: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Dialect of the prompt → dialect of the answer → rows, the most first."""
    by_prompt: dict[str, dict[str, int]] = {}
    for (prompt, answer), count in drift.most_common():
        by_prompt.setdefault(prompt, {})[answer] = count
    return by_prompt


def shares_of(counts: Counter[str]) -> dict[str, float]:
    """Each count's share of all."""
    return {name: count / counts.total() for name, count in counts.items()}


def quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the texts do not exceed."""
    ordered = sorted(lengths)
    passed = np.cumsum([lengths[length] for length in ordered])
    return ordered[int(np.searchsorted(passed, share * passed[-1]))]


def histogram(lengths: Counter[int]) -> list[tuple[int, int, int]]:
    """(first length, last length, texts) of bins that each reach to twice the length before: 0, 1, 2–3, 4–7, …"""
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[length.bit_length()] += count
    return [(1 << bit >> 1, (1 << bit) - 1, bins[bit]) for bit in range(min(bins), max(bins) + 1)] if bins else []


def _lengths(lengths: Counter[int]) -> dict[str, Any]:
    total = sum(length * count for length, count in lengths.items())
    return {
        "total": total,
        "mean": total / lengths.total(),
        **{name: quantile(lengths, share) for name, share in QUANTILES.items()},
        "max": max(lengths),
        "histogram": histogram(lengths),
    }


def diacritic_kinds(texts: Sequence[str]) -> list[str]:
    """One of DIACRITICS for each text, by its diacritics per Arabic letter, code and URLs left out."""
    return _diacritic_kinds(*_code_points([hide_spans(text)[0] for text in texts]))


def _diacritic_kinds(codes: np.ndarray, starts: np.ndarray) -> list[str]:
    letters, marks = (np.add.reduceat(table[codes], starts, dtype=np.int64) for table in _classes())
    kinds = np.where(marks == 0, 0, np.where(marks <= SOME_DIACRITICS * letters, 1, 2))
    return [DIACRITICS[kind] for kind in kinds]


def _code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Code points of all texts, each text ended by PLACEHOLDER, [n]; where each text starts, [texts]."""
    ended = [text + PLACEHOLDER for text in texts]
    codes = np.frombuffer("".join(ended).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    return codes, np.cumsum([0, *map(len, ended)])[:-1]


@lru_cache
def _classes() -> tuple[np.ndarray, np.ndarray]:
    """Whether each code point is an Arabic letter; whether it is a diacritic. Bool, [code points] each."""
    letters, marks = np.zeros(_CODE_POINTS, bool), np.zeros(_CODE_POINTS, bool)
    diacritic = re.compile(f"[{TANWIN_SHADDA}{VOWELS}{QURANIC}]")
    for code in (*range(0x600, 0x700), *range(0x750, 0x780), *range(0x870, 0x900), *range(0xFB50, 0xFEFD)):
        letters[code] = unicodedata.category(chr(code)) == "Lo"
        marks[code] = diacritic.match(chr(code)) is not None
    return letters, marks
