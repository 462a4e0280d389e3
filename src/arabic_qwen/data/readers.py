"""Reads data files into rows that remember where they came from."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from arabic_qwen.errors import DatasetError

#: `dataset_path: sample:sft` and so on: small sets that come with the package.
SAMPLES = ("sft", "dpo", "kto")


class Row(NamedTuple):
    """One record and the place to name when it is wrong."""

    where: str  # file:line
    values: dict[str, Any]


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Read a JSON Lines file; blank lines are skipped.

    Raises:
        DatasetError: the file is missing or empty, or has lines that are not JSON objects in UTF-8 (all are named).
    """
    path = _resolve(path)
    rows, problems = [], []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if not text:
                        continue
                    values = json.loads(text)
                except UnicodeDecodeError as error:
                    problems.append(f"{where}: is not UTF-8 text (byte {error.start + 1}: {error.reason})")
                    continue
                except RecursionError:
                    problems.append(f"{where}: not valid JSON (nested too deeply)")
                    continue
                except ValueError as error:  # json's own error, or a number of more digits than Python reads
                    problems.append(f"{where}: not valid JSON ({getattr(error, 'msg', error)})")
                    continue
                if isinstance(values, dict):
                    rows.append(Row(where, values))
                else:
                    problems.append(f"{where}: must be a JSON object, found a {type(values).__name__}")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); check dataset_path") from None
    raise_problems(problems, "write one JSON object per line, in UTF-8")
    if not rows:
        raise DatasetError(f"{path}: holds no rows; write one JSON object per line")
    return rows


def raise_problems(problems: list[str], remedy: str) -> None:
    """Raise one DatasetError with the first ten problems, their number and the remedy; nothing where there are none."""
    problems = list(dict.fromkeys(problems))  # a row may have become several groups
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DatasetError("\n".join(problems[:10]) + more + f"\n{len(problems)} bad rows; {remedy}")


def _resolve(path: str | os.PathLike) -> Path:
    name = os.fspath(path)
    if name.startswith("sample:"):
        sample = name.removeprefix("sample:")
        if sample not in SAMPLES:
            raise DatasetError(f"{name}: no such sample; choose one of {', '.join('sample:' + s for s in SAMPLES)}")
        return Path(str(files("arabic_qwen") / "assets" / f"{sample}.jsonl"))
    if Path(name).suffix not in (".jsonl", ".ndjson"):
        raise DatasetError(f"{name}: unknown format; give a JSON Lines file named *.jsonl")
    return Path(name)
