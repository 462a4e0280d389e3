"""The device, the precision of computation, and the quantisation of frozen weights."""

from __future__ import annotations

import importlib.util
import logging
import os
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import BitsAndBytesConfig

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError

#: Settings that belong together.
PRECISION = ("torch_dtype", "bf16", "fp16")
QUANTIZATION = ("load_in_4bit", "load_in_8bit", "base_precision")

_BITSANDBYTES = "0.49"  # as in the extra `quantization`


def device() -> torch.device:
    """The accelerator of this process, else the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _processor_has_bf16() -> bool:
    # False for the emulation that every processor offers, which is slower than float32.
    return any(
        getattr(torch.cpu, probe, lambda: False)()
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    )


def device_has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _processor_has_bf16()


def compute_dtype(config: BaseConfig) -> torch.dtype:
    """Precision of matrix products: `bf16` or `fp16` where set, else `torch_dtype`, as far as the device has it.

    Raises:
        ConfigurationError: the configuration insists on a precision that the device lacks.
    """
    return explained_dtype(config)[0]


def explained_dtype(config: BaseConfig) -> tuple[torch.dtype, str]:
    """:func:`compute_dtype`, with a line for the log that says why where the configuration leaves it open; or ""."""
    return dtype_on(config, torch.cuda.is_available(), device_has_bf16())


def dtype_on(config: BaseConfig, cuda: bool, has_bf16: bool) -> tuple[torch.dtype, str]:
    """:func:`explained_dtype` for a GPU or a processor that computes bfloat16 natively or not."""
    if config.bf16 and config.fp16:
        raise ConfigurationError("bf16 and fp16 are both true; set one of them to false")
    if config.bf16 and not has_bf16:
        raise ConfigurationError(
            "bf16: this GPU has no bfloat16; set fp16 to true instead"
            if cuda
            else "bf16: this processor has no bfloat16; set bf16 to false and torch_dtype to float32"
        )
    if not cuda and (config.fp16 or (config.torch_dtype == "float16" and not config.bf16)):
        raise ConfigurationError("fp16: float16 needs a CUDA device; set bf16 to true or torch_dtype to float32")
    if config.bf16:
        return torch.bfloat16, ""
    if config.fp16:
        return torch.float16, ""
    where = f"this {'GPU' if cuda else 'processor'} {'computes' if has_bf16 else 'does not compute'} bfloat16 natively"
    if config.torch_dtype == "auto":
        best = torch.bfloat16 if has_bf16 else torch.float16 if cuda else torch.float32
        return best, f"torch_dtype auto: {str(best).removeprefix('torch.')}, for {where}"
    if config.torch_dtype == "bfloat16" and not cuda and not has_bf16:
        return torch.float32, "torch_dtype: this processor has no bfloat16; computing in float32"
    return getattr(torch, config.torch_dtype), ""


def quantization(config: BaseConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantises the frozen weights: NF4 with double quantisation, int8, or None.

    Raises:
        ConfigurationError: the device or the package cannot do it.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if torch.cuda.is_available():
        needed = (6, 0) if config.load_in_4bit else (7, 5)
        found = torch.cuda.get_device_capability()
        if found < needed:
            raise ConfigurationError(
                f"{key}: needs a GPU of compute capability {needed[0]}.{needed[1]} or newer, "
                f"this one has {found[0]}.{found[1]}; set {key} to false"
            )
    elif config.load_in_8bit:
        # its int8 layers round activations in evaluation but not in training
        raise ConfigurationError("load_in_8bit: needs a CUDA device; set load_in_4bit instead, or neither")
    check_bitsandbytes(key)
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)  # an optional kernel that is missing; a cast in each layer
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(config),
    )


def check_bitsandbytes(setting: str) -> None:
    """Raise ConfigurationError where bitsandbytes, which `setting` needs, is missing or too old."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(f"{setting}: needs bitsandbytes; pip install 'arabic-qwen[quantization]'")
    if Version(version("bitsandbytes")) < Version(_BITSANDBYTES):
        raise ConfigurationError(
            f"{setting}: bitsandbytes {version('bitsandbytes')} is too old; "
            f"pip install -U 'bitsandbytes>={_BITSANDBYTES}'"
        )


