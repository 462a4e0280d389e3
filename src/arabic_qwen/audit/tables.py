"""Statistics and token costs as tables for a terminal."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from arabic_qwen.audit.reading import Sample
from arabic_qwen.audit.statistics import DIACRITICS, QUANTILES, Statistics, histogram, quantile
from arabic_qwen.audit.tokens import CHANGES, Count, TokenCost
from arabic_qwen.data.bad_rows import count
from arabic_qwen.terminal import isolated
from arabic_qwen.text.dialects import DIALECTS, UNKNOWN

_BAR = 8  # columns
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
            [name for name in (*DIALECTS, UNKNOWN) if any(texts.dialects[name] for texts in sides.values())],
            {name: _shares(texts.dialects) for name, texts in sides.items()},
        ),
        "diacritics": (list(DIACRITICS), {name: _shares(texts.diacritics) for name, texts in sides.items()}),
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


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: count / counts.total() for name, count in counts.items()}


def _drift(statistics: Statistics) -> list[RenderableType]:
    """Dialects of prompts against those of their answers."""
    if statistics.drift_share is None:
        return []
    prompts, answers = ([d for d in (*DIALECTS, UNKNOWN) if d in side] for side in zip(*statistics.drift, strict=True))
    table = _table("dialect of prompt ↓, answer →", answers)
    for prompt in prompts:
        counts = [statistics.drift[prompt, answer] for answer in answers]
        table.add_row(prompt, *[f"{number:,}" if number else "·" for number in counts])
    return [
        table,
        f"{statistics.drift_share:.1%} of answers in another dialect than their prompt, where both are known",
        "",
    ]


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
    for dialect in (*DIALECTS, UNKNOWN):
        if dialect in first.dialects:
            label = f"  {dialect} ({count(first.dialects[dialect].texts, 'text')})"
            table.add_row(label, *[_per_word(cost.dialects[dialect]) for cost in every])
    table.add_row(Text("tokens a word, by diacritics", style="bold"))
    for kind in DIACRITICS:
        if kind in first.diacritics:
            label = f"  {kind} ({count(first.diacritics[kind].texts, 'text')})"
            table.add_row(label, *[_per_word(cost.diacritics[kind]) for cost in every])
    table.add_row(Text("tokens saved, by normalisation", style="bold"))
    for change in CHANGES:
        if not first.savings[change].texts:
            continue
        label = f"  {change} ({count(first.savings[change].texts, 'text')})"
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
