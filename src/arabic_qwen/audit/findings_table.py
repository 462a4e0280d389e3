"""What `data check` found, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from arabic_qwen.audit.check import Audit
from arabic_qwen.audit.findings import CODES, Finding
from arabic_qwen.audit.report import score
from arabic_qwen.data.bad_rows import count
from arabic_qwen.terminal import isolated

_COLOURS = {"error": "red", "warning": "yellow"}


def findings_table(audit: Audit, examples: int) -> Table:
    """A row for each code and level, errors first: how often, and the first places with their texts."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("level", "code"):
        table.add_column(name, no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("where and what", overflow="fold")
    for code in sorted(audit.counts, key=lambda code: (CODES[code].level, -audit.counts[code])):
        found = [finding for finding in audit.findings if finding.code == code]
        level = min((finding.level for finding in found), default=CODES[code].level)
        table.add_row(
            Text(level, _COLOURS[level]),
            code,
            f"{audit.counts[code]:,}",
            Text("\n".join(_lines(found[:examples]) or [CODES[code].title])),
        )
    return table


def _lines(findings: Sequence[Finding]) -> list[str]:
    lines = []
    for finding in findings:
        lines.append(f"{Path(finding.file).name}:{finding.line}  {isolated(finding.message)}")
        if finding.example:
            lines.append(f"  {isolated(finding.example)}")
    return lines


def verdict(audit: Audit) -> str:
    """The last line: counts, score, and what can be repaired."""
    warnings = audit.counts.total() - audit.errors
    repairable = sum(number for code, number in audit.counts.items() if CODES[code].fixed)
    text = f"{count(audit.rows, 'row')}: {count(audit.errors, 'error')}, {count(warnings, 'warning')}; score {score(audit)} of 100"
    return text + (f"; `arabic-qwen data fix FILE OUT` repairs {repairable:,} of them" if repairable else "")
