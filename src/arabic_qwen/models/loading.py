"""Loads models, adapters and tokenizers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ModelLoadError
from arabic_qwen.models.adapters import load_adapter, save_adapter
from arabic_qwen.models.kernels.fp8 import convert_to_fp8
from arabic_qwen.models.precision import check_fp8, compute_dtype, device, mend_quantized_layers, quantization
from arabic_qwen.models.safety import read_json, refuse_pickle
from arabic_qwen.models.scoring import enable_packed_forward
from arabic_qwen.models.sources import (
    base_of,
    is_adapter,
    load_error,
    locate_configuration,
    locate_model,
    resolve_model_name,
)

# Or transformers asks a service to convert weights that are pickled on the hub, and loads what that answers.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub; an adapter without one has that of its base model.

    A model's weights may be missing.

    Raises:
        ModelLoadError: it cannot be found or read.
    """
    path = locate_model(name) if is_adapter(name) else locate_configuration(name)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = _locate_base(name, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        for file in sorted(Path(path).glob("tokenizer*.json")):
            read_json(file)  # names the file that is damaged
        raise load_error(name, "tokenizer", error) from error
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _end_token(path, tokenizer)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of no files at all
        raise ModelLoadError(f"{name}: has no tokenizer.json; copy the tokenizer's files from where the model is from")
    return tokenizer


def _end_token(path: str, tokenizer: Any) -> str | None:
    """The token that the model's configuration says it ends with, for a tokenizer that does not say."""
    for file in ("generation_config.json", "config.json"):
        found = cached_file(path, file, _raise_exceptions_for_missing_entries=False)
        ids = read_json(Path(found)).get("eos_token_id") if found else None
        if ids not in (None, []):
            first = ids[0] if isinstance(ids, list) else ids
            if not isinstance(first, int) or not 0 <= first < len(tokenizer):
                raise ModelLoadError(f"{found}: eos_token_id: {first!r} is no token of the tokenizer; correct it")
            return tokenizer.convert_ids_to_tokens(first)
    return None


def load_model(name: str, config: BaseConfig, *, trainable: bool) -> PreTrainedModel | PeftModel:
    """Load a model, or an adapter on its base model, ready for packed and ordinary forward passes.

    Frozen weights are loaded in the computation's precision. Weights that will be trained are float32 masters:
    in bfloat16, small updates would round to nothing. With `base_precision` fp8 the layers under adapters are converted;
    a model without any is, when it gets them (:func:`arabic_qwen.models.adapters.add_lora`).

    Args:
        name: hub id, folder of a model or of an adapter, or the embedded model's name.
        config: precision, quantisation and attention settings.
        trainable: load for training. An adapter then goes on being trained; without `use_lora` it is merged first.

    Raises:
        ModelLoadError: the model cannot be found or read.
        ConfigurationError: quantisation or precision that this machine does not offer.
    """
    full = trainable and not config.use_lora
    dtype = torch.float32 if full else compute_dtype(config)
    quantized = quantization(config)
    check_fp8(config)
    path = locate_model(name)
    if not is_adapter(path):
        return _load_weights(name, path, dtype, config, quantized)
    base = _locate_base(name, path)
    model = _load_weights(base, base, dtype, config, quantized)
    try:
        adapted = load_adapter(model, path, trainable=trainable and config.use_lora)
    except Exception as error:
        raise load_error(name, "adapter", error) from error
    if full:
        return adapted.merge_and_unload().requires_grad_(True)  # PEFT has frozen the base model
    if config.base_precision == "fp8":
        convert_to_fp8(adapted, trainable)
    return adapted


def _load_weights(name: str, path: str, dtype: torch.dtype, config: BaseConfig, quantized: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=_read_config(path),
            dtype=dtype,
            quantization_config=quantized,
            device_map={"": device()} if quantized else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        if "use_safetensors=True" in str(error):  # transformers' advice on a hub model without safetensors
            raise refuse_pickle(name, "pytorch_model.bin") from None
        raise load_error(name, "model", error) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{name}: its safetensors lack {len(missing)} of the model's tensors (first {missing[0]}); "
            "download or copy it again"
        )
    model.name_or_path = resolve_model_name(name)  # for adapters' records: not the hub's cache
    if model.config.tie_word_embeddings:
        model._keys_to_ignore_on_save = ["lm_head.weight"]  # or Trainer warns that its checkpoints lack it
    enable_packed_forward(model, use_flash=config.use_flash_attention)
    if quantized:
        mend_quantized_layers(model)
    else:
        model.to(device())
    return model


def positions(config: PreTrainedConfig) -> int:
    """Tokens of a text that a model was made for, with what its RoPE is scaled to (YaRN and others)."""
    rope = getattr(config, "rope_parameters", None) or {}
    most: int = config.max_position_embeddings
    return max(most, int((rope.get("original_max_position_embeddings") or most) * (rope.get("factor") or 1)))


def _read_config(path: str) -> PreTrainedConfig:
    """The model's configuration with PyTorch's attention, until ours takes its place: others may fetch kernels."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config._attn_implementation = "sdpa"
    return config


def _locate_base(name: str, adapter: str) -> str:
    base = base_of(adapter)
    try:
        return locate_model(base)
    except ModelLoadError as error:
        raise ModelLoadError(f"{name}: the adapter's base model, {error}") from error


def save_model(model: Any, config: BaseConfig, folder: Path) -> bool:
    """Write adapters, or the whole model: merged with `merge_and_save`. Returns whether it is adapters."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return False
    save_adapter(model, folder)
    if not config.merge_and_save:
        return True
    merged = merged_copy(config, folder)
    for adapter_file in folder.glob("adapter_*"):
        adapter_file.unlink()
    merged.generation_config = model.generation_config
    merged.save_pretrained(folder)
    return False


def saved_bytes(model: Any, *, whole: bool = False) -> int:
    """Bytes of the weights that are saved, about: adapters, or all of them where there are none or `whole`."""
    whole = whole or not isinstance(model, PeftModel)
    return sum(weight.nbytes for weight in model.parameters() if whole or weight.requires_grad)


def merged_copy(config: BaseConfig, adapter_dir: str | os.PathLike) -> PreTrainedModel:
    """The base model, loaded again unquantised, with the adapter saved in `adapter_dir` merged into it."""
    adapter = os.fspath(adapter_dir)
    base = _locate_base(adapter, adapter)
    dtype = config.torch_dtype if config.torch_dtype == "auto" else getattr(torch, config.torch_dtype)
    plain = AutoModelForCausalLM.from_pretrained(
        base, config=_read_config(base), dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return load_adapter(plain, adapter).merge_and_unload()
