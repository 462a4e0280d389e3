"""`arabic-qwen plan CONFIG`: memory, speed and time of a run on this machine and on others, before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.compilation import compilable, pays
from arabic_qwen.models.memory import Memory, ModelShape, model_shape, step_memory
from arabic_qwen.models.precision import check_fp8, check_fp8_on, compute_dtype, device, quantization
from arabic_qwen.models.sources import locate_configuration
from arabic_qwen.plan_data import Mix, mix_of
from arabic_qwen.training.arguments import check_packages
from arabic_qwen.training.fitting import PROCESSOR_BUDGET, USABLE, Fit, choose
from arabic_qwen.training.objectives import METHODS

_CONTEXT = 0.5e9  # bytes that CUDA takes for itself
_LENGTHS = ("max_length", "max_seq_length")  # the first that is set limits an example


class Gpu(NamedTuple):
    """What a GPU has, by its data sheet; `share`: of its products' peak that training reaches."""

    memory: float  # bytes
    peak: float  # dense bfloat16 operations a second, summed in float32
    share: float
    capability: tuple[int, int]  # CUDA's compute capability


# Measured: the H100, compiled, DPO at 15,696 useful tokens/s on the 7B shape (510e12 operations a second by `_operations`).
# The others are assumed: the fewer operations a byte of bandwidth, the larger the share.
GPUS = {
    "RTX 3060": Gpu(12.6e9, 25e12, 0.6, (8, 6)),
    "RTX 3090": Gpu(25.3e9, 71e12, 0.6, (8, 6)),
    "RTX 4090": Gpu(25.3e9, 165e12, 0.55, (8, 9)),
    "L4": Gpu(23.7e9, 60e12, 0.5, (8, 9)),
    "A10": Gpu(23.7e9, 62e12, 0.55, (8, 6)),
    "L40S": Gpu(47.7e9, 181e12, 0.55, (8, 9)),
    "A100 40GB": Gpu(42.3e9, 312e12, 0.55, (8, 0)),
    "A100 80GB": Gpu(85.1e9, 312e12, 0.55, (8, 0)),
    "H100 80GB": Gpu(85.0e9, 989e12, 0.51, (9, 0)),
    "H200": Gpu(150.1e9, 989e12, 0.51, (9, 0)),
}
SHOWN = ("RTX 3060", "RTX 4090", "A100 80GB", "H100 80GB")
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
    fit: Fit
    parts: Memory
    refusal: str  # why `train` would not start there, whatever the memory; or ""
    tokens_per_s: float | None = None
    seconds: float | None = None  # of the run, or of a million tokens
    changes: list[Change] = dataclasses.field(default_factory=list)  # that make it fit

    @property
    def fits(self) -> bool:
        return not self.refusal and self.parts.total <= _limit(self.memory)


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
        ModelLoadError: the model's config.json cannot be found, or it cannot be trained.
    """
    names = [_known(name) for name in gpus] or list(SHOWN)
    path = locate_configuration(config.model_name)
    model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    mix = mix_of(config)
    shapes = functools.cache(
        lambda r, use_lora, optim, dtype: model_shape(
            model_config, config.model_copy(update={"lora_r": r, "use_lora": use_lora, "optim": optim}), dtype
        )
    )
    run = _Run(config, mix, shapes)
    devices = [run.estimate(*_here(), _message(_check_here, config))]
    devices += [run.estimate(name, GPUS[name], _message(_check_on, config, GPUS[name])) for name in names]
    return Plan(config.model_name, _has_weights(path), run.shape, mix, devices)


def _has_weights(path: str) -> bool:
    if Path(path).is_dir():
        return any(Path(path).glob("*.safetensors"))
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(path, name), str) for name in names)


def _known(name: str) -> str:
    wanted = name.lower().replace(" ", "")
    found = [known for known in GPUS if wanted and wanted in known.lower().replace(" ", "")]
    if not found:
        close = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(GPUS)}"
        raise ConfigurationError(f"--gpu: {name!r} is unknown; {hint}")
    return found[-1]


def _here() -> tuple[str, Gpu]:
    """This machine; a GPU that is not in the table has no known speed."""
    if not torch.cuda.is_available():
        return "this processor", Gpu(psutil.virtual_memory().total, 0.0, 0.0, (0, 0))
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    known = gpu_named(name) or Gpu(0.0, 0.0, 0.0, (0, 0))
    return f"this {name.removeprefix('NVIDIA ')}", known._replace(memory=memory)


def gpu_named(name: str) -> Gpu | None:
    """The GPU that a driver calls so, as "NVIDIA H100 80GB HBM3"."""
    found = [gpu for known, gpu in GPUS.items() if known.split(" ")[-2 if "GB" in known else -1] in name]
    return found[-1] if found else None


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
    if config.base_precision == "fp8":
        check_fp8_on(gpu.capability, _dtype(config))


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
        return self.shapes(self.config.lora_r, self.config.use_lora, self.config.optim, dtype)

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
    def tokens(self) -> float | None:
        """Of the whole run, in the stream; None where the data was not read."""
        return self.mix.steps and self.mix.steps * self.mix.examples_a_step * self.mix.tokens

    @property
    def compiled(self) -> bool:
        return pays(self.config, self.shape.parameters, self.tokens or math.inf)

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
        layers, on_gpu = self.shape.layers, _is_gpu(gpu)
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

    def estimate(self, name: str, gpu: Gpu, refusal: str) -> Estimate:
        found = Estimate(name, gpu.memory, *self.fit(gpu), refusal)
        if found.fits:
            found.tokens_per_s = speed = self._tokens_per_s(gpu, found.fit.recomputed)
            found.seconds = (self.tokens or 1e6) / speed if speed else None
        elif not refusal:
            found.changes = self._changes(gpu)
        return found

    def _tokens_per_s(self, gpu: Gpu, recomputed: int) -> float | None:
        """Tokens of the stream a second, as the log counts them."""
        if not gpu.peak or _dtype(self.config).itemsize != 2 or self.shape.parameters < _SMALLEST:
            return None
        rate = gpu.peak * gpu.share
        rate *= _FP8 if self.config.base_precision == "fp8" else 1.0
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
        chosen: list[dict[str, Any]] = []
        for remedy in _remedies(self.config, _is_gpu(gpu)):
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
            if not update.keys().isdisjoint(_LENGTHS):
                mix = mix._replace(longest=max(mix.longest // 2, 1))
        return _Run(config, mix, self.shapes)

    @property
    def is_valid(self) -> bool:
        return not _message(lambda: type(self.config)(**self.config.model_dump()))

    def fits(self, gpu: Gpu) -> bool:
        return self.fit(gpu)[1].total <= _limit(gpu.memory)

    def least(self, gpu: Gpu) -> float:
        """Bytes with the smallest micro-batch that the settings allow, and as much recomputed."""
        if not _is_gpu(gpu):
            return self.fit(gpu)[1].total
        recomputed = self.shape.layers if self.config.gradient_checkpointing else 0
        return self.memory(max(self.config.token_budget or 0, self.mix.longest), recomputed).total


def _is_gpu(gpu: Gpu) -> bool:
    return gpu.peak > 0 or torch.cuda.is_available()  # one that is not in the table has no known speed


def _setting(update: dict[str, Any]) -> str:
    """As `key=value` on the command line."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in update.items())


def _remedies(config: BaseConfig, on_gpu: bool) -> list[dict[str, Any]]:
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
    if config.lora_r > 8:
        found.append({"lora_r": 8})
    if not config.load_in_8bit:
        found.append({"load_in_4bit": True} | ({"base_precision": None} if config.base_precision else {}))
    length = next(key for key in _LENGTHS if getattr(config, key, None))
    found.append({length: getattr(config, length) // 2})
    return found
