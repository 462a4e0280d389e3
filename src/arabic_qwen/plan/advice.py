"""Settings that `arabic-qwen plan` tries: to take less memory, or to be faster."""

from __future__ import annotations

import json
import math
from typing import Any

from arabic_qwen.config import BaseConfig
from arabic_qwen.models.sources import is_adapter
from arabic_qwen.plan.data import LengthMix

_SHORTEST = 256  # tokens that are advised as the longest


def setting(update: dict[str, Any]) -> str:
    """As `key=value` on the command line."""
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for key, value in update.items()
    )


def remedies(config: BaseConfig, mix: LengthMix, on_gpu: bool) -> list[dict[str, Any]]:
    """Updates that may save memory, what costs least first."""
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
    new_adapters = not is_adapter(config.model_name)
    if config.lora_r > 8 and new_adapters:
        found.append({"lora_r": 8})
    if config.use_dora and new_adapters:
        found.append({"use_dora": False})
    others = {"load_in_8bit": False, "base_precision": None}
    found.append({"load_in_4bit": True} | {key: value for key, value in others.items() if getattr(config, key)})
    if config.lora_target_modules == "all-linear" and new_adapters:
        found.append({"lora_target_modules": type(config).model_fields["lora_target_modules"].default})
    length = config.length_key
    limit = min(getattr(config, length), math.ceil(mix.longest / mix.completions))
    exponents = range((limit - 1).bit_length() - 1, _SHORTEST.bit_length() - 2, -1)
    for tokens in (2**exponent for exponent in exponents):
        prompt = {"max_prompt_length": tokens // 2} if getattr(config, "max_prompt_length", 0) >= tokens else {}
        found.append({length: tokens} | prompt)  # the prompt must leave room for the answer
    return found


def faster(config: BaseConfig) -> list[dict[str, Any]]:
    """Updates that may save time."""
    found: list[dict[str, Any]] = []
    if config.torch_compile is False:
        found.append({"torch_compile": "auto"})
    if config.gradient_checkpointing is True:
        found.append({"gradient_checkpointing": "auto"})
    if config.base_precision is None:
        found.append({"base_precision": "fp8"})
    if getattr(config, "precompute_reference", None) is False:
        found.append({"precompute_reference": True})
    return found
