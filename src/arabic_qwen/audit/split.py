"""`arabic-qwen data split`: training and validation rows with the same share of each dialect."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arabic_qwen.audit.fix import AtomicFile
from arabic_qwen.audit.rows import check_method, read_row
from arabic_qwen.config import SFTConfig
from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.readers import Row
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text.dialects import DIALECTS, UNKNOWN, DialectClassifier
from arabic_qwen.text.normalization import normalize

PARTS = ("train", "validation")

_CHUNK = 1000  # rows classified at a time


@dataclass
class Split:
    """What :func:`split` wrote."""

    files: dict[str, Path]
    dialects: dict[str, Counter[str]] = field(default_factory=lambda: {part: Counter() for part in PARTS})
    bad_rows: int = 0  # left out


def split(
    file: str,
    folder: Path,
    classifier: DialectClassifier,
    share: float = 0.1,
    seed: int = 42,
    method: str = "",
    *,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Split:
    """Write `train.jsonl` and `validation.jsonl`, a seeded choice stratified by the dialect of the answer.

    Rows whose prompts are the same but for spelling (profile `compare`) are on one side. The file is read twice and
    never held in memory.

    Raises:
        ConfigurationError: a file exists already or cannot be written, or there is no such method.
        DatasetError: the file cannot be read, or has too few rows for two parts.
    """
    check_method(method)
    made = Split({part: folder / f"{part}.jsonl" for part in PARTS})
    for path in made.files.values():
        if os.path.lexists(path):
            raise ConfigurationError(f"{path}: exists already, and nothing is overwritten; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be made ({error.strerror}); give another folder") from None

    groups: list[bytes | None] = []  # of each row: its prompt, None where it cannot be used
    dialects: list[str] = []
    rows = iter(watch(read_rows(SFTConfig(), file)))
    while chunk := list(itertools.islice(rows, _CHUNK)):
        texts = [_prompt_and_answer(row, method) for row in chunk]
        groups += [_digest(found[0]) if found else None for found in texts]
        predictions = classifier.predict([found[1] if found else "" for found in texts])
        dialects += [prediction.dialect for prediction in predictions]
    held_out = _choose(groups, dialects, share, seed)
    used = sum(group is not None for group in groups)
    if not held_out or sum(group in held_out for group in groups) == used:
        raise DatasetError(
            f"{file}: {used:,} rows with {len({*groups} - {None}):,} different prompts cannot be split with "
            f"--share {share}; give more rows or another share"
        )

    with contextlib.ExitStack() as stack:
        written = {part: AtomicFile(path, stack) for part, path in made.files.items()}
        for row, group, dialect in zip(read_rows(SFTConfig(), file), groups, dialects, strict=True):
            if group is None or isinstance(row, BadRow):
                made.bad_rows += 1
                continue
            part = PARTS[group in held_out]
            written[part].write(row.values)
            made.dialects[part][dialect] += 1
        for file_of_part in written.values():
            file_of_part.keep()
    return made


def _prompt_and_answer(row: Row | BadRow, method: str) -> tuple[str, str] | None:
    """The conversation before the answer, and the answer; None where the row cannot be trained on."""
    if isinstance(row, BadRow):
        return None
    try:
        conversation = read_row(row.values, method)
    except RowError:
        return None
    before = [message["content"] for message in conversation.prompt if message["role"] != "system"]
    return "\n".join(before), conversation.answers[0]


def _digest(prompt: str) -> bytes:
    folded = normalize(prompt, "compare").encode("utf-8", "surrogatepass")
    return hashlib.blake2b(folded, digest_size=16).digest()


def _choose(groups: list[bytes | None], dialects: list[str], share: float, seed: int) -> set[bytes]:
    """The prompts that are held out: of each dialect's rows that share, what rounding leaves goes to the next dialect."""
    sizes = Counter(group for group in groups if group is not None)
    strata: dict[str, list[bytes]] = defaultdict(list)
    for group, dialect in dict(zip(reversed(groups), reversed(dialects), strict=True)).items():
        if group is not None:  # the dialect of the prompt's first row
            strata[dialect].append(group)
    held_out, wanted = set(), 0.0
    for dialect in (*DIALECTS, UNKNOWN):
        prompts = sorted(strata[dialect])
        random.Random(f"{seed} {dialect}").shuffle(prompts)
        wanted += share * sum(sizes[prompt] for prompt in prompts)
        for prompt in prompts:
            if sizes[prompt] <= wanted + 1e-9:
                held_out.add(prompt)
                wanted -= sizes[prompt]
    return held_out
