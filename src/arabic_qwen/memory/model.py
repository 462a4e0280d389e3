"""How much memory a training step takes, from a model's configuration alone: nothing is loaded, nothing is computed."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig

from arabic_qwen.config import BaseConfig
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.layers import decoder_layers, last_layer, set_packed_forward

#: Bytes a parameter of the frozen linear layers: NF4 in blocks of 64, whose scales take a byte, and a float32 for 256 of
#: these; int8; two byte copies, one of them transposed for the gradient.
_QUANTIZED = {"load_in_4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "load_in_8bit": 1.0, "fp8": 2.0}
#: Of what a layer keeps when each operation runs by itself, what it keeps when compiled: by this, 8,192 tokens of the 7B
#: shape peak at the 56 GB that were measured on an H100.
COMPILED_SHARE = 0.77
_HEAD_CHUNK, _HEAD_CHUNK_PROCESSOR = 2**29, 2**27  # bytes (models/logps.py)
_HEAD_BYTES = 8  # a logit, where one chunk holds all


#: Trained tensors below this size keep float32 moments in the 8-bit optimizer, as embeddings of any size do.
_SMALLEST_8BIT = 4096


def moment_bytes(module: torch.nn.Module, eight_bit: bool) -> float:
    """Bytes that AdamW's two moments of the module's trained parameters take.

    Args:
        eight_bit: bitsandbytes' AdamW, which keeps a float32 scale for each 256 elements of a moment.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    total = 0.0
    for parameter in module.parameters():
        if parameter.requires_grad:
            small = parameter.numel() < _SMALLEST_8BIT or id(parameter) in embeddings
            total += parameter.numel() * (2 * (1 + 4 / 256) if eight_bit and not small else 8)
    return total


