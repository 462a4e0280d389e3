"""`arabic-qwen plan CONFIG`: memory, speed and time of a run on this machine and on others, before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig
from transformers import AutoConfig

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.attention import flash_runs_on
from arabic_qwen.models.compilation import compilable, pays
from arabic_qwen.models.memory import Memory, ModelShape, frozen_bytes, model_shape, step_memory
from arabic_qwen.models.precision import (
    check_fp8,
    check_fp8_on,
    compute_dtype,
    device,
    device_has_bf16,
    dtype_on,
    quantization,
)
from arabic_qwen.models.scoring import check_attention
from arabic_qwen.models.sources import is_adapter, locate_configuration, locate_model
from arabic_qwen.plan_data import Mix, mix_of
from arabic_qwen.plan_gpus import GPUS, SHOWN, Gpu, known, this_device
from arabic_qwen.training.arguments import check_packages
from arabic_qwen.training.fitting import PROCESSOR_BUDGET, Fit, choose
from arabic_qwen.training.objectives import METHODS

_SHORTEST = 256  # tokens that are advised as the longest
_LENGTHS = ("max_length", "max_seq_length")  # the first that is set limits an example


_FP8 = 1.26  # times as fast; measured on an H100, DPO and SFT
_SMALLEST = 1e8  # parameters: the time of smaller models is not that of their products
_NF4 = 0.8  # assumed: weights are expanded in each product
_NOT_COMPILED = 0.65  # assumed: each operation reads and writes the activations


class Change(NamedTuple):
    """A setting that takes less memory, on top of those before it."""

    setting: str
    saved: float  # bytes
    least: float  # bytes that are still needed, with the smallest micro-batch
    fits: bool


@dataclasses.dataclass
class Estimate:
    """A run on one device; times are None where it does not fit, or its speed is unknown."""

    name: str
    memory: float  # bytes that it has
    limit: float  # bytes of these that a run may take
    fit: Fit
    parts: Memory
    refusal: str  # why `train` would not start there, whatever the memory; or ""
    tokens_per_s: float | None = None
    seconds: float | None = None  # of the run's steps, or of a million tokens
    changes: list[Change] = dataclasses.field(default_factory=list)  # that make it fit

    @property
    def fits(self) -> bool:
        return not self.refusal and self.parts.total <= self.limit


@dataclasses.dataclass
class Plan:
    """What `arabic-qwen plan` shows."""

    model: str
    has_weights: bool  # on this machine
    shape: ModelShape
    mix: Mix
    devices: list[Estimate]


def plan(config: BaseConfig, gpus: Sequence[str] = ()) -> Plan:
    """Estimate a run on this machine and on `gpus` (names as in :data:`GPUS`; none: a choice).

    Raises:
        ConfigurationError: a GPU is unknown, or `lora_target_modules` names layers that the model lacks.
        ModelLoadError: the config.json of the model or of its reference cannot be found, or it cannot be trained.
    """
    names = [known(name) for name in gpus] or list(SHOWN)
    path, model_config = _configuration_of(config.model_name)
    mix = mix_of(config)
    config = _with_own_adapter(config)
    other = getattr(config, "ref_model_name", None)
    frozen = config.model_copy(update={"use_lora": False})
    reference = model_shape(_configuration_of(other)[1], frozen, torch.float32) if other else None
    shapes = functools.cache(
        lambda r, use_lora, optim, dtype: model_shape(
            model_config, config.model_copy(update={"lora_r": r, "use_lora": use_lora, "optim": optim}), dtype
        )
    )
    run = _Run(config, mix, shapes, reference)
    name, here = this_device()
    devices = [run.estimate(name, here, _message(_check_here, config))]
    devices += [run.estimate(name, GPUS[name], _message(_check_on, config, GPUS[name])) for name in names]
    return Plan(config.model_name, _has_weights(path), run.shape_on(GPUS[names[0]]), mix, devices)


def _configuration_of(name: str) -> tuple[str, Any]:
    """Where a model's config.json is, and what it holds."""
    path = locate_configuration(name)
    model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_attention(name, model_config)
    return path, model_config


def _with_own_adapter(config: BaseConfig) -> BaseConfig:
    """With the adapter's settings where `model_name` has one, which training goes on with."""
    if not is_adapter(config.model_name):
        return config
    own = LoraConfig.from_pretrained(locate_model(config.model_name))
    targets = own.target_modules  # a pattern, or names, which may be whole paths
    targets = targets if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})
    update = {"lora_r": own.r, "lora_target_modules": targets, "lora_dropout": own.lora_dropout}
    return config.model_copy(update=update | {"use_dora": own.use_dora, "lora_bias": own.bias})


def _has_weights(path: str) -> bool:
    if Path(path).is_dir():
        return any(Path(path).glob("*.safetensors"))
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(path, name), str) for name in names)


def _message(check: Callable[..., object], *args: Any) -> str:
    """Of the ConfigurationError that `check` raises, or ""."""
    try:
        check(*args)
    except ConfigurationError as error:
        return str(error)
    return ""


