"""The configuration in transformers' terms."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.sources import data_seed
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.attention import flash_runs
from arabic_qwen.models.compilation import check_compilable
from arabic_qwen.models.precision import check_bitsandbytes, check_precision, compute_dtype, device
from arabic_qwen.redaction import redact
from arabic_qwen.text.dialects import load_classifier

# transformers is renaming its argument.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit"}

_REPORTING_EXTRAS = ("mlflow", "tensorboard", "wandb")

_HIGHER_IS_BETTER = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen")


class Schedule(NamedTuple):
    """When to evaluate and to save, in a combination that transformers accepts."""

    evaluation: str
    saving: str
    save_steps: int
    keep_best: bool
    changes: list[str]  # what differs from the configuration, and why


def resolve_schedule(config: BaseConfig, has_validation: bool) -> Schedule:
    """Resolve settings that contradict each other or the data."""
    evaluation, saving, save_steps = config.evaluation_strategy, config.save_strategy, config.save_steps
    keep_best, changes = config.load_best_model_at_end, []
    if config.streaming and config.validation_split and not has_validation:
        changes.append("no validation_split while streaming; eval_dataset_path can name validation data")
    if evaluation != "no" and not has_validation:
        evaluation = "no"
        changes.append("no evaluation, for there are no validation rows")
    if keep_best and evaluation != saving:
        keep_best = False
        changes.append(f"the last model is kept, not the best, for evaluation is {evaluation!r} and saving {saving!r}")
    if keep_best and evaluation == "steps" and save_steps != (fitting := _fitting(save_steps, config.eval_steps)):
        save_steps = fitting
        changes.append(f"save_steps {save_steps}, which eval_steps goes with, so that the best model is saved")
    return Schedule(evaluation, saving, save_steps, keep_best, changes)


def _fitting(save_steps: int, eval_steps: int) -> int:
    """The largest number of steps up to `save_steps` with which evaluated models are saved: never rarer than asked for."""
    if save_steps > eval_steps:
        return save_steps - save_steps % eval_steps
    return next(steps for steps in range(save_steps, 0, -1) if eval_steps % steps == 0)


def training_arguments(config: BaseConfig, schedule: Schedule) -> TrainingArguments:
    """The `TrainingArguments` of a configuration.

    Raises:
        ConfigurationError: transformers refuses a value, or a package that it needs is missing.
    """
    check_packages(config)
    dtype = compute_dtype(config)
    checkpointing: dict[str, Any] = {
        _CHECKPOINTING: _recomputes(config),
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    try:
        arguments = TrainingArguments(
            output_dir=config.resolved_output_dir,
            learning_rate=config.learning_rate,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_eval_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            optim=_OPTIMIZERS[config.optim],
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_ratio,  # below 1 it is a ratio
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy=schedule.evaluation,
            eval_steps=config.eval_steps,
            save_strategy=schedule.saving,
            save_steps=max(schedule.save_steps, config.eval_steps) if schedule.keep_best else schedule.save_steps,
            save_total_limit=config.save_total_limit,
            load_best_model_at_end=schedule.keep_best,
            metric_for_best_model=config.metric_for_best_model,
            greater_is_better=config.metric_for_best_model.endswith(_HIGHER_IS_BETTER),
            report_to=config.report_to,
            run_name=config.run_name and redact(config.run_name),  # trackers publish it
            seed=config.seed,
            data_seed=data_seed(config),
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            use_cpu=not torch.cuda.is_available(),
            **checkpointing,
            dataloader_num_workers=config.dataloader_num_workers,
            dataloader_pin_memory=config.dataloader_pin_memory,
            train_sampling_strategy="group_by_length" if config.group_by_length else "random",
            length_column_name=config.length_column_name,
            ddp_find_unused_parameters=config.ddp_find_unused_parameters,
            ddp_backend=config.ddp_backend,
            deepspeed=config.deepspeed,
            disable_tqdm=True,
        )
    except (ValueError, ImportError, OSError) as error:
        if config.ddp_backend and "WORLD_SIZE" not in os.environ:
            raise ConfigurationError(
                f"ddp_backend: {config.ddp_backend!r} is for several processes, which torchrun starts; set it to null"
            ) from error
        raise ConfigurationError(f"transformers refuses the configuration: {error}") from error
    # transformers' own check takes only multiples of eval_steps, though divisors do too.
    arguments.save_steps = schedule.save_steps
    return arguments


def planned_tokens(config: BaseConfig, dataset: Mapping[str, Any]) -> float:
    """About how many tokens training runs over; inf for a stream, which is for data larger than memory."""
    train = dataset["train"]
    if train is dataset.get("validation"):  # which is only evaluated
        return 0.0
    if not isinstance(train, GroupDataset):
        return math.inf
    lengths = train.lengths
    if config.max_steps is None:
        return sum(lengths) * config.num_train_epochs
    sequences = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    return sequences * max(config.sequence_capacity or 0, sum(lengths) / len(lengths))


def _recomputes(config: BaseConfig) -> bool:
    """Whether all layers recompute; where that is chosen, before it is."""
    return torch.cuda.is_available() if config.gradient_checkpointing == "auto" else config.gradient_checkpointing


def check_machine(config: BaseConfig) -> None:
    """Raise ConfigurationError for what this machine lacks, before anything is loaded."""
    if config.dialect_model:
        try:
            load_classifier(config.dialect_model)
        except ConfigurationError as error:
            raise ConfigurationError(f"dialect_model: {error}") from None
    check_precision(config)
    check_packages(config)
    check_compilable(config, config.use_flash_attention and flash_runs(device(), compute_dtype(config)))


def check_packages(config: BaseConfig) -> None:
    """Raise ConfigurationError where a package, or a device that it works on, is missing."""
    if config.optim == "adamw_8bit":
        if not torch.cuda.is_available():
            raise ConfigurationError("optim: adamw_8bit needs a CUDA device; set it to adamw")
        check_bitsandbytes("optim")
    if config.deepspeed:
        if not Path(config.deepspeed).is_file():
            raise ConfigurationError(f"deepspeed: {config.deepspeed} does not exist; give a DeepSpeed JSON file")
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigurationError("deepspeed: needs its package; pip install 'arabic-qwen[deepspeed]'")
    wanted = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in sorted(set(wanted) - {"none", "all"} - set(get_available_reporting_integrations())):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigurationError(
                f"report_to: {name!r} is unknown; choose from none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        package = f"'arabic-qwen[{name}]'" if name in _REPORTING_EXTRAS else name
        raise ConfigurationError(f"report_to: {name} is not installed; pip install {package}")
