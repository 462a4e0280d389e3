"""What the data verbs found, as tables and lines for a terminal."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from arabic_qwen.audit.findings import CODES
from arabic_qwen.audit.report import score
from arabic_qwen.audit.statistics import DIACRITICS, QUANTILES, Statistics, histogram, quantile, shares_of
from arabic_qwen.data.bad_rows import count
from arabic_qwen.terminal import isolated
from arabic_qwen.text.dialects import DIALECTS, UNKNOWN, Score

if TYPE_CHECKING:  # some take long to import, and each verb needs one of them
    from arabic_qwen.audit.check import Audit
    from arabic_qwen.audit.dialects import DialectReport
    from arabic_qwen.audit.rows import Sample
    from arabic_qwen.audit.split import Split
    from arabic_qwen.audit.tokens import Count, TokenCost

_EVERY = (*DIALECTS, UNKNOWN)
_BAR = 8  # columns
_LETTERS = 60  # of an example
_COLOURS = {"error": "red", "warning": "yellow"}
_INDENT = 9  # columns
_SCRIPTS_SHOWN = 5
_REMARK = "Tokens saved are training time saved, in about the same share, and room in max_seq_length."


def bar(share: float, width: int = _BAR) -> str:
    """A bar of eighths of a column: bar(0.5, 3) is "█▌"."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def share_cell(share: float) -> str:
    return f"{bar(share):<{_BAR}} {share:6.1%}"