def check_fp8(config: BaseConfig) -> None:
    """Raise ConfigurationError where `base_precision` is fp8 and this machine or `torch_dtype` does not allow it."""
    if config.base_precision != "fp8":
        return
    if not torch.cuda.is_available():
        raise ConfigurationError("base_precision: fp8 needs a CUDA device; set it to null")
    check_fp8_on(torch.cuda.get_device_capability(), compute_dtype(config))


def check_fp8_on(capability: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise ConfigurationError where a GPU of this compute capability, or computation in `dtype`, does not allow fp8."""
    if capability < (8, 9):  # as torch._scaled_mm
        raise ConfigurationError(
            "base_precision: fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), "
            f"this one has {capability[0]}.{capability[1]}; set it to null"
        )
    if dtype is not torch.bfloat16:
        raise ConfigurationError(
            "base_precision: fp8 layers give bfloat16; set torch_dtype to bfloat16 and fp16 to false, "
            "or base_precision to null"
        )


def check_precision(config: BaseConfig) -> None:
    """Raise ConfigurationError for a precision or quantisation that this machine does not offer."""
    compute_dtype(config)
    quantization(config)
    check_fp8(config)


def restorable(saved: BaseConfig, quantized: bool) -> tuple[dict[str, Any], str]:
    """The precision and quantisation of an earlier run, as far as this machine offers them.

    Args:
        saved: the run's configuration.
        quantized: False for a whole model, which was merged into an unquantised base.

    Returns:
        The settings by name, and why they are not the run's own, or "".
    """
    plain = {name: type(saved).model_fields[name].default for name in QUANTIZATION}
    values = {name: getattr(saved, name) for name in (*PRECISION, *QUANTIZATION)} | ({} if quantized else plain)
    problem = ""
    for attempt in (values, values | plain):
        config = saved.model_copy(update=attempt)
        try:
            check_precision(config)
            return attempt, problem
        except ConfigurationError as error:
            problem = problem or str(error)
    return {"torch_dtype": "auto", "bf16": False, "fp16": False, **plain}, problem


def inherit(config: Any, given: set[str], saved: BaseConfig, quantized: bool) -> str:
    """Set precision and quantisation as the earlier run `saved` had them, but for what `given` names.

    Returns:
        Why this machine computes otherwise, or "".
    """
    if not given.isdisjoint(PRECISION):
        saved = saved.model_copy(update={name: getattr(config, name) for name in PRECISION})
    values, problem = restorable(saved, quantized)
    for names in (PRECISION, QUANTIZATION):
        if given.isdisjoint(names):
            for name in sorted(names, key=lambda name: bool(values[name])):  # not two quantisations at once
                setattr(config, name, values[name])
                given.discard(name)  # pydantic added it: still not the user's own
    return problem


def autocast(config: BaseConfig) -> torch.autocast:
    """The context in which training computes."""
    dtype = compute_dtype(config)
    return torch.autocast(device().type, dtype, enabled=dtype is not torch.float32)


def mend_quantized_layers(model: Any) -> None:
    """Make bitsandbytes' layers fit for training.

    On processors it repacks 4-bit weights when it first evaluates. Training cannot go on with repacked weights, nor could a
    preference method, whose reference is such an evaluation. Its int8 layers keep their input, and again its columns of
    outliers, where recomputing a decoder layer cannot drop them; only the gradient of their weights, which are frozen, would
    need them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            module.register_forward_hook(_drop_input)


def _drop_input(layer: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    context: Any = output.grad_fn
    if context is not None:
        context.tensors = (None, None, None)  # as bitsandbytes names it
