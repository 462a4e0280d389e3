"""Token log-probabilities from hidden states, without the [tokens, vocabulary] logits."""

from __future__ import annotations

import torch


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target under the language-model head.

    Equal to `torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]`, computed in
    chunks that are never kept.

    Args:
        hidden: [T, H] hidden states that predict the targets.
        weight: [V, H] weight of the head.
        targets: [T] token ids.

    Returns:
        [T] float32, differentiable with respect to `hidden` and `weight`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return _TokenLogps.apply(hidden.to(dtype), weight.to(dtype), targets)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> range:
    """Start rows of chunks whose float32 logits take about half a gigabyte on an accelerator, 64 MiB on a processor."""
    elements = 2**24 if hidden.device.type == "cpu" else 2**27
    return range(0, len(hidden), max(1, elements // len(weight)))


class _TokenLogps(torch.autograd.Function):
    """d logp_t / d hidden_t = weight[target_t] − softmax_t @ weight; d logp_t / d weight = (onehot_t − softmax_t) hidden_tᵀ.

    The first needs nothing of the incoming gradient but a factor per row, so the forward pass computes it while the
    logits are at hand. The second sums over rows: the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        rows = _chunks(hidden, weight)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(logps)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in rows:
            chunk = slice(start, start + rows.step)
            logits = (hidden[chunk] @ weight.T).float()
            lse[chunk] = logits.logsumexp(-1)
            logps[chunk] = logits.gather(-1, targets[chunk, None])[:, 0] - lse[chunk]
            if slope is not None:
                # The one-hot is subtracted in float32: for confident tokens the difference is small.
                softmax = logits.sub_(lse[chunk, None]).exp_()
                softmax.scatter_add_(-1, targets[chunk, None], softmax.new_full((len(softmax), 1), -1.0))
                slope[chunk] = -(softmax.to(weight.dtype) @ weight)
        weight_trained = ctx.needs_input_grad[1]
        ctx.save_for_backward(slope, *((hidden, weight, targets, lse) if weight_trained else ()))
        return logps

    @staticmethod
    def backward(ctx, grad):  # grad: [T]
        slope, *for_weight = ctx.saved_tensors
        grad_hidden = grad.to(slope.dtype)[:, None] * slope if slope is not None else None
        grad_weight = None
        if for_weight:
            hidden, weight, targets, lse = for_weight
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            rows = _chunks(hidden, weight)
            for start in rows:
                chunk = slice(start, start + rows.step)
                logits = (hidden[chunk] @ weight.T).float()
                softmax = logits.sub_(lse[chunk, None]).exp_()
                softmax.scatter_add_(-1, targets[chunk, None], softmax.new_full((len(softmax), 1), -1.0))
                grad_weight -= softmax.to(weight.dtype).T @ (grad[chunk, None] * hidden[chunk]).to(weight.dtype)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None
