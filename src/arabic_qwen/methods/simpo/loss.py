"""Simple preference optimisation (Meng et al., 2024, https://arxiv.org/abs/2405.14734)."""

from __future__ import annotations

import torch

from arabic_qwen.methods.margins import at_least_float32, average_rewards, length_average, logistic
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores
from arabic_qwen.methods.simpo import SimPOConfig


def simpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    chosen_length: torch.Tensor,
    rejected_length: torch.Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """−(1−ε) log σ(m) − ε log σ(−m) with m = β (log π(y_c) / len_c − log π(y_r) / len_r) − γ, γ = β · gamma_beta_ratio.

    Eq. 6 of https://arxiv.org/abs/2405.14734 at ε = 0.

    Args:
        policy_chosen, policy_rejected: [N] log-probabilities, summed over the completion.
        chosen_length, rejected_length: [N] target tokens of the completions.
        beta: scale of the rewards, β.
        gamma_beta_ratio: the margin by which the average log-probability of the chosen one is to win, γ/β.
        label_smoothing: ε, the probability that a label is wrong.

    Returns:
        [N] losses.
    """
    chosen = length_average(at_least_float32(policy_chosen), chosen_length)
    rejected = length_average(at_least_float32(policy_rejected), rejected_length)
    return logistic(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)


def objective(config: SimPOConfig) -> Objective:
    """SimPO as the engine trains it; its rewards are β log π, averaged over the tokens."""

    def loss(scores: Scores) -> Losses:
        losses = simpo_loss(
            *scores.split(scores.policy),
            *scores.split(scores.num_targets),
            beta=config.beta,
            gamma_beta_ratio=config.gamma_beta_ratio,
            label_smoothing=config.label_smoothing,
        )
        return Losses(losses, average_rewards(scores.policy, scores.num_targets, beta=config.beta))

    return Objective(loss, PAIRS)
