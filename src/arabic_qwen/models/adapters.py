"""LoRA adapters on a model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError


def add_lora(model: PreTrainedModel, config: BaseConfig) -> PeftModel:
    """Wrap the model in new LoRA adapters with float32 weights, initialised from `config.seed`.

    Raises:
        ConfigurationError: `lora_target_modules` names no linear layer of this model.
    """
    targets = config.lora_target_modules
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")]
    unknown = (
        [] if isinstance(targets, str) else [t for t in targets if not any(f".{n}".endswith(f".{t}") for n in linear)]
    )
    if unknown:
        raise ConfigurationError(
            f"lora_target_modules: this model has no linear layer {', '.join(unknown)} that takes adapters; "
            f"choose from {', '.join(sorted({n.rpartition('.')[2] for n in linear}))}, or all-linear"
        )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias=config.lora_bias,
        task_type=config.lora_task_type,
    )
    set_seed(config.seed)
    return get_peft_model(model, lora)


def own_adapter_only(model: Any) -> dict[str, Any]:
    """Arguments for `save_pretrained` that leave out the adapters of a reference policy."""
    return {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
