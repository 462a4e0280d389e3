"""`arabic-qwen plan CONFIG`: memory, speed and time of a run on this machine and on others, before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import AutoConfig

from arabic_qwen.config import BaseConfig
from arabic_qwen.config.data import data_sources
from arabic_qwen.data.packing import Group
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import ConfigurationError, DatasetError, ModelLoadError
from arabic_qwen.models.memory import Memory, ModelShape, model_shape, step_memory
from arabic_qwen.models.precision import compute_dtype
from arabic_qwen.models.sources import locate_configuration
from arabic_qwen.training.base_trainer import BaseTrainer
from arabic_qwen.training.fitting import PROCESSOR_BUDGET, USABLE, Fit, choose
from arabic_qwen.training.objectives import METHODS
from arabic_qwen.training.sampler import Sequences

_CONTEXT = 0.5e9  # bytes that CUDA takes for itself
_PROCESSOR = "this processor"
_SAMPLE = 1000  # rows whose lengths are measured
_READ_AT_ONCE = 20e6  # bytes of data files that take no noticeable time


class Gpu(NamedTuple):
    """What a GPU has, by its data sheet; `share`: of its products' peak that training reaches."""

    memory: float  # bytes
    peak: float  # dense bfloat16 operations a second, summed in float32
    share: float
    fp8: bool


# Measured: the H100, compiled, DPO at 15,696 useful tokens/s on the 7B shape (510e12 operations a second by `_operations`).
# The others are assumed: the fewer operations a byte of bandwidth, the larger the share.
GPUS = {
    "RTX 3060": Gpu(12.6e9, 25e12, 0.6, False),
    "RTX 3090": Gpu(25.3e9, 71e12, 0.6, False),
    "RTX 4090": Gpu(25.3e9, 165e12, 0.55, True),
    "L4": Gpu(23.7e9, 60e12, 0.5, True),
    "A10": Gpu(23.7e9, 62e12, 0.55, False),
    "L40S": Gpu(47.7e9, 181e12, 0.55, True),
    "A100 40GB": Gpu(42.3e9, 312e12, 0.55, False),
    "A100 80GB": Gpu(85.1e9, 312e12, 0.55, False),
    "H100 80GB": Gpu(85.0e9, 989e12, 0.51, True),
    "H200": Gpu(150.1e9, 989e12, 0.51, True),
}
SHOWN = ("RTX 3060", "RTX 4090", "A100 80GB", "H100 80GB")
_FP8 = 1.26  # times as fast; measured on an H100, DPO and SFT
_NF4 = 0.8  # assumed: weights are expanded in each product
_NOT_COMPILED = 0.65  # assumed: each operation reads and writes the activations


class Mix(NamedTuple):
    """What the examples are like: measured on the data, or assumed."""

    tokens: float  # of an example in the stream, where its prompt counts once
    targets: float
    pairs: float  # of a query and a key that it sees
    longest: int  # tokens of the longest example
    steps: int | None = None  # of the run; None: the data was not read
    examples_a_step: float = 1.0
    note: str = ""


class Change(NamedTuple):
    """A setting that takes less memory, on top of those before it."""

    setting: str
    saved: float  # bytes
    least: float  # bytes that are still needed, with the smallest micro-batch
    fits: bool


@dataclasses.dataclass
class Estimate:
    """A run on one device; times are None where the device's speed is unknown."""

    name: str
    memory: float  # bytes that it has
    fit: Fit
    parts: Memory
    tokens_per_s: float | None
    seconds: float | None  # of the run, or of a million tokens
    changes: list[Change]  # that make it fit

    @property
    def fits(self) -> bool:
        return self.parts.total <= _limit(self.memory)


@dataclasses.dataclass
class Plan:
    """What `arabic-qwen plan` shows."""

    model: str
    shape: ModelShape
    mix: Mix
    devices: list[Estimate]