def _table(first: str, columns: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def statistics_tables(statistics: Statistics) -> list[RenderableType]:
    """Lengths, scripts, dialects and diacritics of each side of the rows, and the drift between dialects."""
    sides = {name: texts for name, texts in statistics.sides.items() if texts.count}
    lengths = _table("", sides)
    lengths.add_row("texts", *[f"{texts.count:,}" for texts in sides.values()])
    for unit in ("words", "characters"):
        found = [getattr(texts, unit) for texts in sides.values()]  # how many texts have each length
        totals = [sum(length * number for length, number in of_side.items()) for of_side in found]
        lengths.add_row(unit, *[f"{total:,}" for total in totals])
        for name, share in QUANTILES.items():
            lengths.add_row(f"  {name}", *[f"{quantile(of_side, share):,}" for of_side in found])
        lengths.add_row("  longest", *[f"{max(of_side):,}" for of_side in found])

    shares = _table("", sides)
    scripts = {name: texts.scripts() for name, texts in sides.items()}
    most: Counter[str] = sum(map(Counter, scripts.values()), Counter())
    kinds = {
        "script": ([script for script, _ in most.most_common(_SCRIPTS_SHOWN)], scripts),
        "dialect": (
            [name for name in _EVERY if any(texts.dialects[name] for texts in sides.values())],
            {name: shares_of(texts.dialects) for name, texts in sides.items()},
        ),
        "diacritics": (list(DIACRITICS), {name: shares_of(texts.diacritics) for name, texts in sides.items()}),
    }
    for kind, (names, by_side) in kinds.items():
        shares.add_row(Text(kind, style="bold"))
        for name in names:
            shares.add_row(f"  {name}", *[share_cell(by_side[side].get(name, 0.0)) for side in sides])
    return [_summary(statistics), "", lengths, "", shares, "", *_drift(statistics), _answer_lengths(statistics)]


def _summary(statistics: Statistics) -> str:
    parts = [count(statistics.rows, "row"), f"{statistics.duplicate_share:.1%} of them copies of an earlier one"]
    several = statistics.rows - statistics.turns[1]
    if several:
        parts.append(f"{several / statistics.rows:.1%} with more than one question")
    if statistics.bad_rows:
        parts.append(f"{count(statistics.bad_rows, 'bad row')} left out (data check names them)")
    return ", ".join(parts)


def _drift(found: Statistics | DialectReport) -> list[RenderableType]:
    """Dialects of prompts against those of their answers."""
    if found.drift_share is None:
        return []
    prompts, answers = ([d for d in _EVERY if d in side] for side in zip(*found.drift, strict=True))
    table = _table("dialect of prompt ↓, answer →", answers)
    for prompt in prompts:
        counts = [found.drift[prompt, answer] for answer in answers]
        table.add_row(prompt, *[f"{number:,}" if number else "·" for number in counts])
    return [table, f"{found.drift_share:.1%} of answers in another dialect than their prompt, where both are known", ""]


def _answer_lengths(statistics: Statistics) -> RenderableType:
    table = _table("words an answer", ["answers", ""])
    table.columns[2].justify = "left"
    bins = histogram(statistics.sides["answers"].words)
    most = max(number for _, _, number in bins)
    for first, last, number in bins:
        label = str(first) if first == last else f"{first:,}–{last:,}"
        table.add_row(label, f"{number:,}", bar(number / most, 3 * _BAR))
    return table


def tokens_tables(costs: dict[str, TokenCost], rows: Sample) -> list[RenderableType]:
    """What the texts cost with each tokenizer, what normalising would save, and the words that are cut up most."""
    table = _table("", costs)
    every = list(costs.values())
    first = every[0]
    table.add_row("tokens", *[f"{cost.total.tokens:,}" for cost in every])
    table.add_row("  a word", *[_per_word(cost.total) for cost in every])
    table.add_row("  a character", *[f"{cost.total.tokens / max(1, cost.total.characters):.2f}" for cost in every])
    table.add_row(Text("tokens a word, by dialect", style="bold"))
    for dialect in _EVERY:
        if dialect in first.dialects:
            label = f"  {dialect} ({count(first.dialects[dialect].texts, 'text')})"
            table.add_row(label, *[_per_word(cost.dialects[dialect]) for cost in every])
    table.add_row(Text("tokens a word, by diacritics", style="bold"))
    for kind in DIACRITICS:
        if kind in first.diacritics:
            label = f"  {kind} ({count(first.diacritics[kind].texts, 'text')})"
            table.add_row(label, *[_per_word(cost.diacritics[kind]) for cost in every])
    table.add_row(Text("tokens saved, by normalisation", style="bold"))
    for change, saving in first.savings.items():
        if not saving.texts:
            continue
        label = f"  {change} ({count(saving.texts, 'text')})"
        savings = [(cost.savings[change].tokens, cost.total.tokens) for cost in every]
        table.add_row(label, *[f"{saved:,} {saved / max(1, total):6.1%}" for saved, total in savings])
    if not any(saving.texts for saving in first.savings.values()):
        table.add_row("  no rule changes anything")
    return [_sampled(rows), "", table, "", _REMARK, *_worst(costs)]


def _sampled(rows: Sample) -> str:
    said = count(rows.rows, "row")
    if len(rows.chosen) < rows.rows:
        said = f"a sample of {len(rows.chosen):,} of {said}"
    return said + (f", {count(rows.bad_rows, 'bad row')} left out" if rows.bad_rows else "")


def _per_word(count: Count) -> str:
    return f"{count.tokens / count.words:.2f}" if count.words else "–"


def _worst(costs: dict[str, TokenCost]) -> Iterable[RenderableType]:
    for name, cost in costs.items():
        if not cost.worst:
            continue
        table = _table("tokens", ["times", "word", "pieces"])
        table.columns[0].justify = "right"
        for word in cost.worst:
            table.add_row(
                str(word.tokens),
                f"{word.times:,}",
                isolated(word.word),
                isolated(" · ".join(map(_visible, word.pieces))),
            )
        yield from ("", Text(f"cut up worst by {name}", style="bold"), table)


def _visible(piece: str) -> str:
    """A piece that begins with a diacritic needs something to carry it."""
    return "◌" + piece if unicodedata.combining(piece[0]) else piece


def _shares_table(columns: Mapping[str, Counter[str]]) -> Table:
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
    shown += ["", _shares_table({"questions": report.prompts, "answers": report.answers}), ""]
    shown += _drift(report)
    for dialect, examples in report.examples.items():
        for confidence, text in examples:
            shown.append(Text(f"{dialect}  {confidence:4.0%}  {isolated(' '.join(text.split())[:_LETTERS])}"))
    return shown


def scores_table(scores: Sequence[Score]) -> Table:
    table = _table("dialect", ["texts", "precision", "recall", "F1", "unknown"])
    for dialect, texts, *numbers in scores:
        table.add_row(dialect, f"{texts:,}", *[f"{number:.2f}" for number in numbers])
    macro = sum(each.f1 for each in scores) / len(scores)
    table.add_row("all", f"{sum(each.texts for each in scores):,}", "", "", f"{macro:.2f}", "")
    return table


def split_tables(split: Split) -> list[RenderableType]:
    """The dialects of the answers of each part, and where the parts are."""
    shown: list[RenderableType] = [_shares_table(split.dialects)]
    if split.bad_rows:
        shown.append(f"{count(split.bad_rows, 'bad row')} left out; `arabic-qwen data check` names them")
    return [*shown, *[f"{split.dialects[part].total():,} rows: {path}" for part, path in split.files.items()]]


def findings_table(audit: Audit, examples: int) -> Iterator[Text]:
    """Lines: each code, errors first, how often it was found and what helps; under it the first places and texts."""
    width = max(map(len, audit.counts), default=0)
    yield Text(f"{'level':<{_INDENT}}{'code':<{width}}  {'count':>7}  what to do", "bold")
    for code in sorted(audit.counts, key=lambda code: (CODES[code].level, -audit.counts[code])):
        found = [finding for finding in audit.findings if finding.code == code]
        level = min((finding.level for finding in found), default=CODES[code].level)
        line = Text(f"{level:<{_INDENT}}", _COLOURS[level])
        yield line.append(f"{code:<{width}}  {audit.counts[code]:>7,}  {CODES[code].remedy}", "not bold default")
        for finding in found[:examples]:
            place = f"{Path(finding.file).name}:{finding.line}  "
            indent = _INDENT + len(place)
            yield Text(f"{'':<{_INDENT}}{place}{isolated(finding.message, indent)}", "dim")
            if finding.example:
                yield Text(f"{'':<{indent}}{isolated(finding.example, indent)}")


def verdict(audit: Audit) -> str:
    """The last line: counts, score, and what can be repaired."""
    warnings = audit.counts.total() - audit.errors
    fixed = sum(number for code, number in audit.counts.items() if CODES[code].fixed)
    found = f"{count(audit.rows, 'row')}: {count(audit.errors, 'error')}, {count(warnings, 'warning')}"
    return f"{found}; score {score(audit)} of 100" + (
        f"; `arabic-qwen data fix FILE OUT` repairs {fixed:,} of them" if fixed else ""
    )
