"""torch.compile for the packed forward pass: each decoder layer, so that a layer is compiled once for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.attention import flash_runs
from arabic_qwen.models.kernels.fp8 import second_copies
from arabic_qwen.models.layers import packed_forwards, set_packed_forward
from arabic_qwen.models.precision import compute_dtype

# Variants of a model's layer: with and without gradients, adapters, dropout and shared prompts. Beyond the limit, which is
# a few by default and counts those of all models, torch.compile would silently stop to compile.
_VARIANTS = 64

# Parameters × tokens of a run that pays for compiling: some minutes on an H100, of which a quarter is saved.
_PAYS_FROM = 2e16


def should_compile(config: BaseConfig, model: Any, tokens: float) -> bool:
    """Whether to compile for a run over so many tokens: as `torch_compile` says; auto: where it runs and pays.

    Raises:
        ConfigurationError: `torch_compile` is true where layers cannot be compiled.
    """
    flash = config.use_flash_attention and flash_runs(
        model.get_output_embeddings().weight.device, compute_dtype(config)
    )
    check_compilable(config, flash)
    adapters = getattr(model, "peft_config", {}).values()
    if any(one.use_dora for one in adapters):  # an earlier run's
        config = config.model_copy(update={"use_dora": True})
    return flash and pays(config, model.num_parameters() - second_copies(model), tokens)


def pays(config: BaseConfig, parameters: int, tokens: float) -> bool:
    """Whether compiling pays, as `torch_compile` says; auto: for long runs of what compiles well."""
    if config.torch_compile != "auto":
        return config.torch_compile
    unusual = config.deepspeed or config.use_dora or config.load_in_8bit
    return not unusual and parameters * tokens > _PAYS_FROM


def check_compilable(config: BaseConfig, flash: bool) -> None:
    """Raise ConfigurationError where `torch_compile` is true and layers are int8, or lack the flash attention they need."""
    if config.torch_compile is not True:
        return
    if config.load_in_8bit:  # compiled, they would keep their inputs
        raise ConfigurationError(
            "torch_compile: does not go with load_in_8bit; set it to auto or false, or load_in_4bit instead of load_in_8bit"
        )
    if not flash:
        raise ConfigurationError(
            "torch_compile: needs a GPU with flash attention (Ampere or newer, bfloat16 or float16, "
            "use_flash_attention); set it to auto or false"
        )


def compile_packed(model: Any) -> None:
    """Compile the decoder layers that `model(packed=batch)` runs on a GPU, and let a kernel compute the head's softmax.

    The first batches take a minute or two longer. Lengths are dynamic: no batch of several targets is compiled again. Calls
    without `packed` (generation) are not compiled.

    Args:
        model: with :func:`arabic_qwen.models.scoring.enable_packed_forward`, or a PEFT wrapper around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "compiled", False):
        return
    torch._dynamo.config.recompile_limit += _VARIANTS
    torch._dynamo.config.accumulated_recompile_limit += _VARIANTS
    # Fused operations round as single ones do: else the passes with and without adapters would round at other places, and
    # policy and reference differ before the first step, in 8-bit floating point by several nats a completion. What is left
    # is the order of sums.
    torch._inductor.config.emulate_precision_casts = True
    for layer, packed_forward in packed_forwards(model):
        set_packed_forward(layer, _compiled(packed_forward))
    base.compiled = True


@functools.cache
def _compiled(packed_forward: Callable) -> Callable:
    compiled = torch.compile(packed_forward, dynamic=True)

    def run(layer, hidden_states, **kwargs):
        if torch.is_grad_enabled():  # else the first layer, whose input is frozen, would be compiled apart
            hidden_states.requires_grad_()
        return compiled(layer, hidden_states, **kwargs)

    return run
