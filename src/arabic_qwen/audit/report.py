"""The audit of a data set as one page for a browser: right to left, self-contained, safe to open."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files as package_files
from pathlib import Path

from arabic_qwen.audit.check import Audit
from arabic_qwen.audit.findings import CODES, Finding
from arabic_qwen.audit.statistics import DIACRITICS, QUANTILES, Statistics, histogram, quantile, shares_of
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.files import write_atomically
from arabic_qwen.text.dialects import DIALECTS, UNKNOWN
from arabic_qwen.text.rules import INVISIBLE

#: What a row with such a finding loses of its worth.
ERROR, WARNING, REPAIRABLE = 1.0, 0.25, 0.1

_MARK = '<meta name="generator" content="arabic-qwen data">'
_PLACES = 5  # shown of each kind of finding
_LENGTH = 300  # letters shown of a text
_NAMES = 5  # shown of data files, and of scripts
_HIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{INVISIBLE}\ud800-\udfff\ufdd0\ufffe\uffff]")

_SIDES = {"prompts": "الأسئلة", "answers": "الإجابات", "rejected": "المرفوضة"}


def score(audit: Audit) -> int:
    """How good the data is, 0 to 100: 100 · ∏ (1 − w · share of rows with the finding), over the kinds of findings.

    w is 1 for an error, 0.1 for a warning that `data fix` repairs, and 0.25 for any other warning. Rounded down, so that
    100 means that nothing was found.
    """
    left = 100.0
    for code, number in audit.counts.items():
        kind = CODES[code]
        weight = ERROR if kind.level == "error" else REPAIRABLE if kind.fixed else WARNING
        left *= 1 - weight * min(1, number / max(1, audit.rows))
    return int(left)


def check_target(path: Path) -> None:
    """Raise ConfigurationError where a page cannot be written to `path`; an earlier page may be overwritten."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigurationError(f"--html {path}: is a folder, or its folder does not exist; name a file")
    if path.exists():
        with path.open("rb") as file:
            ours = _MARK.encode() in file.read(500)
        if not ours:
            raise ConfigurationError(f"--html {path}: exists and is no report of this command; name another file")


def write_html(audit: Audit, path: Path) -> None:
    """Write the page: score, findings with examples, statistics. For what may be overwritten, see `check_target`."""
    value = score(audit)
    found = [
        f'<div class="score {"good" if value >= 90 else "fair" if value >= 70 else "poor"}"><strong>{value}</strong>'
        f"<span>من 100 <small lang=en dir=ltr>of 100</small></span>{_meter(value / 100)}</div>",
        _section("المشكلات", "Findings", _findings(audit)),
    ]
    copies = {
        name: min(1.0, audit.counts[code] / max(1, audit.rows))
        for name, code in (("copies", "duplicate"), ("nearly copies", "near_duplicate"))
    }
    _write("فحص البيانات", "Data check", audit.files, [*found, *_statistics(audit.statistics, copies)], path)


def write_statistics_html(statistics: Statistics, names: Sequence[str], path: Path) -> None:
    """Write a page of the statistics of the data of these names."""
    sections = _statistics(statistics, {"copies": statistics.duplicate_share})
    _write("إحصاءات البيانات", "Data statistics", names, sections, path)


def _write(arabic: str, english: str, names: Sequence[str], sections: Iterable[str], path: Path) -> None:
    check_target(path)
    style = (package_files("arabic_qwen") / "assets" / "report.css").read_text(encoding="utf-8")
    more = f" +{len(names) - _NAMES:,}" if len(names) > _NAMES else ""
    shown = " · ".join(map(_text, names[:_NAMES])) + more
    page = f"""<!doctype html>
<html dir="rtl" lang="ar">
<head>
<meta charset="utf-8">
{_MARK}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{arabic} · {english}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{arabic} <span lang="en" dir="ltr">{english}</span></h1><p><bdi>{shown}</bdi></p></header>
<main>
{"".join(sections)}</main>
</body>
</html>
"""
    write_atomically(path, page)


def _text(text: str) -> str:
    """Text from the data as HTML: cut, escaped, what cannot be seen made visible."""
    text = text if len(text) <= _LENGTH else text[:_LENGTH] + "…"
    return _HIDDEN.sub(lambda match: f'<i class="hidden">U+{ord(match[0]):04X}</i>', escape(text))


def _section(arabic: str, english: str, body: str) -> str:
    return f'<section><h2>{arabic} <span lang="en" dir="ltr">{english}</span></h2>\n{body}</section>\n'


def _findings(audit: Audit) -> str:
    if not audit.counts:
        return "<p>لا شيء. <span lang=en dir=ltr>Nothing.</span></p>\n"
    examples: dict[str, list[Finding]] = {code: [] for code in audit.counts}
    for finding in audit.findings:
        if len(examples[finding.code]) < _PLACES:
            examples[finding.code].append(finding)
    codes = sorted(audit.counts, key=lambda code: (CODES[code].level, -audit.counts[code]))
    return "".join(_finding(code, audit.counts[code], audit.rows, examples[code]) for code in codes)


