"""What `data check` found, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from arabic_qwen.audit.check import Audit
from arabic_qwen.audit.findings import CODES
from arabic_qwen.audit.report import score
from arabic_qwen.data.bad_rows import count
from arabic_qwen.terminal import isolated

_COLOURS = {"error": "red", "warning": "yellow"}
_INDENT = 9  # columns


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