def plan(config: BaseConfig, gpus: Sequence[str] = ()) -> Plan:
    """Estimate a run on this machine and on `gpus` (names as in :data:`GPUS`; none: a choice).

    Raises:
        ConfigurationError: a GPU is unknown, or `lora_target_modules` names layers that the model lacks.
        ModelLoadError: the model's config.json cannot be found, or it cannot be trained.
    """
    names = [_known(name) for name in gpus] or list(SHOWN)
    path = locate_configuration(config.model_name)
    model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    mix = _mix(config)
    shapes = functools.cache(
        lambda r, use_lora, dtype: model_shape(
            model_config, config.model_copy(update={"lora_r": r, "use_lora": use_lora}), dtype
        )
    )
    run = _Run(config, mix, shapes)
    devices = [run.estimate(name, gpu) for name, gpu in [_here(), *((name, GPUS[name]) for name in names)]]
    return Plan(config.model_name, run.shape, mix, devices)


def _known(name: str) -> str:
    found = [known for known in GPUS if name.lower().replace(" ", "") in known.lower().replace(" ", "")]
    if not found:
        close = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(GPUS)}"
        raise ConfigurationError(f"--gpu: {name!r} is unknown; {hint}")
    return found[-1]


def _here() -> tuple[str, Gpu]:
    """This machine; a GPU that is not in the table has no known speed."""
    if not torch.cuda.is_available():
        return _PROCESSOR, Gpu(psutil.virtual_memory().total, 0.0, 0.0, False)
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    like = [gpu for known, gpu in GPUS.items() if known.split(" ")[-2 if "GB" in known else -1] in name]
    known = like[-1] if like else Gpu(0.0, 0.0, 0.0, False)
    return f"this {name.removeprefix('NVIDIA ')}", known._replace(memory=memory)


def _limit(memory: float) -> float:
    return USABLE * (memory - _CONTEXT)


def _dtype(config: BaseConfig) -> torch.dtype:
    """Of computation on a GPU that has bfloat16."""
    if config.fp16:
        return torch.float16
    return torch.bfloat16 if config.bf16 or config.torch_dtype == "auto" else getattr(torch, config.torch_dtype)


