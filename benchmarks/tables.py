"""Writes the tables of docs/performance.md from the results in benchmarks/results.

    python benchmarks/tables.py [PAGE]

A table stands between `<!-- table: BENCHMARK FILE.json … -->` and `<!-- end -->`, where BENCHMARK is throughput, scaling or
profile_kernels. Several files of throughput.py are one table.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import profile_kernels
import scaling
import throughput

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
TABLES = {"throughput": throughput.table, "scaling": scaling.table, "profile_kernels": profile_kernels.table}
MARKED = re.compile(r"(<!-- table: (\w+) ([^>]+) -->\n).*?(<!-- end -->)", re.S)


def render(benchmark: str, files: list[str]) -> str:
    reports = [json.loads((RESULTS / file).read_text(encoding="utf-8")) for file in files]
    report: dict[str, Any] = reports[0]
    if benchmark == "throughput":
        runs = [run for one in reports for run in one["runs"]]
        report |= {"runs": runs, "summary": throughput.summary(runs)}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']}; {versions}\n\n{TABLES[benchmark](report)}"


def filled(page: str) -> str:
    return MARKED.sub(lambda m: f"{m[1]}\n{render(m[2], m[3].split())}\n\n{m[4]}", page)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
