"""Dialects as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from arabic_qwen.audit.dialects import DialectReport
from arabic_qwen.audit.split import Split
from arabic_qwen.audit.tables import share_cell
from arabic_qwen.data.bad_rows import count
from arabic_qwen.terminal import isolated
from arabic_qwen.text.dialects import DIALECTS, UNKNOWN, Score

_EVERY = (*DIALECTS, UNKNOWN)
_LETTERS = 60  # of an example


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _shares(columns: Mapping[str, Counter[str]]) -> Table:
    """A row a dialect, a column of counts and of shares for each column."""
    table = _table("dialect", [name for column in columns for name in (column, "")])
    for dialect in _EVERY:
        if any(counts[dialect] for counts in columns.values()):
            pairs = [(counts[dialect], counts[dialect] / max(1, counts.total())) for counts in columns.values()]
            table.add_row(dialect, *[cell for number, share in pairs for cell in (f"{number:,}", share_cell(share))])
    return table


def dialects_tables(report: DialectReport) -> list[RenderableType]:
    """Shares, drift from question to answer, and the answers that were told most surely."""
    rows = count(report.rows, "row")
    shown: list[RenderableType] = [f"{rows}, {count(report.bad_rows, 'bad row')} left out" if report.bad_rows else rows]
    shown += ["", _shares({"questions": report.prompts, "answers": report.answers}), ""]
    if report.drift_share is not None:
        there = [dialect for dialect in _EVERY if report.answers[dialect]]
        drift = _table("question ↓, answer →", there)
        for question in (dialect for dialect in _EVERY if report.prompts[dialect]):
            numbers = [report.drift[question, answer] for answer in there]
            drift.add_row(question, *[f"{number:,}" if number else "·" for number in numbers])
        drifted = f"{report.drift_share:.1%} of the answers are in another dialect than the question (both known)"
        shown += [drift, drifted, ""]
    for dialect, examples in report.examples.items():
        for confidence, text in examples:
            shown.append(Text(f"{dialect}  {confidence:4.0%}  {isolated(' '.join(text.split())[:_LETTERS])}"))
    return shown


def scores_table(scores: Sequence[Score]) -> Table:
    table = _table("dialect", ["texts", "precision", "recall", "F1", "unknown"])
    for dialect, texts, *numbers in scores:
        table.add_row(dialect, f"{texts:,}", *[f"{number:.2f}" for number in numbers])
    macro = sum(score.f1 for score in scores) / len(scores)
    table.add_row("all", f"{sum(score.texts for score in scores):,}", "", "", f"{macro:.2f}", "")
    return table


def split_tables(split: Split) -> list[RenderableType]:
    """The dialects of the answers of each part, and where the parts are."""
    shown: list[RenderableType] = [_shares(split.dialects)]
    if split.bad_rows:
        shown.append(f"{count(split.bad_rows, 'bad row')} left out; `arabic-qwen data check` names them")
    return [*shown, *[f"{split.dialects[part].total():,} rows: {path}" for part, path in split.files.items()]]
