"""Identity preference optimisation (Azar et al., 2023, https://arxiv.org/abs/2310.12036)."""

from __future__ import annotations

import torch

from arabic_qwen.methods.ipo import IPOConfig
from arabic_qwen.methods.margins import at_least_float32, implicit_rewards, length_average, squared
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores


def ipo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    chosen_length: torch.Tensor,
    rejected_length: torch.Tensor,
    *,
    tau: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(1−ε)(h − 1/(2τ))² + ε(h + 1/(2τ))² with h = Δ_c / len_c − Δ_r / len_r and Δ = log π − log π_ref.

    Eq. 17 of https://arxiv.org/abs/2310.12036. The paper writes h with sums; TRL averages over the tokens, after asking
    its authors, so that the target 1/(2τ) suits completions of any length.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: [N] log-probabilities, summed over the
            completion.
        chosen_length, rejected_length: [N] target tokens of the completions.
        tau: τ > 0; the larger, the closer the policy stays to the reference.
        label_smoothing: ε, the probability that a label is wrong.

    Returns:
        [N] losses.
    """
    chosen = at_least_float32(policy_chosen) - at_least_float32(reference_chosen)
    rejected = at_least_float32(policy_rejected) - at_least_float32(reference_rejected)
    h = length_average(chosen, chosen_length) - length_average(rejected, rejected_length)
    return squared(h, 1 / (2 * tau), label_smoothing)


def objective(config: IPOConfig) -> Objective:
    """IPO as the engine trains it; `beta` scales the rewards that are reported, and nothing else."""

    def loss(scores: Scores) -> Losses:
        losses = ipo_loss(
            *scores.split(scores.policy),
            *scores.split(scores.reference),
            *scores.split(scores.num_targets),
            tau=config.tau,
            label_smoothing=config.label_smoothing,
        )
        return Losses(losses, implicit_rewards(scores.policy, scores.reference, beta=config.beta))

    return Objective(loss, PAIRS, needs_reference=True)
