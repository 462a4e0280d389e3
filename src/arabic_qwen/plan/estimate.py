"""What a run takes on each device, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig
from transformers import AutoConfig

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError, ModelLoadError, one_line
from arabic_qwen.memory.fit import PROCESSOR_BUDGET, Fit, busy_budget, choose
from arabic_qwen.memory.gpus import GPUS, SHOWN, Gpu, known, this_device
from arabic_qwen.memory.model import Memory, ModelShape, frozen_bytes, model_shape, step_memory
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.models.compilation import pays
from arabic_qwen.models.scoring import check_attention
from arabic_qwen.models.sources import is_adapter, locate_configuration, locate_model
from arabic_qwen.plan.advice import faster, remedies, setting
from arabic_qwen.plan.checks import check_here, check_on, dtype_there, flash_there, message
from arabic_qwen.plan.data import LengthMix, length_mix

# Three parts of a step's time, which on an H100 give what was measured of a 7B in five methods and at 512 to 32,768 tokens,
# and of a 0.5B in two methods, within 5 %.
_PRODUCTS = 0.81  # of the data sheet's peak that matrix products reach
_ATTENTION = {True: 0.35, False: 0.6}  # that attention reaches on Hopper and newer; on others assumed
# Bytes read and written in a pass, for each that layers keep (not compiled, no dropout) for their backward pass, which is
# two passes. What dropout adds is less than measurements differ by.
_TRAFFIC = 3.9
_NOT_COMPILED = 2.2  # times as many bytes; measured with a 7B in SFT and DPO
# Times as long: 1.25 from a profile; with it 0.52, nearly the ideal half, gives the steps of a 7B measured in SFT and DPO.
_FP8_PRODUCTS, _FP8_TRAFFIC = 0.52, 1.25
_SMALLEST = 1e8  # parameters: the time of smaller models is not known
_NF4 = 0.95  # weights are expanded in each product; measured with a 7B in DPO
#: Seconds a layer and micro-batch, measured with a 0.5B on an H100: compiled, of adapters; not compiled, of all weights.
_LAUNCHES = {True: 5.2e-3, False: 8.2e-3}


#: Raises ConfigurationError where training would refuse a configuration on a device.
Check = Callable[[BaseConfig, Gpu], None]


class Faster(NamedTuple):
    """A setting that saves time, by itself."""

    setting: str
    seconds: float


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
    compiled: bool
    dtype: torch.dtype
    refusal: str  # why `train` would not start there, whatever the memory; or ""
    tokens_per_s: float | None = None
    seconds: float | None = None  # of the run's steps, or of a million tokens
    waits: bool = False  # for the processor, which launches the kernels
    changes: list[Change] = dataclasses.field(default_factory=list)  # that make it fit
    faster: list[Faster] = dataclasses.field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.refusal and self.parts.total <= self.limit


@dataclasses.dataclass
class Plan:
    """What `arabic-qwen plan` shows."""

    model: str
    has_weights: bool  # on this machine
    shape: ModelShape
    mix: LengthMix
    devices: list[Estimate]


def plan(config: BaseConfig, gpus: Sequence[str] = ()) -> Plan:
    """Estimate a run on this machine and on `gpus` (names as in :data:`GPUS`, or sizes as 16GB; none: a choice).

    Raises:
        ConfigurationError: a GPU is unknown, `lora_target_modules` names layers that the model lacks, or settings
            contradict each other on every device.
        ModelLoadError: the config.json of the model or of its reference cannot be found, or it cannot be trained.
        DatasetError: the data is here, but cannot be trained on.
    """
    others = [known(name) for name in gpus or SHOWN]
    check_on(config, GPUS["H200"])  # what the newest refuses, all do
    path, model_config = _configuration_of(config.model_name)
    mix = length_mix(config)
    config = _with_own_adapter(config)
    other = getattr(config, "ref_model_name", None)
    frozen = config.model_copy(update={"use_lora": False})
    reference = _shape(other, _configuration_of(other)[1], frozen, torch.bfloat16) if other else None
    run = _Run(config, mix, model_config, reference, {})
    name, here = this_device()
    devices = [run.estimate(name, here, check_here)]
    devices += [run.estimate(name, gpu, check_on) for name, gpu in others]
    return Plan(config.model_name, _has_weights(path), run.shape_on(others[0][1]), mix, devices)


def _configuration_of(name: str) -> tuple[str, Any]:
    """Where a model's config.json is, and what it holds."""
    path = locate_configuration(name)
    try:
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise _broken(name, error) from error
    check_attention(name, model_config)
    return path, model_config