class ModelShape(NamedTuple):
    """What memory and time depend on."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    attention: int  # query heads × their size
    keys: int  # key heads × their size
    linear: int  # parameters of the layers' linear weights
    others: int  # all other parameters; a head that is tied to the embedding counts once
    adapters: int  # parameters; 0 without LoRA
    widest: int  # inputs of the widest layer that has an adapter; 0 without LoRA
    moments: float  # bytes of the optimizer's, for what is trained
    kept: float  # bytes a token that a layer keeps for its backward pass, not compiled
    kept_attention: float  # of these, what is before the MLP
    kept_plain: float  # the same as `kept` without dropout
    kept_always: float  # bytes that a layer keeps whatever the tokens: DoRA's copies of its weights

    @property
    def parameters(self) -> int:
        return self.linear + self.others


class Memory(NamedTuple):
    """Bytes at the peak of a step, of what PyTorch allocates."""

    weights: float
    reference: float  # a second model
    optimizer: float  # gradients and moments
    activations: float
    head: float  # or the working set of a layer, less what of the activations is gone by then

    @property
    def total(self) -> float:
        return sum(self)


def model_shape(model_config: PreTrainedConfig, config: BaseConfig, dtype: torch.dtype) -> ModelShape:
    """The shape of a model with the adapters that `config` asks for, computed in `dtype`.

    Raises:
        ConfigurationError: `lora_target_modules` names layers that the model lacks.
    """
    one = type(model_config).from_dict(
        model_config.to_dict() | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    )
    one._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(one, dtype=dtype if config.use_lora else torch.float32)
        (layer,) = decoder_layers(model)
        linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
        a_layer = sum(parameter.numel() for parameter in layer.parameters())
        outside = sum(parameter.numel() for parameter in model.parameters()) - a_layer
        adapters = 0
        if config.use_lora:
            # fp8 layers compute in bfloat16 only.
            precision = config.base_precision if dtype is torch.bfloat16 else None
            update = {"init_lora_weights": "default", "base_precision": precision}
            model = add_lora(model, config.model_copy(update=update))
            adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        eight_bit = config.optim == "adamw_8bit"
        of_layer = moment_bytes(layer, eight_bit)
    layers, heads = model_config.num_hidden_layers, model_config.num_attention_heads
    size = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    width = model_config.hidden_size
    set_packed_forward(layer, last_layer)
    kept, always = _kept_a_token(layer.train(), width, dtype, size)
    kept_attention, _ = _kept_a_token(layer, width, dtype, size, mlp=False)
    kept_plain, _ = _kept_a_token(layer.eval(), width, dtype, size)
    # A processor keeps dropout's masks in the precision of its input, which is float32 with DoRA; a GPU keeps bytes.
    masks = ((4 if config.use_dora else dtype.itemsize) - 1) * bool(config.lora_dropout)
    return ModelShape(
        layers=layers,
        hidden=width,
        intermediate=model_config.intermediate_size,
        vocabulary=model_config.vocab_size,
        attention=heads * size,
        keys=model_config.num_key_value_heads * size,
        linear=layers * linear,
        others=layers * (a_layer - linear) + outside,
        adapters=layers * adapters,
        widest=max((one.in_features for one in _adapted(layer)), default=0),
        moments=moment_bytes(model, eight_bit) + (layers - 1) * of_layer,
        kept=kept - masks * sum(one.in_features for one in _adapted(layer)),
        kept_attention=kept_attention - masks * sum(one.in_features for one in _adapted(layer.self_attn)),
        kept_plain=kept_plain,
        kept_always=always if config.use_dora and config.use_lora else 0.0,
    )


def _adapted(module: torch.nn.Module) -> list[Any]:
    return [one for one in module.modules() if isinstance(one, LoraLayer)]


def _kept_a_token(
    layer: Any, width: int, dtype: torch.dtype, head_size: int, *, mlp: bool = True
) -> tuple[float, float]:
    """Bytes that one layer keeps for each token, and for none; with its MLP or without."""
    less, more = (_kept(layer, width, dtype, head_size, tokens, mlp) for tokens in (128, 256))
    return (more - less) / 128, 2 * less - more


@dataclasses.dataclass(eq=False)
class _Saved:
    """A tensor that autograd holds."""

    tensor: torch.Tensor


def _kept(layer: Any, width: int, dtype: torch.dtype, head_size: int, tokens: int, mlp: bool) -> int:
    """Bytes that one layer keeps for `tokens` tokens: the storages that autograd saves, without the parameters'."""
    saved = weakref.WeakSet[_Saved]()  # what is not part of the output's graph is free again

    def keep(tensor: torch.Tensor) -> _Saved:
        one = _Saved(tensor)
        saved.add(one)
        return one

    # Tensors without contents that pass as a processor's, for autocast leaves meta tensors alone.
    with FakeTensorMode():
        parameters = {
            name: torch.empty(parameter.shape, dtype=parameter.dtype, requires_grad=parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        }
        hidden = torch.empty(1, tokens, width, dtype=dtype, requires_grad=True)
        rotary = (torch.empty(1, tokens, head_size, dtype=dtype),) * 2
        given: dict[str, Any] = {"position_embeddings": rotary, "attention_mask": None}
        if not mlp:  # what the last layer leaves out where nothing is a target
            given["packed"] = SimpleNamespace(target_index=torch.arange(0))
        autocast = torch.autocast("cpu", dtype, dtype is not torch.float32)
        with saved_tensors_hooks(keep, lambda one: one.tensor), autocast:
            output = torch.func.functional_call(layer, parameters, (hidden,), given)
        storages = [tensor.untyped_storage() for tensor in (hidden, *(one.tensor for one in saved))]
        own = {parameter.untyped_storage()._cdata for parameter in parameters.values()}
        kept = sum({storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in own}.values())
        del output
    return kept


def frozen_bytes(shape: ModelShape, config: BaseConfig, dtype: torch.dtype) -> float:
    """Bytes of weights that are not trained, as `config` has them loaded for computation in `dtype`."""
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if getattr(config, key)), None)
    quantized = quantized or config.base_precision
    return shape.linear * _QUANTIZED.get(quantized or "", dtype.itemsize) + shape.others * dtype.itemsize


