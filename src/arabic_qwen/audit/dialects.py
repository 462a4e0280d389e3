"""`arabic-qwen data dialects` and `fit-dialects`: the dialects of a data set, and a classifier of one's own."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arabic_qwen.audit.statistics import RowTexts, drift_by_prompt, drift_share
from arabic_qwen.config import SFTConfig
from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.data.readers import Row
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text.dialects import (
    DIALECTS,
    DialectClassifier,
    Prediction,
    Score,
    fit,
    held_out_predictions,
    score,
)
from arabic_qwen.text.normalization import normalize

_CHUNK = 1000  # rows classified at a time
_EXAMPLES = 3  # of each dialect


@dataclass
class DialectReport:
    """The dialects of questions and of their (chosen) answers."""

    rows: int = 0
    bad_rows: int = 0
    prompts: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    drift: Counter[tuple[str, str]] = field(default_factory=Counter)  # (of the prompt, of the answer)
    examples: dict[str, list[tuple[float, str]]] = field(default_factory=dict)  # the answers told most surely

    @property
    def drift_share(self) -> float | None:
        return drift_share(self.drift)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "prompts": dict(self.prompts.most_common()),
            "answers": dict(self.answers.most_common()),
            "drift": drift_by_prompt(self.drift),
            "drift_share": self.drift_share,
            "examples": {
                dialect: [{"text": text, "confidence": round(confidence, 3)} for confidence, text in found]
                for dialect, found in self.examples.items()
            },
        }


def dialect_report(rows: Iterable[RowTexts | BadRow], classifier: DialectClassifier) -> DialectReport:
    """Count the dialects of rows, a thousand at a time."""
    report = DialectReport()
    rows = iter(rows)
    surest: dict[str, list[tuple[float, str]]] = {}
    while chunk := list(itertools.islice(rows, _CHUNK)):
        good = [row for row in chunk if isinstance(row, RowTexts)]
        report.rows += len(good)
        report.bad_rows += len(chunk) - len(good)
        prompts = classifier.predict([row.prompt for row in good])
        answers = classifier.predict([row.answers[0] for row in good])
        report.prompts.update(prediction.dialect for prediction in prompts)
        report.answers.update(prediction.dialect for prediction in answers)
        report.drift.update((a.dialect, b.dialect) for a, b in zip(prompts, answers, strict=True))
        for row, (dialect, confidence) in zip(good, answers, strict=True):
            found = [*surest.get(dialect, []), (confidence, row.answers[0])]
            surest[dialect] = heapq.nlargest(_EXAMPLES, dict.fromkeys(found), key=lambda example: example[0])
    report.examples = {dialect: surest[dialect] for dialect in DIALECTS if dialect in surest}
    return report


def fit_file(
    file: str, out: Path, text: str, label: str, *, watch: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> tuple[list[Score], str]:
    """Write a classifier of the file's labelled texts; how well its kind does on held-out ones, and what these were.

    Held out are whole sources where there is a column `source`, else single texts.

    Raises:
        DatasetError: the file cannot be read, or a row lacks a column or has a label that is no dialect.
        ConfigurationError: `out` exists already or cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ConfigurationError(f"{out}: classifiers are safetensors files; give a name that ends in .safetensors")
    if out.exists():
        raise ConfigurationError(f"{out}: exists already, and nothing is overwritten; give another name")
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"{out}: there is no folder {out.parent}; make it first")
    rows = [_labelled(row, text, label) for row in watch(read_rows(SFTConfig(), file))]
    texts, labels = [row[text] for row in rows], [row[label] for row in rows]
    sources = [str(row.get("source", "")) for row in rows]
    by_source = len(set(sources)) > 1
    groups = sources if by_source else [normalize(each, "compare") for each in texts]
    predictions: Sequence[Prediction] = held_out_predictions(texts, labels, groups)
    fit(texts, labels, groups).save(out)
    return score(labels, predictions), "sources" if by_source else "texts"


def _labelled(row: Row | BadRow, text: str, label: str) -> dict[str, Any]:
    """The row's values. Raises DatasetError where text or label are missing or wrong."""
    if isinstance(row, BadRow):
        raise DatasetError(f"{row.where}: {row.reason}")
    for option, column in (("--text", text), ("--label", label)):
        if not isinstance(row.values.get(column), str):
            there = ", ".join(row.values) or "none"
            raise DatasetError(
                f"{row.where}: has no text in column {column!r} (columns: {there}); name it with {option}"
            )
    if row.values[label] not in DIALECTS:
        raise DatasetError(
            f"{row.where}: {row.values[label]!r} in column {label!r} is no dialect; use {', '.join(DIALECTS)}"
        )
    return row.values
