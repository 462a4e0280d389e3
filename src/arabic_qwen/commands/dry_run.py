"""`arabic-qwen train CONFIG --dry-run`: everything but the training, and what the training would take."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.engine.trainer import PackedTrainer, Step
from arabic_qwen.errors import DatasetError
from arabic_qwen.memory.model import moment_bytes
from arabic_qwen.runs import run_folder
from arabic_qwen.training.base_trainer import BaseTrainer

_PROCESSOR_TOKENS = 512  # that are computed to measure a processor, which takes seconds for them


class Measured(NamedTuple):
    """One forward and backward pass."""

    tokens: int
    seconds: float
    resident: int | None  # bytes before it; None where this system does not tell
    peak: int | None  # bytes at most during it


class _Stop(Exception):
    pass


class _Begin(TrainerCallback):
    """Stops where the first step would begin, and what fits has been chosen."""

    def on_step_begin(self, args, state, control, **kwargs):
        raise _Stop


class _Meter(TrainerCallback):
    """Measures a step up to where the optimizer would act, and stops there."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.resident = _memory("VmRSS", torch.cuda.memory_allocated) if _reset_peak() else None
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.peak = _memory("VmHWM", torch.cuda.max_memory_allocated)
        raise _Stop


def dry_run(config: BaseConfig) -> list[str]:
    """Prepare a run as :meth:`BaseTrainer.train` does, compute one batch, and say what the whole run would be.

    Nothing is written.

    Returns:
        Lines to show.

    Raises:
        TrainingError: what the run itself would raise before its first step, or its batch does not fit into memory.
    """
    run = run_folder.find_run(config)
    with tempfile.TemporaryDirectory() as elsewhere:
        values: dict[str, Any] = {"output_dir": elsewhere}
        if "precompute_reference" in type(config).model_fields:
            values["precompute_reference"] = False  # it would compute the whole set
        trainer = BaseTrainer(config.model_copy(update=values))
        try:
            engine, dataset = trainer.prepare()
        except DatasetError as error:
            raise DatasetError(str(error).partition("; listed in ")[0]) from None  # that list goes with the folder
        assert isinstance(engine, PackedTrainer)
        lines = _model_lines(engine.model)
        if isinstance(dataset["train"], GroupStream):
            _, engine.train_groups = next(dataset["train"].windows({}))
        lines += [f"{name:<11}{split.summary()}" for name, split in dataset.items()]
        _begin(engine, _Begin())
        lines += _step_lines(engine, config)
        lines += _cost_lines(engine, config)
    if run.finished:
        lines.append(f"folder     {run.folder} holds this run, finished: training would do nothing")
    elif run.in_the_way:
        lines.append(f"folder     {run.folder} holds a finished run with other settings, which would be renamed")
    elif config.overwrite_output_dir and run.folder.is_dir():
        lines.append(f"folder     training would discard the run in {run.folder}")
    elif run.checkpoint:
        lines.append(f"folder     training would go on from {run.checkpoint}")
    return [*lines, "nothing was written"]


def _model_lines(model: Any) -> list[str]:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return [f"model      {total:,} parameters, {trained:,} of them trained ({trained / total:.2%})"]


def _steps_of(engine: PackedTrainer, config: BaseConfig) -> tuple[int, float, Step]:
    """Optimizer steps of the run, tokens of one on average, and the first one."""
    loader = engine.get_train_dataloader()
    an_epoch = math.ceil(len(loader) / config.gradient_accumulation_steps)
    tokens = sum(group.num_tokens for group in engine.train_groups)
    steps = config.max_steps or math.ceil(config.num_train_epochs * an_epoch)
    return steps, tokens / an_epoch, next(step for step in loader if step.groups)


def _step_lines(engine: PackedTrainer, config: BaseConfig) -> list[str]:
    steps, tokens, first = _steps_of(engine, config)
    parts = [len(batch.input_ids) for batch in first.batches]
    full = first.num_tokens / (engine.token_budget * len(parts))
    return [
        f"steps      {steps:,}, of about {tokens:,.0f} tokens each",
        f"first step {len(first.groups)} examples, {first.num_tokens:,} tokens; micro-batches: {len(parts)}, the largest of "
        f"{max(parts):,} tokens, {full:.0%} of token_budget={engine.token_budget:,} filled",
    ]


def _cost_lines(engine: PackedTrainer, config: BaseConfig) -> list[str]:
    """Time and memory of the run, from one measured pass."""
    steps, tokens, first = _steps_of(engine, config)
    measured = _measure(engine)
    speed = measured.tokens / measured.seconds
    where = "accelerator" if torch.cuda.is_available() else "processor"
    lines = [
        f"time       about {_duration(steps * tokens / speed)} and the evaluations: {speed:,.0f} tokens/s, measured on "
        f"{measured.tokens:,} tokens (forward and backward) on this {where}"
    ]
    if measured.resident is None or measured.peak is None:
        return [*lines, "memory     this system does not tell what is used"]
    model: Any = engine.model
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    optimizer = moment_bytes(model, config.optim == "adamw_8bit")
    largest = max(len(batch.input_ids) for batch in first.batches)
    growing = max(0, measured.peak - measured.resident - gradients) * max(1.0, largest / measured.tokens)
    total = measured.resident + gradients + growing + optimizer
    return [
        *lines,
        f"memory     about {_gigabytes(total)}: {_gigabytes(measured.resident)} before a step, {_gigabytes(growing)} "
        f"activations of {largest:,} tokens (from {measured.tokens:,} measured), {_gigabytes(gradients + optimizer)} "
        "gradients and optimizer",
    ]


def _begin(engine: PackedTrainer, callback: TrainerCallback) -> None:
    """Train until the callback stops it."""
    engine.callback_handler.callbacks = [callback]
    with contextlib.suppress(_Stop):
        engine.train()
    engine.optimizer.zero_grad()  # sets gradients to None


def _measure(engine: PackedTrainer) -> Measured:
    """Forward and backward of one micro-batch of the first examples, by the engine's own training loop."""
    limit = engine.token_budget if torch.cuda.is_available() else min(engine.token_budget, _PROCESSOR_TOKENS)
    sample, tokens = [engine.train_groups[0]], engine.train_groups[0].num_tokens
    for group in engine.train_groups[1:]:
        if tokens + group.num_tokens > limit:
            break
        sample.append(group)
        tokens += group.num_tokens
    engine.sequence_capacity, engine.args.gradient_accumulation_steps = None, 1
    meter = _Meter()
    for groups in (sample[:1], sample):  # the first pass also brings in weights and kernels
        engine.train_groups, engine.args.per_device_train_batch_size = groups, len(groups)
        _begin(engine, meter)
    return Measured(tokens, meter.seconds, meter.resident, meter.peak)


def _reset_peak() -> bool:
    """Start measuring the peak of memory; whether that can be done."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(field: str, on_cuda: Callable[[], int]) -> int:
    """Bytes allocated on the GPU, else a field of the Linux kernel's account of this process."""
    if torch.cuda.is_available():
        return on_cuda()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