def step_memory(
    shape: ModelShape,
    config: BaseConfig,
    dtype: torch.dtype,
    *,
    tokens: int,
    targets: int,
    recomputed: int,
    gathered: int = 0,
    reference: float = 0.0,
    compiled: bool = False,
    on_gpu: bool = True,
) -> Memory:
    """The peak of a step whose largest micro-batch has `tokens` tokens, `targets` of them targets.

    Args:
        recomputed: decoder layers that recompute their activations.
        gathered: keys that attention sees beyond those of the tokens: a shared prompt's, for each of its completions.
        reference: bytes of a second model, which is in memory beside the policy.
        compiled: whether the layers are compiled.
    """
    size = dtype.itemsize
    trained = shape.adapters if config.use_lora else shape.parameters
    masters = 4 * trained
    hidden, wide = tokens * shape.hidden * size, tokens * shape.intermediate * size
    # Autocast keeps a copy of each trained weight in the precision of computation until the forward pass ends.
    fixed = (size * trained if size < 4 else 0) + recomputed * hidden  # the hidden states are inputs of layers
    share = COMPILED_SHARE if compiled else 1.0
    always = shape.kept_always + 2 * gathered * shape.keys * size
    a_layer = always + share * shape.kept * tokens
    # The last layer has no MLP but where a target is predicted.
    last = always + share * (shape.kept_attention * tokens + (shape.kept - shape.kept_attention) * targets)
    others = max(shape.layers - recomputed - 1, 0) * a_layer
    # Hidden states at targets after the last layer: normed, in float32, and its gradient.
    kept = others + (last if recomputed < shape.layers else 0) + (2 * size + 4) * targets * shape.hidden

    chunk = _HEAD_CHUNK if on_gpu else _HEAD_CHUNK_PROCESSOR
    head = min(chunk, _HEAD_BYTES * targets * shape.vocabulary) + 2 * targets * shape.hidden * size
    if not config.use_lora:
        head += 4 * shape.vocabulary * shape.hidden  # its weight's gradient
    expanded = _expanded(shape, config, size, compiled)
    gradients = 2 * wide + 2 * hidden  # in the widest part of a layer, less what they free
    again = a_layer + wide + 3 * hidden + expanded + tokens * _rounded(shape, config, compiled)
    peak = max(
        kept + head,
        kept + gradients * targets / tokens + expanded,  # the last layer's
        others + gradients + expanded if others else 0,  # when the last layer's are done
        again if recomputed else 0,  # and those of all that need not be computed again
    )
    return Memory(
        weights=masters + (frozen_bytes(shape, config, dtype) if config.use_lora else 0),
        reference=reference,
        optimizer=4 * trained + shape.moments,
        activations=fixed + kept,
        head=peak - kept,
    )


def _expanded(shape: ModelShape, config: BaseConfig, size: int, compiled: bool) -> float:
    """Bytes of the largest weight where its product needs it in another form, `size` bytes a parameter."""
    if config.use_dora:  # and the identity matrix that PEFT multiplies adapters by, as float32 too
        return (4.0 + size) * shape.widest**2 + size * shape.widest * shape.hidden
    if not (config.load_in_4bit or config.load_in_8bit):
        return 0.0
    at_once = 2 if config.load_in_4bit and compiled else 1
    return float(at_once * size * shape.intermediate * shape.hidden)


def _rounded(shape: ModelShape, config: BaseConfig, compiled: bool) -> int:
    """Bytes a token of copies in which an input is rounded, less what the layer does not keep yet: by peaks on an H100.

    They are float16, its magnitude and int8; with FP8, and with DoRA, float32 twice.
    """
    if config.use_dora:
        return 5 * shape.widest
    if config.load_in_8bit:
        return 3 * shape.intermediate
    return 5 * shape.intermediate if config.base_precision == "fp8" and not compiled else 0
