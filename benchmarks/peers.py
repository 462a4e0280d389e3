"""TRL's trainers, as they are and as Unsloth patches them, on our groups: same rows, order, adapters and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl.experimental.cpo import CPOConfig as TRLCPOConfig
from trl.experimental.cpo import CPOTrainer as TRLCPOTrainer

from arabic_qwen.config import BaseConfig
from arabic_qwen.models.precision import compute_dtype, device
from arabic_qwen.models.sources import resolve_model_name
from arabic_qwen.packing.group import Group
from arabic_qwen.training.base_trainer import BaseTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TokenisedDPO(trl.DPOTrainer):
    """Takes rows of token ids, which need no preparation."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class TokenisedKTO(trl.KTOTrainer):
    _prepare_dataset = TokenisedDPO._prepare_dataset


class TokenisedCPO(TRLCPOTrainer):
    def tokenize_row(self, feature, model=None):
        return feature


def trainer_of(config: Any) -> tuple[type[Trainer], type[TrainingArguments], Callable[[Group], dict], dict[str, Any]]:
    """TRL's trainer and configuration class, how a group is written as its row, and the method's settings."""
    if config.method == "sft":
        options = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return trl.SFTTrainer, trl.SFTConfig, _sft_row, options
    options = {"max_length": config.max_seq_length, "beta": config.beta}
    if config.method == "dpo":
        return TokenisedDPO, trl.DPOConfig, _pair_row, options
    if config.method == "ipo":  # TRL's beta is the paper's tau
        return TokenisedDPO, trl.DPOConfig, _pair_row, options | {"loss_type": "ipo", "beta": config.tau}
    if config.method == "kto":
        return TokenisedKTO, trl.KTOConfig, _kto_row, options
    if config.method == "cpo":
        return TokenisedCPO, TRLCPOConfig, _cpo_row, options | {"cpo_alpha": config.cpo_alpha}
    gamma = config.beta * config.gamma_beta_ratio
    options |= {"loss_type": "simpo", "simpo_gamma": gamma, "cpo_alpha": 0.0}
    return TokenisedCPO, TRLCPOConfig, _cpo_row, options


def create(config: BaseConfig, groups: list[Group], run: dict[str, Any], **values: Any) -> Trainer:
    """TRL's trainer with `values`; all of our arguments are given, for TRL's defaults for some of them are its own."""
    trainer_class, config_class, row, options = trainer_of(config)
    given = BaseTrainer(config).get_training_arguments()
    arguments = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.init}
    rows = run["micro_batch"]
    arguments |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": config.per_device_train_batch_size // rows,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": run["checkpointing"],
        "use_liger_kernel": run["liger"],
        **options,
    }
    if config.method == "sft" and run["padding_free"] is not None:
        arguments["padding_free"] = run["padding_free"]
    if config.method == "cpo":  # TRL takes pairs
        negatives = len(groups[0].completions) - 1
        assert all(len(group.completions) == 1 + negatives for group in groups), "TRL needs as many in every row"
        groups = [g._replace(completions=(g.completions[0], c)) for g in groups for c in g.completions[1:]]
        arguments["per_device_train_batch_size"] *= negatives
    train_dataset = Dataset.from_list([row(group) for group in groups])
    trainer = trainer_class(args=config_class(**arguments), train_dataset=train_dataset, **values)
    assert not run["padding_free"] or trainer.padding_free, "TRL pads all the same"
    return trainer


def trl_peer(config: BaseConfig, groups: list[Group], run: dict[str, Any]) -> Trainer:
    name = resolve_model_name(config.model_name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=compute_dtype(config), use_safetensors=True)
    # A model that has adapters would get a copy of them as reference; this way TRL only switches them off.
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(name)
    return create(config, groups, run, model=model.to(device()), processing_class=tokenizer, peft_config=lora)


def unsloth_peer(config: BaseConfig, groups: list[Group], run: dict[str, Any]) -> Trainer:
    """Its own model and adapters, its patched trainers; checkpointing is its own kind."""
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if run["checkpointing"] else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        resolve_model_name(config.model_name),
        max_seq_length=config.max_seq_length,
        dtype=compute_dtype(config),
        load_in_4bit=False,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0,
        target_modules=LINEAR,
        use_gradient_checkpointing=checkpointing,
    )
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype is not torch.float32:
            weight.data = weight.data.float()
    return create(config, groups, run, model=model, processing_class=tokenizer)


def _sft_row(group: Group) -> dict[str, list[int]]:
    prompt, ((ids, targets, _),) = group.prompt.tolist(), group.completions
    return {"input_ids": prompt + ids.tolist(), "labels": [-100] * len(prompt) + np.where(targets, ids, -100).tolist()}


def _pair_row(group: Group) -> dict[str, list[int]]:
    chosen, rejected = (completion.ids.tolist() for completion in group.completions)
    return {"prompt_ids": group.prompt.tolist(), "chosen_ids": chosen, "rejected_ids": rejected}


def _kto_row(group: Group) -> dict[str, Any]:
    completion, other = (c.ids.tolist() for c in (*group.completions, group.auxiliary[0]))
    row = {"prompt_ids": group.prompt.tolist(), "completion_ids": completion, "KL_completion_ids": other}
    return row | {"label": group.desirable}


def _cpo_row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": "", "chosen": "", "rejected": ""}  # must be there, though nothing reads them
    prompt = group.prompt.tolist()
    for name, completion in zip(("chosen", "rejected"), group.completions, strict=True):
        ids = completion.ids.tolist()
        row[f"{name}_input_ids"], row[f"{name}_labels"] = prompt + ids, [-100] * len(prompt) + ids
        row[f"{name}_attention_mask"] = [1] * len(prompt + ids)
    return row
