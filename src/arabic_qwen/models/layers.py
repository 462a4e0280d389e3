"""The decoder's layers in a packed pass: what computes them, and which recompute their activations in the backward pass."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from arabic_qwen.packing.batch import PackedBatch

# transformers recomputes a layer in its __call__, or (newer) in a wrapper around its class's forward.
_RECOMPUTED_OUTSIDE = "__call__" in vars(GradientCheckpointingLayer)


def decoder_layers(model: Any) -> list[Any]:
    """The layers that can recompute, first to last; also of a model that PEFT or DDP has wrapped."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_first(model: Any, count: int) -> None:
    """Let the first `count` decoder layers recompute, and the others keep their activations.

    The first, because the backward pass reaches them last: what the others kept is free again by then.
    """
    for number, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def packed_forwards(model: Any) -> list[tuple[Any, Callable]]:
    """Each decoder layer with the function (layer, hidden_states, packed=…) that computes it, without recomputing."""
    layers = decoder_layers(model)
    ordinary = [type(layer).forward if _RECOMPUTED_OUTSIDE else type(layer).forward.__wrapped__ for layer in layers]
    return list(zip(layers, [*ordinary[:-1], last_layer], strict=True))


def last_layer(layer: Any, hidden_states: torch.Tensor, packed: PackedBatch, **kwargs: Any) -> torch.Tensor:
    """The last layer of Qwen2 and Qwen3 where a target is predicted, [1, N, H] → [1, T, H].

    Its attention needs the keys and values of every token. Its MLP, most of the layer, is left out for the others.
    """
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), packed=packed, **kwargs)
    hidden_states = (hidden_states + attended)[:, packed.target_index]
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def set_packed_forward(layer: Any, packed_forward: Callable) -> None:
    """Let `packed_forward` compute `layer(hidden_states, packed=…)`; other calls (generation) stay as they are."""
    ordinary = type(layer).forward

    def forward(self, hidden_states, *args, packed=None, **kwargs):
        if packed is None:
            return ordinary(self, hidden_states, *args, **kwargs)
        run = functools.partial(packed_forward, self, packed=packed, **kwargs)
        if self.gradient_checkpointing and self.training and not _RECOMPUTED_OUTSIDE:
            return self._gradient_checkpointing_func(run, hidden_states, *args)
        return run(hidden_states, *args)

    layer.forward = types.MethodType(forward, layer)
