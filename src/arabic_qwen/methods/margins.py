"""What several preference losses share: losses of one margin a pair, and length averages.

A label that is wrong with probability ε turns a margin's sign, so label smoothing is (1−ε) L(m) + ε L(−m) for each of
them (cDPO, https://ericmitchell.ai/cdpo.pdf).
"""

import torch
from torch.nn.functional import logsigmoid


def logistic(margin: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """−(1−ε) log σ(m) − ε log σ(−m), of any shape."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def hinge(margin: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """(1−ε) max(0, 1−m) + ε max(0, 1+m), of any shape."""
    return (1 - label_smoothing) * torch.relu(1 - margin) + label_smoothing * torch.relu(1 + margin)


def squared(margin: torch.Tensor, target: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """(1−ε)(m − target)² + ε(m + target)², of any shape."""
    return (1 - label_smoothing) * (margin - target) ** 2 + label_smoothing * (margin + target) ** 2


def length_average(logps: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Sums over completions ÷ their target tokens, both [N]; an empty completion's sum, 0, stays 0."""
    return logps / length.clamp(min=1)


def at_least_float32(logps: torch.Tensor) -> torch.Tensor:
    """Half precision is too coarse for differences of sums over hundreds of tokens."""
    return logps.to(torch.promote_types(logps.dtype, torch.float32))


def implicit_rewards(policy: torch.Tensor, reference: torch.Tensor, *, beta: float) -> torch.Tensor:
    """β(log π − log π_ref), for metrics: no gradient (section 4 of https://arxiv.org/abs/2305.18290).

    Args:
        policy, reference: [N] log-probabilities, summed over the completion.
        beta: β.

    Returns:
        [N] rewards.
    """
    return beta * (at_least_float32(policy.detach()) - at_least_float32(reference.detach()))


def average_rewards(policy: torch.Tensor, num_targets: torch.Tensor, *, beta: float) -> torch.Tensor:
    """β log π averaged over the completion's tokens, for metrics: no gradient (eq. 4 of https://arxiv.org/abs/2405.14734).

    Args:
        policy: [C] log-probabilities, summed over the completion.
        num_targets: [C].
        beta: β.

    Returns:
        [C] rewards.
    """
    return beta * at_least_float32(policy.detach()) / num_targets


def mean_by_group(values: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Means of values [M] over those of each group [num_groups]; 0 for a group without any."""
    sums = values.new_zeros(num_groups).index_add(0, group, values)
    counts = values.new_zeros(num_groups).index_add(
        0, group, torch.ones_like(values)
    )  # bincount would wait for the GPU
    return sums / counts.clamp(min=1)
