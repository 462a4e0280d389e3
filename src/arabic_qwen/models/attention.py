"""Exact attention over a packed batch, as an attention implementation of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from arabic_qwen.models.head import matmul_dtype
from arabic_qwen.packing.batch import PackedBatch

PACKED_ATTENTION = "arabic_qwen_packed"

# torch 2.11 takes fewer key heads than query heads without being told.
_GQA: dict = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, query heads, N, head_dim]
    key: torch.Tensor,  # [1, key heads, N, head_dim]
    value: torch.Tensor,  # [1, key heads, N, head_dim]
    attention_mask: torch.Tensor | None,
    packed: PackedBatch | None = None,
    use_flash: bool = False,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of `packed`; PyTorch SDPA for calls without one (generation, padding)."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Under autocast, rotary embedding promotes query and key, and DoRA on a quantised base promotes all three.
    dtype = matmul_dtype(value)
    query, key, value = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    if packed.kv_index is not None:
        key, value = key.index_select(0, packed.kv_index), value.index_select(0, packed.kv_index)
    attend = _varlen if use_flash else _segments
    return attend(query, key, value, packed, scaling).unsqueeze(0), None


def flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and flash_runs_on(torch.cuda.get_device_capability(device), dtype)


def flash_runs_on(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Flash attention needs half precision and an Ampere or newer GPU."""
    return dtype in (torch.bfloat16, torch.float16) and capability >= (8, 0)


def _varlen(query, key, value, packed: PackedBatch, scaling: float | None) -> Any:
    # Causal masking is aligned to the bottom right where a segment has more keys than queries.
    return varlen_attn(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.max_query,
        packed.max_key,
        scale=scaling,
        window_size=(-1, 0),
        **_GQA,
    )


def _segments(query, key, value, packed: PackedBatch, scaling: float | None) -> torch.Tensor:
    """The reference: one SDPA call a segment."""
    dtype = query.dtype
    if query.device.type == "cpu":  # its half-precision kernels are slower than float32
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    splits = (query.split(packed.query_lengths), key.split(packed.key_lengths), value.split(packed.key_lengths))
    for q, k, v in zip(*splits, strict=True):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        mask = None
        if q.shape[2] != k.shape[2]:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).to(dtype)


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
# Mask functions never see packing arguments: packed calls bring no mask, all others get SDPA's.
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
