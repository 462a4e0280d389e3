"""Loads models, adapters and tokenizers; decides precision and quantisation."""

from __future__ import annotations

import importlib.util
import logging
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError, ModelLoadError
from arabic_qwen.models.scoring import enable_packed_forward

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "arabic-qwen-tiny"
RUN_CONFIG = "training_config.yaml"  # in every output folder


def resolve_model_name(name: str) -> str:
    """The path of the embedded model for its name; any other name as it is."""
    if Path(name).name == EMBEDDED_MODEL and not Path(name).is_dir():
        return str(files("arabic_qwen") / "assets" / EMBEDDED_MODEL)
    return name


def is_adapter(name: str) -> bool:
    return (Path(resolve_model_name(name)) / "adapter_config.json").is_file()


def is_run_output(name: str) -> bool:
    """Whether `name` is a folder that an earlier run wrote."""
    return (Path(name) / RUN_CONFIG).is_file()


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


def compute_dtype(config: BaseConfig) -> torch.dtype:
    """Precision of matrix products: `bf16` or `fp16` where set, else `torch_dtype`, as far as the device has it.

    Raises:
        ConfigurationError: the configuration insists on a precision that the device lacks.
    """
    if config.bf16 and config.fp16:
        raise ConfigurationError("bf16 and fp16 are both true; set one of them to false")
    if torch.cuda.is_available():
        if config.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigurationError("bf16: this GPU has no bfloat16; set fp16 to true instead")
    else:
        if config.fp16 or config.torch_dtype == "float16":
            raise ConfigurationError("fp16: float16 needs a CUDA device; set bf16 to true or torch_dtype to float32")
        if config.bf16 and not _processor_has_bf16():
            raise ConfigurationError(
                "bf16: this processor has no bfloat16; set bf16 to false and torch_dtype to float32"
            )
    if config.bf16:
        return torch.bfloat16
    if config.fp16:
        return torch.float16
    if config.torch_dtype == "bfloat16" and not torch.cuda.is_available() and not _processor_has_bf16():
        logger.warning("torch_dtype: this processor has no bfloat16; computing in float32")
        return torch.float32
    return getattr(torch, config.torch_dtype)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises:
        ModelLoadError: it cannot be found or read.
    """
    path = resolve_model_name(name)
    if name.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ModelLoadError(
            f"{name}: the folder does not exist; give the folder of a model or of a finished run, or a hub id"
        )
    if is_run_output(path) and not (Path(path) / "tokenizer_config.json").is_file():
        raise ModelLoadError(f"{name}: holds a run that is not finished; run the same train command again first")
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = resolve_model_name(_base_of(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise _load_error(name, "tokenizer", error) from error
    if len(tokenizer) < 256:  # what transformers makes up where there is only a config.json
        raise ModelLoadError(f"{name}: has no tokenizer; put its tokenizer.json and tokenizer_config.json there")
    return tokenizer


def load_model(name: str, config: BaseConfig, *, trainable: bool) -> PreTrainedModel | PeftModel:
    """Load a model, or an adapter on its base model, ready for packed and ordinary forward passes.

    Frozen weights are loaded in the computation's precision. Weights that will be trained are float32 masters:
    in bfloat16, small updates would round to nothing.

    Args:
        name: hub id, folder of a model or of an adapter, or the embedded model's name.
        config: precision, quantisation and attention settings.
        trainable: load for training. An adapter then goes on being trained; without `use_lora` it is merged first.

    Raises:
        ModelLoadError: the model cannot be found or read.
        ConfigurationError: quantisation or precision that this machine does not offer.
    """
    path = resolve_model_name(name)
    base = resolve_model_name(_base_of(path)) if is_adapter(path) else path
    quantization = _quantization(config)
    full = trainable and not config.use_lora
    dtype = torch.float32 if full else compute_dtype(config)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device()} if quantization else None,
            trust_remote_code=False,
        )
    except Exception as error:
        raise _load_error(base, "model", error) from error
    enable_packed_forward(model, use_flash=config.use_flash_attention)
    if not quantization:
        model.to(device())
    if base == path:
        return model
    try:
        adapted = PeftModel.from_pretrained(model, path, is_trainable=trainable and config.use_lora)
    except Exception as error:
        raise _load_error(name, "adapter", error) from error
    # PEFT has frozen the base model.
    return adapted.merge_and_unload().requires_grad_(True) if full else adapted


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


def merged_copy(model: PeftModel, config: BaseConfig, adapter_dir: str | os.PathLike) -> PreTrainedModel:
    """The base model, loaded again unquantised, with the adapter saved in `adapter_dir` merged into it."""
    base = _base_of(os.fspath(adapter_dir))
    plain = AutoModelForCausalLM.from_pretrained(resolve_model_name(base), dtype=getattr(torch, config.torch_dtype))
    return PeftModel.from_pretrained(plain, adapter_dir).merge_and_unload()


def _base_of(adapter: str) -> str:
    try:
        return PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except Exception as error:
        raise _load_error(adapter, "adapter", error) from error


def _quantization(config: BaseConfig) -> BitsAndBytesConfig | None:
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if not torch.cuda.is_available():
        raise ConfigurationError(f"{key}: quantised training needs a CUDA device; set {key} to false")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(f"{key}: needs bitsandbytes; pip install 'arabic-qwen[quantization]'")
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(config),
    )


def _load_error(name: str, what: str, error: Exception) -> ModelLoadError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelLoadError(
        f"{name}: the {what} cannot be loaded ({reason}); "
        "give a folder with config.json and safetensors, or a hub id that this machine can reach"
    )
