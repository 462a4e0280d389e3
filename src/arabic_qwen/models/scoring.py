"""The packed forward pass, and the one public door to it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from arabic_qwen.errors import ModelLoadError
from arabic_qwen.models.attention import PACKED_ATTENTION, flash_runs
from arabic_qwen.models.head import matmul_dtype, token_logps
from arabic_qwen.models.layers import decoder_layers, last_layer, set_packed_forward
from arabic_qwen.packing.batch import PackedBatch, pack
from arabic_qwen.packing.bins import best_fit_decreasing
from arabic_qwen.packing.group import Completion, Group


def enable_packed_forward(model: PreTrainedModel, use_flash: bool = True) -> None:
    """Teach a causal language model `model(packed=batch)`, which returns the targets' log-probabilities, [T] float32.

    The head is applied inside the model's own forward, so that wrappers around the model (PEFT, DDP, DeepSpeed,
    autocast) see one ordinary forward pass. Calls without `packed` are unchanged.

    Raises:
        ModelLoadError: the model has sliding-window layers, which packed attention does not compute.
    """
    check_attention(str(model.name_or_path), model.config)
    model.set_attn_implementation(PACKED_ATTENTION)
    set_packed_forward(decoder_layers(model)[-1], last_layer)
    ordinary = type(model).forward

    def forward(self, *args, packed: PackedBatch | None = None, **kwargs):
        if packed is None:
            return ordinary(self, *args, **kwargs)
        head = self.get_output_embeddings().weight
        hidden = self.get_decoder()(
            input_ids=packed.input_ids[None],
            position_ids=packed.position_ids[None],
            attention_mask={"full_attention": None},
            use_cache=False,
            packed=packed,
            use_flash=use_flash and flash_runs(head.device, matmul_dtype(head)),
        ).last_hidden_state[0]
        compiled = getattr(self, "compiled", False)
        return token_logps(hidden, head, packed.target_ids, compiled)

    # Trainer, PEFT and generate() read the arguments' names. Not functools.wraps: accelerate unwraps those.
    setattr(forward, "__signature__", inspect.signature(ordinary))  # noqa: B010
    model.forward = types.MethodType(forward, model)


def check_attention(name: str, model_config: PreTrainedConfig) -> None:
    """Raise ModelLoadError where a model has sliding-window layers, which packed attention does not compute."""
    if set(getattr(model_config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ModelLoadError(
            f"{name}: has attention layers other than full attention, which packed training does not compute; choose a "
            "dense Qwen2.5 or Qwen3 model, or set use_sliding_window to false in its config.json"
        )


def score_completions(
    model: torch.nn.Module,
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    token_budget: int = 8192,
) -> list[list[torch.Tensor]]:
    """Log-probability of every token of every completion, each given its prompt.

    Args:
        model: a causal language model with :func:`enable_packed_forward`, or a PEFT or DDP wrapper around one.
        groups: (prompt_ids, [completion_ids, …]) pairs; prompts must not be empty, completions may be. A prompt is
            computed once for all its completions.
        token_budget: tokens computed at a time.

    Returns:
        For each group, one float32 tensor [len(completion)] per completion, differentiable when gradients are on.

    Raises:
        ValueError: a prompt is empty.
    """
    packable = []
    for number, (prompt, completions) in enumerate(groups):
        if len(prompt) == 0:
            raise ValueError(
                f"groups[{number}]: the prompt is empty, so its completions' first tokens have no probability"
            )
        arrays = [np.asarray(ids, dtype=np.int32).reshape(-1) for ids in completions]
        whole = tuple(Completion(ids, np.ones(len(ids), dtype=bool)) for ids in arrays)
        packable.append(Group(np.asarray(prompt, dtype=np.int32), whole))

    device = next(model.parameters()).device
    scores: list[list[torch.Tensor]] = [[] for _ in groups]
    for members in best_fit_decreasing([group.num_tokens for group in packable], token_budget):
        logps = model(packed=pack([packable[i] for i in members]).to(device))
        lengths = [len(completion.ids) for i in members for completion in packable[i].completions]
        parts = iter(logps.split(lengths))
        for i in members:
            scores[i] = [next(parts) for _ in packable[i].completions]
    return scores
