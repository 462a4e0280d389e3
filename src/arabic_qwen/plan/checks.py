"""What training would say to a configuration, asked by `arabic-qwen plan` for this machine and for GPUs elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arabic_qwen.config import BaseConfig
from arabic_qwen.engine.arguments import check_machine
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.memory.gpus import Gpu
from arabic_qwen.models.attention import flash_runs_on
from arabic_qwen.models.compilation import check_compilable
from arabic_qwen.models.precision import check_fp8_on, device_has_bf16, dtype_on


def message(check: Callable[..., object], *args: Any) -> str:
    """Of the ConfigurationError that `check` raises, or ""."""
    try:
        check(*args)
    except ConfigurationError as error:
        return str(error)
    return ""


def check_here(config: BaseConfig, gpu: Gpu) -> None:
    """What training would say to this machine, before it has loaded anything."""
    check_machine(config)


def check_on(config: BaseConfig, gpu: Gpu) -> None:
    """The same of a GPU that is not here."""
    dtype, _ = dtype_on(config, True, _has_bf16(gpu))
    if config.base_precision == "fp8":
        check_fp8_on(gpu.capability, dtype)
    check_compilable(config, flash_there(config, gpu))


def _has_bf16(gpu: Gpu) -> bool:
    return gpu.capability >= (8, 0) if gpu.is_gpu else device_has_bf16()


def dtype_there(config: BaseConfig, gpu: Gpu) -> torch.dtype:
    """Of computation there; where training would refuse, what is likely meant."""
    try:
        return dtype_on(config, gpu.is_gpu, _has_bf16(gpu))[0]
    except ConfigurationError:
        return torch.bfloat16 if gpu.is_gpu else torch.float32


def flash_there(config: BaseConfig, gpu: Gpu) -> bool:
    return config.use_flash_attention and flash_runs_on(gpu.capability, dtype_there(config, gpu))
