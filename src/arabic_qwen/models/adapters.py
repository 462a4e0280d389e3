"""LoRA adapters on a model, and token rows that its embedding lacks."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel, set_seed

from arabic_qwen.config import BaseConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.kernels.fp8 import convert_to_fp8
from arabic_qwen.models.layers import decoder_layers

# PEFT's business, not the user's.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# The fast decomposition of pissa_niter_16 is random: with one seed, loading repeats what training began with.
_DECOMPOSITION_SEED = 0

# Of adapters in the SwiGLU kernel: a tile of each B has to fit into a multiprocessor's registers.
_LARGEST_RANK = 64


def add_lora(model: PreTrainedModel, config: BaseConfig) -> PeftModel:
    """Wrap the model in new LoRA adapters with float32 weights, initialised from `config.seed`.

    Rows that :func:`grow_embedding` added are trained and saved with the adapters. Where the model with its adapters
    switched off is not exactly what it is with new ones, `initial_adapter` of the result keeps the new ones' weights.

    Raises:
        ConfigurationError: `lora_target_modules` names no linear layer of this model, or `base_precision` is fp8 and a
            layer's size does not suit it.
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
    start: Any = True if config.init_lora_weights == "default" else config.init_lora_weights
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias=config.lora_bias,
        task_type=config.lora_task_type,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=start,
        trainable_token_indices=_new_rows(model),
    )
    set_seed(_DECOMPOSITION_SEED if takes_from_base(lora) else config.seed)
    adapted: Any = _adjusted(get_peft_model(model, lora))
    set_seed(config.seed)
    if takes_from_base(lora) or lora.use_dora:  # DoRA's norms round in half precision
        adapted.initial_adapter = {name: weight.clone() for name, weight in _weights(adapted).items()}
    if config.base_precision == "fp8":
        convert_to_fp8(adapted, trainable=True)
    return adapted


def takes_from_base(lora: Any) -> bool:
    """Whether new adapters start from the main components of the base's weights, which are taken out of these."""
    return str(lora.init_lora_weights).startswith(("pissa", "olora"))


def _weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter for use on the untouched base model.

    PiSSA's and OLoRA's are saved as ordinary LoRA of twice the rank: with W = W' + s B₀A₀, the trained W' + s BA is
    W + s [B −B₀][A A₀]ᵀ.
    """
    lora: Any = model.peft_config["default"]
    initial: dict[str, torch.Tensor] | None = getattr(model, "initial_adapter", None)
    if initial is None or not takes_from_base(lora):
        model.save_pretrained(str(folder))
        return
    weights = _weights(model)
    for name, weight in weights.items():
        if "lora_A" in name:
            weights[name] = torch.cat([weight, initial[name]])
        elif "lora_B" in name:
            weights[name] = torch.cat([weight, -initial[name]], dim=1)
    plain = copy.deepcopy(lora)
    plain.init_lora_weights, plain.inference_mode, plain.r = True, True, 2 * lora.r
    plain.lora_alpha = lora.lora_alpha * (2**0.5 if lora.use_rslora else 2)  # the same scale
    plain.save_pretrained(folder)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "adapter_model.safetensors")


def load_adapter(model: PreTrainedModel, path: str, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model, which gets the token rows that the adapter was trained with.

    Raises:
        ValueError: it names rows far beyond those of the base.
    """
    rows: Any = PeftConfig.from_pretrained(path).to_dict().get("trainable_token_indices") or {}
    needed = 1 + max((index for indices in rows.values() for index in indices), default=-1)
    embedding: Any = model.get_input_embeddings()
    most = embedding.weight.shape[0] + max(map(len, rows.values()), default=0)
    if needed > most:
        raise ValueError(f"trainable_token_indices names row {needed - 1}, but base and adapter have {most} rows")
    grow_embedding(model, needed)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(_DECOMPOSITION_SEED)  # of a checkpoint with PiSSA: PEFT changes the base again
        return _adjusted(PeftModel.from_pretrained(model, path, is_trainable=trainable))


def _adjusted(model: PeftModel) -> PeftModel:
    """Checkpoints hold the policy's adapter: not a reference's, not the embedding; and no hub is asked."""
    module: Any
    for module in model.modules():
        plain = isinstance(module, LoraLayer) and not module.lora_variant and not any(module.lora_bias.values())
        if plain and isinstance(module.get_base_layer(), torch.nn.Linear):
            module.forward = types.MethodType(_forward, module)
    for mlp in (layer.mlp for layer in decoder_layers(model)):
        if mlp.config.hidden_act == "silu" and all("forward" in vars(one) for one in (mlp.gate_proj, mlp.up_proj)):
            mlp.forward = types.MethodType(_mlp_forward, mlp)
    own = functools.partial(model.save_pretrained, selected_adapters=["default"], save_embedding_layers=False)
    model.save_pretrained = own  # type: ignore[method-assign]
    return model


def _forward(self: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """PEFT's, with fewer passes over the activations.

    Under autocast PEFT copies the input to float32, and autocast that to half precision, which the backward pass keeps.
    It scales the adapter's output, [..., out], and so its gradient; here it is what the adapter is in between, [..., r].
    """
    if self.disable_adapters or self.merged or kwargs:
        return type(self).forward(self, x, **kwargs)
    result = self.base_layer(x)
    dtype = result.dtype
    for name in self.active_adapters:
        if name in self.lora_A:
            result = result + self.lora_B[name](_low_rank(self, name, x))
    return result.to(dtype)


def _low_rank(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """What an adapter is between A and B, scaled: [..., in] → [..., r]."""
    a = layer.lora_A[name]
    given = x if torch.is_autocast_enabled(x.device.type) else x.to(a.weight.dtype)
    return a(layer.lora_dropout[name](given)) * layer.scaling[name]


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Qwen's MLP; where it is compiled for a GPU, SwiGLU of base and adapters is one kernel."""
    gate, up = self.gate_proj, self.up_proj
    if not (torch.compiler.is_compiling() and x.is_cuda and 0 < _rank(gate) == _rank(up) <= _LARGEST_RANK):
        return type(self).forward(self, x)
    from arabic_qwen.models.kernels.triton import lora_swiglu  # not every build of PyTorch brings Triton

    parts = []
    for layer in (gate, up):
        (name,) = layer.active_adapters
        base = layer.base_layer(x).flatten(0, -2)
        parts += [base, _low_rank(layer, name, x).flatten(0, -2).to(base.dtype)]
        parts.append(layer.lora_B[name].weight.to(base.dtype))
    return self.down_proj(lora_swiglu(*parts).unflatten(0, x.shape[:-1]))


def _rank(layer: Any) -> int:
    """Of the one adapter that is on; 0 where none or several are, or where its weights are elsewhere (ZeRO-3)."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return 0
    b: Any = layer.lora_B
    (name,) = layer.active_adapters
    return b[name].weight.shape[-1] if name in b else 0


@torch.no_grad()
def grow_embedding(model: Any, rows: int) -> int:
    """Give embedding and head at least `rows` rows; an embedding that is larger already stays as it is.

    A new row is the mean of the old ones, so that each load of the model starts from the same.

    Returns:
        How many rows were added.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return 0
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = layer.weight
        weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
    model.rows_before_growth = old
    return rows - old


def _new_rows(model: PreTrainedModel) -> dict[str, list[int]] | None:
    old: int | None = getattr(model, "rows_before_growth", None)
    if old is None:
        return None
    layers = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return {layer: list(range(old, model.config.vocab_size)) for layer in layers}
