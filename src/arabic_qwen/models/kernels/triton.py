"""Triton kernels, for compiled runs on a GPU: what torch.compile does not fuse by itself."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton


@triton.jit
def _head_scores(logits, targets, logps, lse, num_cols: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_cols
    cols = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, num_cols, BLOCK):
        values = tl.load(logits + start + cols, start + cols < num_cols, -float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)
        largest = larger
    norm = largest + tl.log(total)
    target = tl.load(targets + row)
    tl.store(logps + row, tl.load(logits + target).to(tl.float32) - norm)
    tl.store(lse + row, norm)
    if WRITE:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, num_cols, BLOCK):
            inside = start + cols < num_cols
            values = tl.load(logits + start + cols, inside, 0.0).to(tl.float32)
            onehot = (start + cols == target).to(tl.float32)
            tl.store(logits + start + cols, (tl.exp(values - norm) - onehot).to(logits.dtype.element_ty), inside)


def head_scores(logits: torch.Tensor, targets: torch.Tensor, with_difference: bool) -> tuple:
    """[rows] log-probabilities and log-sum-exps of [rows, V] logits, in float32, and softmax − onehot in their place.

    The logits are read twice and written once; without `with_difference` they are read once, and the third is None.
    """
    logps = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    lse = torch.empty_like(logps)
    with torch.cuda.device(logits.device):  # Triton launches on the current one
        _head_scores[(len(logits),)](
            logits, targets, logps, lse, logits.shape[1], WRITE=with_difference, BLOCK=8192, num_warps=8
        )
    return logps, lse, logits if with_difference else None


@triton.jit
def _adapted(base, a, b, rows, cols, inside, num_rows, num_cols, RANK: tl.constexpr, PADDED: tl.constexpr):
    """A tile of base + a @ b.T in float32, rounded where two operations would round."""
    k = tl.arange(0, PADDED)
    left = tl.load(a + rows[:, None] * RANK + k[None, :], (rows[:, None] < num_rows) & (k[None, :] < RANK), 0.0)
    right = tl.load(b + cols[None, :] * RANK + k[:, None], (cols[None, :] < num_cols) & (k[:, None] < RANK), 0.0)
    value = tl.load(base + rows[:, None].to(tl.int64) * num_cols + cols[None, :], inside, 0.0)
    product = tl.dot(left, right).to(value.dtype)
    return (value.to(tl.float32) + product.to(tl.float32)).to(value.dtype).to(tl.float32)


@triton.jit
def _swiglu(
    gate, gate_a, gate_b, up, up_a, up_b, output, num_rows, num_cols,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    g = _adapted(gate, gate_a, gate_b, rows, cols, inside, num_rows, num_cols, RANK, PADDED)
    u = _adapted(up, up_a, up_b, rows, cols, inside, num_rows, num_cols, RANK, PADDED)
    dtype = output.dtype.element_ty
    silu = (g / (1 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(output + rows[:, None].to(tl.int64) * num_cols + cols[None, :], (silu * u).to(dtype), inside)


@triton.jit
def _swiglu_backward(
    grad, gate, gate_a, gate_b, up, up_a, up_b, grad_gate, grad_up, num_rows, num_cols,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    at = rows[:, None].to(tl.int64) * num_cols + cols[None, :]
    g = _adapted(gate, gate_a, gate_b, rows, cols, inside, num_rows, num_cols, RANK, PADDED)
    u = _adapted(up, up_a, up_b, rows, cols, inside, num_rows, num_cols, RANK, PADDED)
    dtype = grad.dtype.element_ty
    d = tl.load(grad + at, inside, 0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    silu = (g * sigmoid).to(dtype).to(tl.float32)
    through = (d * u).to(dtype).to(tl.float32)
    tl.store(grad_up + at, (d * silu).to(dtype), inside)
    tl.store(grad_gate + at, (through * sigmoid * (1 + g * (1 - sigmoid))).to(dtype), inside)


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], rank: int, warps: int) -> None:
    rows, cols = tensors[-1].shape
    grid = (triton.cdiv(cols, 128), triton.cdiv(rows, 32))  # the fastest of eleven on an H100, at rank 16
    padded = max(16, triton.next_power_of_2(rank))
    wrap_triton(kernel)[grid](*tensors, rows, cols, RANK=rank, PADDED=padded, ROWS=32, COLS=128, num_warps=warps)


@triton_op("arabic_qwen::lora_swiglu", mutates_args=())
def lora_swiglu(
    gate: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    up: torch.Tensor,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
) -> torch.Tensor:
    """silu(gate + gate_a @ gate_b.T) * (up + up_a @ up_b.T), and its gradient, in one pass over the activations each.

    Args:
        gate, up: [N, I], what the base's layers give, in half precision.
        gate_a, up_a: [N, r], what the adapters are in between, scaled.
        gate_b, up_b: [I, r], the adapters' B.

    Returns:
        [N, I]; rounded where torch's operations would round.
    """
    output = torch.empty_like(gate)
    _launch(_swiglu, (gate, gate_a, gate_b, up, up_a, up_b, output), gate_a.shape[1], warps=4)
    return output


@triton_op("arabic_qwen::lora_swiglu_backward", mutates_args=())
def _lora_swiglu_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    up: torch.Tensor,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    grads = torch.empty_like(gate), torch.empty_like(up)
    _launch(_swiglu_backward, (grad, gate, gate_a, gate_b, up, up_a, up_b, *grads), gate_a.shape[1], warps=8)
    return grads


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    _, gate_a, gate_b, _, up_a, up_b = ctx.saved_tensors
    d_gate, d_up = _lora_swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
    return d_gate, d_gate @ gate_b, d_gate.T @ gate_a, d_up, d_up @ up_b, d_up.T @ up_a


lora_swiglu.register_autograd(_gradients, setup_context=_save)
