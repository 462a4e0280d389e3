"""Odds ratio preference optimisation (Hong et al., 2024, https://arxiv.org/abs/2403.07691)."""

from __future__ import annotations

import torch

from arabic_qwen.methods.margins import at_least_float32, average_rewards, length_average, logistic
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores
from arabic_qwen.methods.orpo import ORPOConfig
from arabic_qwen.methods.sft.loss import chosen_nll


def log_odds(average_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) of p = exp(average_logps), of any shape (eq. 4 of https://arxiv.org/abs/2403.07691).

    p is kept one machine epsilon below 1, where odds and their gradient are finite still.
    """
    average_logps = average_logps.clamp(max=-torch.finfo(average_logps.dtype).eps)
    return average_logps - torch.log(-torch.expm1(average_logps))


def orpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    chosen_length: torch.Tensor,
    rejected_length: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """−λ log σ(log odds(y_c) − log odds(y_r)), where p(y) = exp(log π(y) / len).

    Eq. 7 of https://arxiv.org/abs/2403.07691, times λ. The other term of the objective, eq. 6, is the chosen
    completions' NLL: `arabic_qwen.methods.sft.loss.chosen_nll`.

    Args:
        policy_chosen, policy_rejected: [N] log-probabilities, summed over the completion.
        chosen_length, rejected_length: [N] target tokens of the completions.
        beta: the paper's λ.

    Returns:
        [N] losses.
    """
    chosen = log_odds(length_average(at_least_float32(policy_chosen), chosen_length))
    rejected = log_odds(length_average(at_least_float32(policy_rejected), rejected_length))
    return beta * logistic(chosen - rejected)


def objective(config: ORPOConfig) -> Objective:
    """ORPO as the engine trains it: the odds ratio, and the chosen completions' NLL over the step's tokens."""

    def loss(scores: Scores) -> Losses:
        chosen, rejected = scores.split(scores.policy)
        chosen_length, rejected_length = scores.split(scores.num_targets)
        preference = orpo_loss(chosen, rejected, chosen_length, rejected_length, beta=config.beta)
        losses = preference + chosen_nll(chosen, mean_length=scores.mean_chosen_length)
        return Losses(losses, average_rewards(scores.policy, scores.num_targets, beta=config.beta))

    return Objective(loss, PAIRS)
