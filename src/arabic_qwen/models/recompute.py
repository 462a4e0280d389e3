"""Which decoder layers recompute their activations in the backward pass, instead of keeping them."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


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
