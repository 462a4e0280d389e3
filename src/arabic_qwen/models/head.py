"""Token log-probabilities from hidden states, without the [tokens, vocabulary] logits."""

from __future__ import annotations

import torch


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The precision in which a product with `weight` is computed."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def token_logps(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compiled: bool = False
) -> torch.Tensor:
    """Log-probability of each target under the language-model head.

    Equal to `torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]`, computed in
    chunks that are never kept.

    Args:
        hidden: [T, H] hidden states that predict the targets.
        weight: [V, H] weight of the head.
        targets: [T] token ids.
        compiled: on a GPU, use a kernel for the softmax, so that the forward pass holds no logits in float32.

    Returns:
        [T] float32, differentiable with respect to `hidden` and `weight`.
    """
    dtype = matmul_dtype(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden.to(dtype), weight.to(dtype), targets, compiled)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, fused: bool = False) -> range:
    """Start rows of chunks that take about half a gigabyte on a GPU, 128 MiB on a processor.

    In float32 and twice in the product's precision; fused, once in the latter.
    """
    elements = 2**24 if hidden.device.type == "cpu" else 2**28 if fused else 2**26
    return range(0, len(hidden), max(1, elements // len(weight)))


def _difference(logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """softmax − onehot, in the place of the float32 logits; subtracted in float32, for confident tokens it is small."""
    softmax = logits.sub_(lse[:, None]).exp_()
    softmax.scatter_add_(-1, targets[:, None], softmax.new_full((len(softmax), 1), -1.0))
    return softmax.to(dtype)


def _eager(logits: torch.Tensor, targets: torch.Tensor, with_difference: bool) -> tuple:
    """[rows] log-probabilities and log-sum-exps, and softmax − onehot [rows, V] or None, of [rows, V] logits."""
    dtype, logits = logits.dtype, logits.float()
    lse = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - lse
    return logps, lse, _difference(logits, lse, targets, dtype) if with_difference else None


class _TokenLogps(torch.autograd.Function):
    """d logp_t / d hidden_t = weight[target_t] − softmax_t @ weight; d logp_t / d weight = (onehot_t − softmax_t) hidden_tᵀ.

    The first needs nothing of the incoming gradient but a factor per row, so the forward pass computes it while the
    logits are at hand. The second sums over rows: the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        fused = compiled and hidden.is_cuda
        scores = _eager
        if fused:
            from arabic_qwen.models.kernels import triton as kernels  # not every build of PyTorch brings Triton

            scores = kernels.head_scores
        rows = _chunks(hidden, weight, fused)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(logps)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in rows:
            chunk = slice(start, start + rows.step)
            logps[chunk], lse[chunk], difference = scores(hidden[chunk] @ weight.T, targets[chunk], slope is not None)
            if slope is not None:
                torch.mm(difference, weight, out=slope[chunk])
        weight_trained = ctx.needs_input_grad[1]
        ctx.save_for_backward(slope, *((hidden, weight, targets, lse) if weight_trained else ()))
        return logps

    @staticmethod
    def backward(ctx, grad):  # grad: [T]
        slope, *for_weight = ctx.saved_tensors
        grad_hidden = -grad.to(slope.dtype)[:, None] * slope if slope is not None else None
        grad_weight = None
        if for_weight:
            hidden, weight, targets, lse = for_weight
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            rows = _chunks(hidden, weight)
            for start in rows:
                chunk = slice(start, start + rows.step)
                difference = _difference((hidden[chunk] @ weight.T).float(), lse[chunk], targets[chunk], weight.dtype)
                grad_weight -= difference.T @ (grad[chunk, None] * hidden[chunk]).to(weight.dtype)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None