def _finding(code: str, number: int, rows: int, examples: list[Finding]) -> str:
    kind = CODES[code]
    items = "".join(
        f'<li dir="ltr"><code>{_text(f"{found.file}:{found.line}")}</code> '
        f'<span lang="en" dir="auto">{_text(found.message)}</span>'
        + (f'<blockquote dir="auto">{_text(found.example)}</blockquote>' if found.example else "")
        + "</li>\n"
        for found in examples
    )
    return (
        f'<details class="{kind.level}"><summary><b>{kind.arabic}</b> '
        f'<span lang="en" dir="ltr">{escape(kind.title)}</span>'
        f'<data dir="ltr">{number:,}</data>{_meter(number / max(1, rows))}</summary>\n'
        f'<p lang="en" dir="ltr">{escape(kind.remedy)}{" (data fix does it)" if kind.fixed else ""}</p>\n'
        f"<ul>{items}</ul></details>\n"
    )


def _statistics(statistics: Statistics, copies: dict[str, float]) -> list[str]:
    """The sections on lengths, copies (shares of the rows), scripts, dialects and diacritics."""
    sides = [side for side in _SIDES if statistics.sides[side].count]
    texts = {side: statistics.sides[side] for side in sides}
    scripts = {side: texts[side].scripts() for side in sides}
    most: Counter[str] = sum(map(Counter, scripts.values()), Counter())
    dialects = {side: shares_of(texts[side].dialects) for side in sides}
    spoken = [name for name in (*DIALECTS, UNKNOWN) if any(name in shares for shares in dialects.values())]
    sections = [
        _section("الأطوال بالكلمات", "Lengths in words", _lengths(statistics)),
        _section("التكرار", "Duplicates", _bars({"": copies}, list(copies))),
        _section("الكتابة", "Script of the letters", _bars(scripts, [name for name, _ in most.most_common(_NAMES)])),
        _section("اللهجة", "Dialect", _bars(dialects, spoken)),
    ]
    if statistics.drift_share is not None:
        sections.append(_section("انزياح اللهجة", "Dialect of prompt and answer", _drift(statistics)))
    marks = {side: shares_of(texts[side].diacritics) for side in sides}
    return [*sections, _section("التشكيل", "Diacritics", _bars(marks, list(DIACRITICS)))]


def _meter(share: float, side: str = "") -> str:
    bar = f'<i style="width:{100 * share:.1f}%"></i>' if share else ""
    return f'<span class="meter {side}">{bar}</span>'


def _bars(sides: dict[str, dict[str, float]], names: list[str]) -> str:
    """A row for each name, and in it a bar for each side."""
    rows = []
    for name in names:
        bars = "".join(
            f'{_meter(shares.get(name, 0.0), side)}<data dir="ltr">{shares.get(name, 0.0):.1%}</data>'
            for side, shares in sides.items()
        )
        rows.append(f'<dt lang="en" dir="ltr">{escape(name)}</dt><dd>{bars}</dd>\n')
    return f"{_legend(sides)}<dl>{''.join(rows)}</dl>\n"


def _legend(sides: Iterable[str]) -> str:
    named = [side for side in sides if side]
    items = (f'<li class="{side}">{_SIDES[side]} <span lang="en" dir="ltr">{side}</span></li>' for side in named)
    return f'<ul class="legend">{"".join(items)}</ul>\n' if named else ""


def _lengths(statistics: Statistics) -> str:
    """A histogram and a line of quantiles for each side."""
    parts = []
    for side, arabic in _SIDES.items():
        texts = statistics.sides[side]
        if not texts.count:
            continue
        bins = histogram(texts.words)
        most = max(number for _, _, number in bins)
        columns = "".join(
            f'<li><data>{number:,}</data><i style="height:{100 * number / most:.1f}%"></i>'
            f"<span>{first if first == last else f'{first:,}–{last:,}'}</span></li>"
            for first, last, number in bins
        )
        numbers = ", ".join(f"{name} {quantile(texts.words, share):,}" for name, share in QUANTILES.items())
        parts.append(
            f'<figure class="{side}"><figcaption>{arabic} <span lang="en" dir="ltr">{side}: {texts.count:,} texts, '
            f'{numbers}, longest {max(texts.words):,}</span></figcaption><ol class="columns" dir="ltr">{columns}</ol>'
            "</figure>\n"
        )
    return "".join(parts)


def _drift(statistics: Statistics) -> str:
    """Dialects of prompts (rows) against those of their answers (columns)."""
    prompts, answers = ([d for d in (*DIALECTS, UNKNOWN) if d in side] for side in zip(*statistics.drift, strict=True))
    most = max(statistics.drift.values())
    head = "".join(f'<th scope="col">{answer}</th>' for answer in answers)
    body = "".join(
        f'<tr><th scope="row">{prompt}</th>'
        + "".join(
            f'<td style="--share:{100 * number / most:.0f}%">{number:,}</td>'
            for number in (statistics.drift[prompt, answer] for answer in answers)
        )
        + "</tr>\n"
        for prompt in prompts
    )
    return (
        f'<p>إجابات بلهجة غير لهجة السؤال: <b dir="ltr">{statistics.drift_share:.1%}</b> '
        '<span lang="en" dir="ltr">answers in another dialect than their prompt, where both are known</span></p>\n'
        f'<table class="drift" dir="ltr"><thead><tr><th>prompt ↓ answer →</th>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>\n"
    )