def _shape(name: str, model_config: Any, config: BaseConfig, dtype: torch.dtype) -> ModelShape:
    try:
        return model_shape(model_config, config, dtype)
    except ConfigurationError:
        raise
    except Exception as error:
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{name}: no model can be built from its config.json ({one_line(error)}); download or copy it again"
    )


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


class _Run:
    """One configuration on several devices."""

    def __init__(
        self,
        config: BaseConfig,
        mix: LengthMix,
        model_config: Any,
        reference: ModelShape | None,
        shapes: dict[Any, ModelShape],
    ):
        self.config = config
        self.mix = mix
        self.model_config = model_config
        self.reference = reference  # another model, by `ref_model_name`
        self.shapes = shapes  # found so far

    def shape_on(self, gpu: Gpu) -> ModelShape:
        config, dtype = self.config, dtype_there(self.config, gpu)
        key = (
            config.lora_r,
            str(config.lora_target_modules),
            config.use_lora,
            config.use_dora,
            config.optim,
            config.base_precision,
            dtype,
        )
        if key not in self.shapes:
            self.shapes[key] = _shape(config.model_name, self.model_config, config, dtype)
        return self.shapes[key]

    @property
    def objective(self) -> Any:
        return METHODS[self.config.method].make_objective(self.config)

    def reference_bytes(self, gpu: Gpu) -> float:
        """Of a reference that is in memory beside the policy; 0 where the policy without its adapters is the reference."""
        config: Any = self.config
        if not self.objective.needs_reference or config.precompute_reference:
            return 0.0
        shape = self.reference or self.shape_on(gpu)
        if not self.reference and not config.use_lora:
            return 4.0 * shape.parameters  # loaded as the policy is
        second = self.reference or config.lora_bias != "none"
        return frozen_bytes(shape, config, dtype_there(config, gpu)) if second else 0.0

    @property
    def tokens(self) -> float | None:
        """Of the whole run, in the stream; None where the data was not read."""
        return self.mix.steps and self.mix.steps * self.mix.examples_a_step * self.mix.tokens

    def compiled(self, gpu: Gpu) -> bool:
        parameters = self.shape_on(gpu).parameters
        return flash_there(self.config, gpu) and pays(self.config, parameters, self.tokens or math.inf)

    def memory(self, gpu: Gpu, tokens: int, recomputed: int) -> Memory:
        """With a budget of `tokens`."""
        mix, tokens = self.mix, self.mix.largest_micro_batch(tokens)
        return step_memory(
            self.shape_on(gpu),
            self.config,
            dtype_there(self.config, gpu),
            tokens=tokens,
            targets=math.ceil(tokens * mix.targets / mix.tokens),
            gathered=math.ceil(tokens * mix.gathered / mix.tokens),
            recomputed=recomputed,
            reference=self.reference_bytes(gpu),
            compiled=self.compiled(gpu),
            on_gpu=gpu.is_gpu,
        )

    def fit(self, gpu: Gpu) -> tuple[Fit, Memory]:
        """What would be chosen there, and the memory that it takes."""
        shape, wanted = self.shape_on(gpu), self.config.gradient_checkpointing
        layers = shape.layers
        if gpu.is_gpu:
            fit = choose(
                lambda tokens, kept: self.memory(gpu, tokens, layers - kept).total,
                layers=layers,
                limit=gpu.limit,
                longest=self.mix.longest,
                busy=min(busy_budget(shape.hidden, shape.intermediate), self.mix.step),
                token_budget=self.config.token_budget,
                recomputed=None if wanted == "auto" else layers if wanted else 0,
            )
        else:
            fit = Fit(self.config.token_budget or PROCESSOR_BUDGET, layers if wanted is True else 0, 0.0)
        parts = self.memory(gpu, max(fit.token_budget, self.mix.longest), fit.recomputed)
        return fit._replace(peak=parts.total), parts

    def estimate(self, name: str, gpu: Gpu, check: Check) -> Estimate:
        compiled, dtype = self.compiled(gpu), dtype_there(self.config, gpu)
        refusal = message(check, self.config, gpu)
        found = Estimate(name, gpu.memory, gpu.limit, *self.fit(gpu), compiled, dtype, refusal)
        if found.fits and self._speed_known(gpu):
            found.tokens_per_s, found.seconds, found.waits = self._speed(gpu, found.fit)
            found.faster = self._faster(gpu, found.seconds, check)
        elif found.parts.total > gpu.limit:
            found.changes = self._changes(gpu, check, refusal)
        return found

    def _speed(self, gpu: Gpu, fit: Fit) -> tuple[float, float, bool]:
        """Tokens of the stream a second, as the log counts them; seconds of the run, or of a million tokens; whether it waits.

        A small model's kernels are done before the processor has launched the next ones.
        """
        tokens = self.mix.tokens
        step, before = self._computing(gpu, fit.recomputed)
        launches = self._launches(gpu, fit)
        waits, step = launches > step, max(launches, step)
        return tokens / step, (self.tokens or 1e6) / tokens * (step + before), waits

    def _launches(self, gpu: Gpu, fit: Fit) -> float:
        """Seconds in which the processor launches the kernels of an example's part of a step."""
        mix, layers = self.mix, self.shape_on(gpu).layers
        tokens = mix.examples_a_step * mix.budgeted
        micro_batch = max(tokens / math.ceil(tokens / fit.token_budget), mix.budgeted)
        reference = self.objective.needs_reference and not self.precomputes
        passes = self.forward_passes + fit.recomputed / layers + 2 + reference
        return _LAUNCHES[self.compiled(gpu)] * passes / 3 * layers * mix.budgeted / micro_batch

    @property
    def forward_passes(self) -> int:
        """Of the policy in a step; the backward one takes as long as two."""
        return 1 + (self.objective.auxiliary is not None) + self.objective.whole_step

    @property
    def precomputes(self) -> bool:
        return getattr(self.config, "precompute_reference", False)

    def _faster(self, gpu: Gpu, seconds: float, check: Check) -> list[Faster]:
        found = []
        for update in faster(self.config):
            run = self._with([update])
            # The shape refuses sizes that fp8 cannot take.
            refused = message(run.shape_on, gpu) or message(check, run.config, gpu)
            if run.is_valid and not refused and run.fits(gpu):
                _, needed, _ = run._speed(gpu, run.fit(gpu)[0])
                if needed < 0.97 * seconds:
                    found.append(Faster(setting(update), needed))
        return found

    def _speed_known(self, gpu: Gpu) -> bool:
        half = dtype_there(self.config, gpu).itemsize == 2
        slow = self.config.load_in_8bit or self.config.use_dora or not self.config.use_flash_attention
        return gpu.peak > 0 and half and not slow and self.shape_on(gpu).parameters >= _SMALLEST

    def _computing(self, gpu: Gpu, recomputed: int) -> tuple[float, float]:
        """Seconds of an example in a step, and of its share of a pass before training.

        Of matrix products, of attention, and of what is read and written between them.
        """
        mix, shape, config = self.mix, self.shape_on(gpu), self.config
        times_products, times_traffic = (_FP8_PRODUCTS, _FP8_TRAFFIC) if config.base_precision == "fp8" else (1.0, 1.0)
        product_rate = _PRODUCTS * gpu.peak / times_products
        attention_rate = _ATTENTION[gpu.capability >= (9, 0)] * gpu.peak
        traffic_rate = gpu.bandwidth / _TRAFFIC / times_traffic / (1 if self.compiled(gpu) else _NOT_COMPILED)
        rate = _NF4 if config.load_in_4bit else 1.0

        def seconds(products: float, attention: float, kept: float) -> float:
            return (products / product_rate + attention / attention_rate + kept / traffic_rate) / rate

        layers, attention, head = _forward(shape, mix)
        trained = 0 if config.use_lora else 1
        forward = self.forward_passes + recomputed / shape.layers
        step = seconds(
            layers * (forward + 1 + trained) + head * (self.forward_passes + 1 + 2 * trained),
            attention * (forward + 2.5),
            shape.kept_plain * shape.layers * mix.tokens * (forward + 2),
        )
        if not self.objective.needs_reference:
            return step, 0.0
        other = self.reference or shape
        layers, attention, head = _forward(other, mix)
        # KTO's other completion, budgeted too, shares the prompt.
        more = mix.budgeted / mix.tokens
        reference = more * seconds(layers + head, attention, other.kept_plain * other.layers * mix.tokens)
        return (step, reference / mix.epochs) if self.precomputes else (step + reference, 0.0)

    def _changes(self, gpu: Gpu, check: Check, refusal: str) -> list[Change]:
        """What to change until it fits, the cheapest first, each on top of those before; `refusal`: of what is given."""
        chosen: list[dict[str, Any]] = []
        for remedy in remedies(self.config, self.mix, gpu.is_gpu):
            run, changed = self._with(chosen), self._with([*chosen, remedy])
            enough = changed.fits(gpu) or changed.least(gpu) <= 0.95 * run.least(gpu)
            if not changed.is_valid or not enough or message(check, changed.config, gpu) not in ("", refusal):
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
            changes.append(Change(setting(remedy), before - least, least, changed.fits(gpu)))
            before = least
        return changes

    def _with(self, remedies: Sequence[dict[str, Any]]) -> _Run:
        config, mix = self.config, self.mix
        for update in remedies:
            config = config.model_copy(update=update)
            if config.length_key in update:
                longest = min(mix.longest, mix.completions * update[config.length_key])
                most = math.ceil(longest * mix.budgeted / mix.tokens)
                lengths = tuple((min(budgeted, most), min(tokens, longest)) for budgeted, tokens in mix.lengths)
                mix = mix._replace(longest=longest, lengths=lengths)
        return _Run(config, mix, self.model_config, self.reference, self.shapes)

    @property
    def is_valid(self) -> bool:
        values = self.config.model_dump(exclude={"lora_target_modules"})  # an adapter's own may be a pattern
        return not message(lambda: type(self.config)(**values))

    def fits(self, gpu: Gpu) -> bool:
        return self.fit(gpu)[1].total <= gpu.limit

    def least(self, gpu: Gpu) -> float:
        """Bytes with the smallest micro-batch that the settings allow, and as much recomputed."""
        if not gpu.is_gpu:
            return self.fit(gpu)[1].total
        recomputed = self.shape_on(gpu).layers if self.config.gradient_checkpointing else 0
        return self.memory(gpu, max(self.config.token_budget or 0, self.mix.longest), recomputed).total


def _forward(shape: ModelShape, mix: LengthMix) -> tuple[float, float, float]:
    """Operations of a forward pass over an example, 2 for each weight that a token meets: layers, attention, logits."""
    layers = 2 * (shape.linear + shape.adapters) * mix.tokens
    attention = 4 * shape.attention * mix.pairs * shape.layers
    return layers, attention, 2 * shape.vocabulary * shape.hidden * mix.targets
