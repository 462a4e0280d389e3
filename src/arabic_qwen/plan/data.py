"""What a run's data is like, for `arabic-qwen plan`."""

from __future__ import annotations

import functools
import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arabic_qwen.config import BaseConfig
from arabic_qwen.config.data import data_sources
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import DatasetError, ModelLoadError, one_line
from arabic_qwen.memory.fit import largest_step
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.packing.bins import budget_bins
from arabic_qwen.packing.group import Group
from arabic_qwen.packing.sampler import Sequences
from arabic_qwen.training.base_trainer import BaseTrainer

_SAMPLE = 1000  # rows whose lengths are measured
_COMPLETIONS = {1: "one answer", 2: "two answers (a chosen and one rejected)"}
_READ_AT_ONCE = 20e6  # bytes of data files that take no noticeable time


class LengthMix(NamedTuple):
    """What the examples are like: measured on the data, or assumed."""

    tokens: float  # of an example in the stream, where its prompt counts once
    budgeted: float  # of these and auxiliary completions, which count against a token budget
    targets: float
    pairs: float  # of a query and a key that it sees
    gathered: float  # keys that are its prompt's, again for each completion that shares it
    longest: int  # tokens of the longest example
    completions: int  # of an example, at most
    step: int  # tokens of an optimizer step, at most
    epochs: float  # of the run
    examples_a_step: float  # on average
    steps: int | None = None  # of the run; None: the data was not read
    note: str = ""
    #: Of some examples, tokens that count against a token budget, and those in the stream; none: not measured.
    lengths: tuple[tuple[int, int], ...] = ()

    def largest_micro_batch(self, token_budget: int) -> int:
        """Tokens in the stream of the largest one under this budget; a longer example stands alone.

        By the order of the file; where lengths are not known, as if one filled the budget.
        """
        if not self.lengths:
            tokens = min(token_budget, self.step)
            return max(math.ceil(tokens * self.tokens / self.budgeted), min(tokens, self.longest))
        return _largest_micro_batch(self.lengths, max(round(self.examples_a_step), 1), token_budget)


@functools.cache
def _largest_micro_batch(lengths: tuple[tuple[int, int], ...], examples_a_step: int, token_budget: int) -> int:
    largest = 0
    for start in range(0, len(lengths), examples_a_step):
        budgeted, streamed = zip(*lengths[start : start + examples_a_step], strict=True)
        bins = budget_bins(budgeted, token_budget)
        largest = max(largest, *(sum(streamed[i] for i in members) for members in bins))
    return largest


def length_mix(config: BaseConfig) -> LengthMix:
    """What the training data is like; assumed where reading it would take long, or cannot be done yet.

    Raises:
        DatasetError: it is here, but cannot be trained on.
    """
    reason = _not_read(config)
    if not reason:
        try:
            return _measured_mix(config)
        except ModelLoadError as error:  # it has no tokenizer yet
            reason = one_line(error)
    method = METHODS[config.method]
    completions = 2 if method.rows[0] == "pair" else 1
    limit = getattr(config, config.length_key)
    prompt, answer = min(250, limit // 2), min(305, limit // 2)
    tokens = prompt + completions * answer
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return LengthMix(
        tokens=tokens,
        budgeted=prompt + (completions + (method.auxiliary is not None)) * answer,
        targets=completions * answer,
        pairs=prompt**2 / 2 + completions * answer * (prompt + answer / 2),
        gathered=completions * prompt if completions > 1 else 0,
        longest=completions * limit,
        completions=completions,
        step=rows * completions * limit,
        epochs=config.num_train_epochs,
        examples_a_step=rows * max((config.sequence_capacity or 0) / tokens, 1.0),
        note=f"not read ({reason}): assuming prompts of {prompt} tokens, {_COMPLETIONS[completions]} of {answer}, examples "
        f"of up to {completions * limit:,}",
    )


def _not_read(config: BaseConfig) -> str:
    """Why the data is not read: it is not here, or large. Else ""."""
    paths = [source.path for source in data_sources(config.dataset_path) if not source.path.startswith("sample:")]
    size = 0
    for path in (Path(path).expanduser() for path in paths):
        if not path.exists():
            return f"{path}: does not exist" if path.suffix else "on the hub"
        files = path.rglob("*") if path.is_dir() else [path]
        size += sum(file.stat().st_size for file in files if file.is_file())
    return "large" if size > _READ_AT_ONCE else ""


def _measured_mix(config: BaseConfig) -> LengthMix:
    logging.disable(logging.WARNING)  # what is said there is for training
    try:
        return _sampled_mix(config)
    finally:
        logging.disable(logging.NOTSET)


def _sampled_mix(config: BaseConfig) -> LengthMix:
    rows = sum(1 for _ in read_rows(config, config.dataset_path))
    with tempfile.TemporaryDirectory() as elsewhere:
        update = {"max_samples": min(rows, _SAMPLE), "output_dir": elsewhere, "streaming": False}
        try:
            dataset = BaseTrainer(config.model_copy(update=update)).get_data_loader().load()["train"]
        except DatasetError as error:
            raise DatasetError(str(error).partition("; listed in ")[0]) from None
    groups: Sequence[Group] = dataset.groups
    more = max(rows / _SAMPLE, 1.0)
    capacity = config.sequence_capacity
    sequences = max(round(len(Sequences(groups, capacity)) * more), 1)
    an_epoch = math.ceil(math.ceil(sequences / config.per_device_train_batch_size) / config.gradient_accumulation_steps)
    together = config.per_device_train_batch_size * config.gradient_accumulation_steps
    largest = sorted((group.num_budgeted for group in groups), reverse=True)
    steps = config.max_steps or math.ceil(config.num_train_epochs * an_epoch)
    examples = examples_of(groups)
    return LengthMix(
        **examples,
        step=min(sum(largest), largest_step(largest, together, capacity)),
        epochs=steps / an_epoch,
        steps=steps,
        examples_a_step=len(groups) * more / an_epoch,
        note=f"{round(len(groups) * more):,} examples to train on, of {examples['tokens']:,.0f} tokens on average"
        + (f" (measured on {_SAMPLE:,} rows)" if more > 1 else ""),
    )


def examples_of(groups: Sequence[Group]) -> dict[str, Any]:
    """The fields of :class:`LengthMix` that are of examples, measured."""
    pairs = [
        len(g.prompt) ** 2 / 2 + sum(len(c.ids) * (len(g.prompt) + len(c.ids) / 2) for c in g.completions)
        for g in groups
    ]
    return {
        "tokens": float(np.mean([group.num_tokens for group in groups])),
        "budgeted": float(np.mean([group.num_budgeted for group in groups])),
        "targets": float(np.mean([sum(int(c.targets.sum()) for c in group.completions) for group in groups])),
        "pairs": float(np.mean(pairs)),
        "gathered": float(np.mean([len(g.prompt) * len(g.completions) * (len(g.completions) > 1) for g in groups])),
        "longest": max(group.num_tokens for group in groups),
        "completions": max(len(group.completions) for group in groups),
        "lengths": tuple((group.num_budgeted, group.num_tokens) for group in groups),
    }