def _check_here(config: BaseConfig) -> None:
    """What training would say to this machine, before it has loaded anything."""
    compute_dtype(config)
    quantization(config)
    check_fp8(config)
    check_packages(config)
    compilable(config, device())


def _check_on(config: BaseConfig, gpu: Gpu) -> None:
    """The same of a GPU that is not here."""
    dtype, _ = dtype_on(config, True, _has_bf16(gpu))
    if config.base_precision == "fp8":
        check_fp8_on(gpu.capability, dtype)
    if not _flash_runs(config, gpu):
        compilable(config.model_copy(update={"use_flash_attention": False}), torch.device("cpu"))


def _has_bf16(gpu: Gpu) -> bool:
    return gpu.capability >= (8, 0) if gpu.is_gpu else device_has_bf16()


def _dtype(config: BaseConfig, gpu: Gpu) -> torch.dtype:
    """Of computation there; where training would refuse, what is likely meant."""
    try:
        return dtype_on(config, gpu.is_gpu, _has_bf16(gpu))[0]
    except ConfigurationError:
        return torch.bfloat16 if gpu.is_gpu else torch.float32


def _flash_runs(config: BaseConfig, gpu: Gpu) -> bool:
    return config.use_flash_attention and flash_runs_on(gpu.capability, _dtype(config, gpu))


class _Run:
    """One configuration on several devices."""

    def __init__(self, config: BaseConfig, mix: Mix, shapes: Any, reference: ModelShape | None):
        self.config = config
        self.mix = mix
        self.shapes = shapes
        self.reference = reference  # another model, by `ref_model_name`

    def shape_on(self, gpu: Gpu) -> ModelShape:
        config = self.config
        return self.shapes(config.lora_r, config.use_lora, config.optim, _dtype(config, gpu))

    @property
    def objective(self) -> Any:
        return METHODS[self.config.method].objective(self.config)

    def reference_bytes(self, gpu: Gpu) -> float:
        """Of a reference that is in memory beside the policy; 0 where the policy without its adapters is the reference."""
        config: Any = self.config
        if not self.objective.needs_reference or config.precompute_reference:
            return 0.0
        shape = self.reference or self.shape_on(gpu)
        if not self.reference and not config.use_lora:
            return 4.0 * shape.parameters  # loaded as the policy is
        second = self.reference or config.lora_bias != "none"
        return frozen_bytes(shape, config, _dtype(config, gpu)) if second else 0.0

    @property
    def tokens(self) -> float | None:
        """Of the whole run, in the stream; None where the data was not read."""
        return self.mix.steps and self.mix.steps * self.mix.examples_a_step * self.mix.tokens

    def compiled(self, gpu: Gpu) -> bool:
        parameters = self.shape_on(gpu).parameters
        return _flash_runs(self.config, gpu) and pays(self.config, parameters, self.tokens or math.inf)

    def memory(self, gpu: Gpu, tokens: int, recomputed: int) -> Memory:
        return step_memory(
            self.shape_on(gpu),
            self.config,
            _dtype(self.config, gpu),
            tokens=tokens,
            targets=math.ceil(tokens * self.mix.targets / self.mix.tokens),
            gathered=math.ceil(tokens * self.mix.gathered / self.mix.tokens),
            recomputed=recomputed,
            reference=self.reference_bytes(gpu),
            compiled=self.compiled(gpu),
            on_gpu=gpu.is_gpu,
        )

    def fit(self, gpu: Gpu) -> tuple[Fit, Memory]:
        """What would be chosen there, and the memory that it takes."""
        layers, wanted = self.shape_on(gpu).layers, self.config.gradient_checkpointing
        if gpu.is_gpu:
            fit = choose(
                lambda tokens, kept: self.memory(gpu, tokens, layers - kept).total,
                layers=layers,
                limit=gpu.limit,
                longest=self.mix.longest,
                token_budget=self.config.token_budget,
                recomputed=None if wanted == "auto" else layers if wanted else 0,
            )
        else:
            fit = Fit(self.config.token_budget or PROCESSOR_BUDGET, layers if wanted is True else 0, 0.0)
        parts = self.memory(gpu, max(fit.token_budget, self.mix.longest), fit.recomputed)
        return fit._replace(peak=parts.total), parts

    def estimate(self, name: str, gpu: Gpu, refusal: str) -> Estimate:
        found = Estimate(name, gpu.memory, gpu.limit, *self.fit(gpu), refusal)
        rate = self._rate(gpu)
        if found.fits and rate:
            step, before = self._operations(self.shape_on(gpu), found.fit.recomputed)
            found.tokens_per_s = rate * self.mix.tokens / step
            found.seconds = (self.tokens or 1e6) / self.mix.tokens * (step + before) / rate
        elif not found.fits and not refusal:
            found.changes = self._changes(gpu)
        return found

    def _rate(self, gpu: Gpu) -> float:
        """Operations a second; 0: not known."""
        if _dtype(self.config, gpu).itemsize != 2 or self.shape_on(gpu).parameters < _SMALLEST:
            return 0.0
        rate = gpu.peak * gpu.share
        rate *= _FP8 if self.config.base_precision == "fp8" else 1.0
        rate *= 1.0 if self.compiled(gpu) else _NOT_COMPILED
        return rate * (_NF4 if self.config.load_in_4bit or self.config.load_in_8bit else 1.0)

    def _operations(self, shape: ModelShape, recomputed: int) -> tuple[float, float]:
        """Multiplications and additions that an example takes in a step, and its share of a pass before training."""
        mix, objective, use_lora = self.mix, self.objective, self.config.use_lora
        layers, attention, head = _forward(shape, mix)
        forward = layers + attention
        # KTO scores a completion of another prompt as well, by both models.
        more = objective.needs_kl + objective.whole_step
        backward = layers * (1 if use_lora else 2) + 2.5 * attention + head * (1 if use_lora else 3)
        step = (forward + head) * (1 + more) + forward * recomputed / shape.layers + backward
        if not objective.needs_reference:
            return step, 0.0
        reference = sum(_forward(self.reference or shape, mix)) * (1 + objective.needs_kl)
        precomputed = getattr(self.config, "precompute_reference", False)
        return (step, reference / mix.epochs) if precomputed else (step + reference, 0.0)

    def _changes(self, gpu: Gpu) -> list[Change]:
        """What to change until it fits, the cheapest first, each on top of those before."""
        chosen: list[dict[str, Any]] = []
        for remedy in _remedies(self.config, self.mix, gpu.is_gpu):
            run, changed = self._with(chosen), self._with([*chosen, remedy])
            if not changed.is_valid or changed.least(gpu) > 0.95 * run.least(gpu):
                continue
            chosen.append(remedy)
            if changed.fits(gpu):
                break
        with_all = self._with(chosen)
        for remedy in chosen[-2::-1]:  # what a later one has made needless
            rest = [other for other in chosen if other is not remedy]
            without = self._with(rest)
            suffices = without.fits(gpu) if with_all.fits(gpu) else without.least(gpu) < with_all.least(gpu) / 0.95
            if suffices and without.is_valid:
                chosen = rest
        changes, before = list[Change](), self.least(gpu)
        for number, remedy in enumerate(chosen, 1):
            changed = self._with(chosen[:number])
            least = changed.least(gpu)
            changes.append(Change(_setting(remedy), before - least, least, changed.fits(gpu)))
            before = least
        return changes

    def _with(self, remedies: Sequence[dict[str, Any]]) -> _Run:
        config, mix = self.config, self.mix
        for update in remedies:
            config = config.model_copy(update=update)
            for key in update.keys() & set(_LENGTHS):
                mix = mix._replace(longest=min(mix.longest, mix.completions * update[key]))
        return _Run(config, mix, self.shapes, self.reference)

    @property
    def is_valid(self) -> bool:
        values = self.config.model_dump(exclude={"lora_target_modules"})  # an adapter's own may be a pattern
        return not _message(lambda: type(self.config)(**values))

    def fits(self, gpu: Gpu) -> bool:
        return self.fit(gpu)[1].total <= gpu.limit

    def least(self, gpu: Gpu) -> float:
        """Bytes with the smallest micro-batch that the settings allow, and as much recomputed."""
        if not gpu.is_gpu:
            return self.fit(gpu)[1].total
        recomputed = self.shape_on(gpu).layers if self.config.gradient_checkpointing else 0
        return self.memory(gpu, max(self.config.token_budget or 0, self.mix.longest), recomputed).total