class _Run:
    """One configuration on several devices."""

    def __init__(self, config: BaseConfig, mix: Mix, shapes: Any):
        self.config = config
        self.mix = mix
        self.shapes = shapes

    def shape_in(self, dtype: torch.dtype) -> ModelShape:
        return self.shapes(self.config.lora_r, self.config.use_lora, dtype)

    @property
    def shape(self) -> ModelShape:
        return self.shape_in(_dtype(self.config))

    @property
    def objective(self) -> Any:
        return METHODS[self.config.method].objective(self.config)

    @property
    def has_second_model(self) -> bool:
        config: Any = self.config
        if not self.objective.needs_reference or config.precompute_reference:
            return False
        return not config.use_lora or bool(config.ref_model_name) or config.lora_bias != "none"

    @property
    def compiled(self) -> bool:
        return bool(getattr(self.config, "torch_compile", False))

    def memory(self, tokens: int, recomputed: int, on_gpu: bool = True) -> Memory:
        dtype = _dtype(self.config)
        if not on_gpu:
            try:
                dtype = compute_dtype(self.config)
            except ConfigurationError:  # it is meant for a GPU
                dtype = torch.float32
        return step_memory(
            self.shape_in(dtype),
            self.config,
            dtype,
            tokens=tokens,
            targets=math.ceil(tokens * self.mix.targets / self.mix.tokens),
            recomputed=recomputed,
            second_model=self.has_second_model,
            compiled=self.compiled and on_gpu,
        )

    def fit(self, gpu: Gpu) -> tuple[Fit, Memory]:
        """What would be chosen there, and the memory that it takes."""
        layers, on_gpu = self.shape.layers, gpu.peak > 0 or torch.cuda.is_available()
        wanted = self.config.gradient_checkpointing
        if not on_gpu:
            budget, recomputed = self.config.token_budget or PROCESSOR_BUDGET, layers if wanted is True else 0
            parts = self.memory(max(budget, self.mix.longest), recomputed, on_gpu)
            return Fit(budget, recomputed, parts.total), parts
        fit = choose(
            lambda tokens, kept: self.memory(tokens, layers - kept).total,
            layers=layers,
            limit=_limit(gpu.memory),
            longest=self.mix.longest,
            token_budget=self.config.token_budget,
            recomputed=None if wanted == "auto" else layers if wanted else 0,
        )
        return fit, self.memory(max(fit.token_budget, self.mix.longest), fit.recomputed)

    def estimate(self, name: str, gpu: Gpu) -> Estimate:
        fit, parts = self.fit(gpu)
        speed = self._tokens_per_s(gpu, fit.recomputed)
        tokens = 1e6
        if self.mix.steps is not None:
            tokens = self.mix.steps * self.mix.examples_a_step * self.mix.tokens
        seconds = tokens / speed if speed else None
        found = Estimate(name, gpu.memory, fit, parts, speed, seconds, [])
        found.changes = [] if found.fits or name == _PROCESSOR else self._changes(gpu)
        return found

    def _tokens_per_s(self, gpu: Gpu, recomputed: int) -> float | None:
        """Tokens of the stream a second, as the log counts them."""
        if not gpu.peak or _dtype(self.config).itemsize != 2:
            return None
        rate = gpu.peak * gpu.share
        if getattr(self.config, "base_precision", None) == "fp8":
            if not gpu.fp8:
                return None
            rate *= _FP8
        rate *= 1.0 if self.compiled else _NOT_COMPILED
        rate *= _NF4 if self.config.load_in_4bit or self.config.load_in_8bit else 1.0
        return rate * self.mix.tokens / self._operations(recomputed)

    def _operations(self, recomputed: int) -> float:
        """Multiplications and additions that an example takes, 2 for each weight that a token meets."""
        shape, mix, config, objective = self.shape, self.mix, self.config, self.objective
        layers = 2 * (shape.linear + shape.adapters) * mix.tokens
        attention = 4 * shape.attention * mix.pairs * shape.layers
        forward = layers + attention
        backward = layers * (1 if config.use_lora else 2) + 2.5 * attention
        reference = objective.needs_reference and not getattr(config, "precompute_reference", False)
        # KTO scores a completion of another prompt as well, by both models.
        more = reference * (1 + objective.needs_kl) + objective.needs_kl + objective.whole_step
        heads = 2 + more + (0 if config.use_lora else 2)  # logits, and their gradients
        head = 2 * shape.vocabulary * shape.hidden * mix.targets * heads
        return forward * (1 + more + recomputed / shape.layers) + backward + head

    def _changes(self, gpu: Gpu) -> list[Change]:
        """What to change until it fits, the cheapest first, each on top of those before."""
        run, changes = self, list[Change]()
        for setting, update in _remedies(self.config):
            mix = run.mix
            if "max_seq_length" in update:
                mix = mix._replace(longest=max(mix.longest // 2, 1))
            changed = _Run(run.config.model_copy(update=update), mix, self.shapes)
            if changed.least > 0.95 * run.least:
                continue
            fits = changed.fit(gpu)[1].total <= _limit(gpu.memory)
            changes.append(Change(setting, run.least - changed.least, changed.least, fits))
            run = changed
            if fits:
                break
        return changes

    @property
    def least(self) -> float:
        """Bytes with the smallest micro-batch, and as much recomputed as the settings allow."""
        recomputed = self.shape.layers if self.config.gradient_checkpointing else 0
        return self.memory(max(self.config.token_budget or 0, self.mix.longest), recomputed).total


def _remedies(config: BaseConfig) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    if not config.gradient_checkpointing:
        found.append(("gradient_checkpointing=auto", {"gradient_checkpointing": "auto"}))
    if config.token_budget:
        found.append(("token_budget=null", {"token_budget": None}))
    if not config.use_lora and getattr(config, "optim", "") == "adamw":
        found.append(("optim=adamw_8bit", {"optim": "adamw_8bit"}))
    if getattr(config, "precompute_reference", None) is False and not config.streaming:
        found.append(("precompute_reference=true", {"precompute_reference": True}))
    if not config.use_lora:
        found.append(("use_lora=true", {"use_lora": True}))
    if config.lora_r > 8:
        found.append(("lora_r=8", {"lora_r": 8}))
    if not (config.load_in_4bit or config.load_in_8bit) and config.init_lora_weights in ("default", "gaussian"):
        plain = {"base_precision": None} if hasattr(config, "base_precision") else {}
        found.append(("load_in_4bit=true", {"load_in_4bit": True, **plain}))
    length = config.max_seq_length // 2
    found.append((f"max_seq_length={length}", {"max_seq_length": length}))
    return found


# ---------------------------------------------------------------- the data


def _mix(config: BaseConfig) -> Mix:
    """What the training data is like; assumed where reading it would take long, or cannot be done yet."""
    try:
        if not _is_small(config):
            raise DatasetError("large, or on the hub")
        return _measured_mix(config)
    except (DatasetError, ModelLoadError) as error:
        reason = str(error).splitlines()[0]
    completions = 1 if config.method in ("sft", "kto") else 2
    limit = getattr(config, "max_length", None) or config.max_seq_length
    prompt, answer = min(250, limit // 2), min(305, limit // 2)
    return Mix(
        tokens=prompt + completions * answer,
        targets=completions * answer,
        pairs=prompt**2 / 2 + completions * answer * (prompt + answer / 2),
        longest=completions * limit,
        note=f"not read ({reason}): assuming prompts of {prompt} tokens, answers of {answer}, examples of up to "
        f"{completions * limit:,}",
    )


def _is_small(config: BaseConfig) -> bool:
    """Whether the data is here and read at once; a file that is missing is left to those who read it."""
    paths = [source.path for source in data_sources(config.dataset_path) if not source.path.startswith("sample:")]
    size = 0
    for path in (Path(path).expanduser() for path in paths):
        if not path.exists() and not path.suffix:  # a hub id
            return False
        files = path.rglob("*") if path.is_dir() else [path]
        size += sum(file.stat().st_size for file in files if file.is_file())
    return size <= _READ_AT_ONCE


def _measured_mix(config: BaseConfig) -> Mix:
    logging.disable(logging.WARNING)  # what is said there is for training
    try:
        return _mix_of(config)
    finally:
        logging.disable(logging.NOTSET)


def _mix_of(config: BaseConfig) -> Mix:
    rows = sum(1 for _ in read_rows(config, config.dataset_path))
    with tempfile.TemporaryDirectory() as elsewhere:
        update = {"max_samples": min(rows, _SAMPLE), "output_dir": elsewhere, "streaming": False}
        try:
            dataset = BaseTrainer(config.model_copy(update=update)).get_data_loader().load()["train"]
        except DatasetError as error:
            raise DatasetError(str(error).partition("; listed in ")[0]) from None
    groups: Sequence[Group] = dataset.groups
    more = max(rows / _SAMPLE, 1.0)
    capacity = config.max_seq_length if getattr(config, "packing", False) else None
    sequences = max(round(len(Sequences(groups, capacity)) * more), 1)
    an_epoch = math.ceil(math.ceil(sequences / config.per_device_train_batch_size) / config.gradient_accumulation_steps)
    pairs = [
        len(g.prompt) ** 2 / 2 + sum(len(c.ids) * (len(g.prompt) + len(c.ids) / 2) for c in g.completions)
        for g in groups
    ]
    tokens = float(np.mean([group.num_tokens for group in groups]))
    return Mix(
        tokens=tokens,
        targets=float(np.mean([sum(int(c.targets.sum()) for c in group.completions) for group in groups])),
        pairs=float(np.mean(pairs)),
        longest=max(group.num_tokens for group in groups),
        steps=config.max_steps or math.ceil(config.num_train_epochs * an_epoch),
        examples_a_step=len(groups) * more / an_epoch,
        note=f"{round(len(groups) * more):,} examples to train on, of {tokens:,.0f} tokens on average"
        + (f" (measured on {_SAMPLE:,} rows)" if more > 1 else ""),
    )
