"""Frozen linear layers that compute in 8-bit floating point (e4m3), with one scale a row, under adapters as always."""

from __future__ import annotations

from typing import Any

import torch

from arabic_qwen.errors import ConfigurationError

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max  # 448
_MULTIPLE = 16  # of both sizes of a weight, for torch._scaled_mm


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [M, K] to e4m3 with a scale for each row: x ≈ values · scale, each element to within 1/16.

    The row's largest element becomes 448, so that nothing overflows; a row with Inf or NaN gives NaN.

    Returns:
        [M, K] e4m3 and [M, 1] float32.
    """
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / _LARGEST
    return (x.float() / scale).to(_E4M3).contiguous(), scale


def _matmul_fp8(a, b, scale_a, scale_b, bias=None) -> torch.Tensor:
    """(a · scale_a) @ (b · scale_b).T + bias in bfloat16; a [M, K], b [N, K] e4m3, scales [M, 1] and [N, 1]."""
    if a.shape[0] == 0:  # the last layer's MLP where no target is; len(a) would be compiled anew for each size
        return a.new_empty(0, len(b), dtype=torch.bfloat16)
    return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), bias=bias, out_dtype=torch.bfloat16)


@torch.compiler.allow_in_graph  # tracing into it, Dynamo fails on the second one in a graph of dynamic shapes
class _FP8Product(torch.autograd.Function):
    """`x @ (weight · scale).T + bias` and its gradient in x; the weight is frozen, so that x need not be kept."""

    @staticmethod
    def forward(ctx, x, weight, scale, weight_t, bias):
        ctx.save_for_backward(weight, scale, weight_t)
        values, row_scale = quantize_rows(x)
        return _matmul_fp8(values, weight, row_scale, scale, bias)

    @staticmethod
    def backward(ctx, grad):  # grad: [M, N]
        weight, scale, weight_t = ctx.saved_tensors
        if weight_t is None:
            weight_t = weight.t().contiguous()
        # The product sums over the weight's rows, so their scales belong to the gradient.
        values, row_scale = quantize_rows(grad.float() * scale.t())
        ones = torch.ones_like(weight_t[:, :1], dtype=torch.float32)
        return _matmul_fp8(values, weight_t, row_scale, ones), None, None, None, None


class FP8Linear(torch.nn.Module):
    """A frozen `torch.nn.Linear` that computes in e4m3 and gives bfloat16, [..., in] → [..., out].

    Args:
        linear: the layer that it replaces.
        trainable: keep a second copy of the weight, transposed, for gradients; without it they are slower.
    """

    def __init__(self, linear: torch.nn.Linear, trainable: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach())
        # Parameters, not buffers: DistributedDataParallel sends buffers to all ranks at each step.
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)
        self.weight_t = torch.nn.Parameter(weight.t().contiguous(), requires_grad=False) if trainable else None
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        product: Any = _FP8Product.apply(rows, self.weight, self.scale, self.weight_t, self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def second_copies(model: torch.nn.Module) -> int:
    """How many of the model's parameters are transposed copies of others."""
    copies = (layer.weight_t for layer in model.modules() if isinstance(layer, FP8Linear))
    return sum(copy.numel() for copy in copies if copy is not None)


@torch.no_grad()
def convert_to_fp8(model: Any, trainable: bool) -> None:
    """Replace, in place, all linear layers of the decoder's blocks by :class:`FP8Linear`; not adapters, nor the head.

    Args:
        model: a causal language model in bfloat16, or a PEFT wrapper around one.
        trainable: for training, not only for evaluation.

    Raises:
        ConfigurationError: a layer's size is no multiple of 16.
    """
    layers = model.get_decoder().layers
    for path, parent in list(layers.named_modules()):
        if isinstance(parent, torch.nn.ModuleDict):  # PEFT's, of the adapters on one layer
            continue
        for name, linear in parent.named_children():
            if type(linear) is not torch.nn.Linear:
                continue
            if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
                raise ConfigurationError(
                    f"base_precision: fp8 needs sizes that are multiples of {_MULTIPLE}, layer {path}.{name} has "
                    f"{linear.in_features} × {linear.out_features}; set it to null"
                )
            setattr(parent, name, FP8Linear(linear, trainable))