def _forward(shape: ModelShape, mix: Mix) -> tuple[float, float, float]:
    """Operations of a forward pass over an example, 2 for each weight that a token meets: layers, attention, logits."""
    layers = 2 * (shape.linear + shape.adapters) * mix.tokens
    attention = 4 * shape.attention * mix.pairs * shape.layers
    return layers, attention, 2 * shape.vocabulary * shape.hidden * mix.targets


def _setting(update: dict[str, Any]) -> str:
    """As `key=value` on the command line."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in update.items())


def _remedies(config: BaseConfig, mix: Mix, on_gpu: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not on_gpu and config.gradient_checkpointing is not True:
        found.append({"gradient_checkpointing": True})  # auto recomputes nothing there
    elif not config.gradient_checkpointing:
        found.append({"gradient_checkpointing": "auto"})
    if config.token_budget:
        found.append({"token_budget": None})
    if on_gpu and not config.use_lora and config.optim == "adamw":
        found.append({"optim": "adamw_8bit"})
    if getattr(config, "precompute_reference", None) is False:
        found.append({"precompute_reference": True})
    if not config.use_lora:
        found.append({"use_lora": True})
    if config.lora_r > 8 and not is_adapter(config.model_name):
        found.append({"lora_r": 8})
    if not config.load_in_8bit:
        found.append({"load_in_4bit": True} | ({"base_precision": None} if config.base_precision else {}))
    length = next(key for key in _LENGTHS if getattr(config, key, None))
    limit = min(getattr(config, length), math.ceil(mix.longest / mix.completions))
    exponents = range((limit - 1).bit_length() - 1, _SHORTEST.bit_length() - 2, -1)
    return [*found, *({length: 2**exponent} for exponent in exponents)]
