"""Contrastive preference optimisation (Xu et al., 2024, https://arxiv.org/abs/2401.08417), any number of negatives."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arabic_qwen.methods.cpo import CPOConfig
from arabic_qwen.methods.margins import (
    at_least_float32,
    average_rewards,
    hinge,
    length_average,
    logistic,
    mean_by_group,
    squared,
)
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores
from arabic_qwen.methods.sft.loss import chosen_nll

CPO_LOSSES: dict[str, Callable[[torch.Tensor, float, float, float], torch.Tensor]] = {
    "sigmoid": lambda margin, beta, gamma, epsilon: logistic(beta * margin, epsilon),
    "hinge": lambda margin, beta, gamma, epsilon: hinge(beta * margin, epsilon),
    "ipo": lambda margin, beta, gamma, epsilon: squared(margin, 1 / (2 * beta), epsilon),
    "simpo": lambda margin, beta, gamma, epsilon: logistic(beta * margin - gamma, epsilon),
}
"""(log π(y_c) − log π(y_r) [M], β, γ, ε) -> losses [M]."""

LENGTH_AVERAGED = frozenset({"ipo", "simpo"})
"""Loss types whose margin is of averages over the completions' tokens, not of sums."""

NEGATIVES = ("mean", "softmax")


def _softmax_loss(margin: torch.Tensor, row: torch.Tensor, num_rows: int, epsilon: float) -> torch.Tensor:
    """Cross entropy of each row's softmax over 1 + K completions, from margins [M] of the first over the others."""
    largest = margin.new_zeros(num_rows).scatter_reduce(0, row, -margin.detach(), "amax")  # among them y_c's own, 0
    others = margin.new_zeros(num_rows).index_add(0, row, torch.exp(-margin - largest[row]))
    loss = largest + torch.log1p(torch.expm1(-largest) + others)  # log(1 + Σ exp(−margin))
    return loss + epsilon * mean_by_group(margin, row, num_rows)


def cpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    rejected_group: torch.Tensor,
    chosen_length: torch.Tensor | None = None,
    rejected_length: torch.Tensor | None = None,
    *,
    beta: float,
    cpo_alpha: float = 0.0,
    simpo_gamma: float = 1.0,
    loss_type: str = "sigmoid",
    negatives: str = "mean",
    label_smoothing: float = 0.0,
    mean_chosen_length: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Preference of a row's chosen completion over its K ≥ 0 negatives, plus cpo_alpha · NLL of the chosen one.

    With m_k = log π(y_c) − log π(y_k), the preference term of a row is, for `negatives`

    - "mean": (1/K) Σ_k of −log σ(β m_k) (sigmoid; eq. 3 of https://arxiv.org/abs/2401.08417 when K = 1), of
      max(0, 1 − β m_k) (hinge), of (m_k − 1/(2β))² (ipo) or of −log σ(β m_k − γ) (simpo); for the last two, log π is
      the average over the tokens. Label smoothing makes each (1−ε) L + ε L of the opposite sign.
    - "softmax": −log(exp(β log π(y_c)) / (exp(β log π(y_c)) + Σ_k exp(β log π(y_k)))), the loss of S-DPO
      (https://arxiv.org/abs/2406.09215) without a reference. Label smoothing shares ε among the negatives. K = 1 is the
      sigmoid loss.

    It is 0 for a row without negatives. The NLL term is `chosen_nll`: the mean over the step's rows is
    cpo_alpha · Σ −log π(y_c) / the step's chosen tokens, however the step is cut.

    Args:
        policy_chosen: [N] log-probabilities of the chosen completions, summed over the completion.
        policy_rejected: [M] those of all rows' negatives, in any order.
        rejected_group: [M] int64 in [0, N), the row of each negative.
        chosen_length, rejected_length: [N] and [M] target tokens; for "ipo" and "simpo".
        beta: β > 0, scale of the rewards; τ for "ipo".
        cpo_alpha: weight of the NLL; 0 gives the preference term alone.
        simpo_gamma: γ of "simpo", a margin of rewards: not multiplied by β.
        loss_type: a key of `CPO_LOSSES`.
        negatives: one of `NEGATIVES`; "softmax" for loss_type "sigmoid" only.
        label_smoothing: ε, the probability that a label is wrong.
        mean_chosen_length: target tokens of the step's chosen completions / rows of the step; for a `cpo_alpha` not 0.

    Returns:
        [N] losses.

    Raises:
        ValueError: unknown `loss_type` or `negatives`, or two that do not go together.
    """
    if loss_type not in CPO_LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose one of {', '.join(CPO_LOSSES)}")
    if negatives not in NEGATIVES:
        raise ValueError(f"unknown negatives {negatives!r}; choose one of {', '.join(NEGATIVES)}")
    if negatives == "softmax" and loss_type != "sigmoid":
        raise ValueError(f"negatives 'softmax' needs loss_type 'sigmoid', got {loss_type!r}: set one of the two back")
    policy_chosen = chosen = at_least_float32(policy_chosen)
    rejected = at_least_float32(policy_rejected)
    if loss_type in LENGTH_AVERAGED:
        assert chosen_length is not None and rejected_length is not None, "pass the completions' lengths"
        chosen, rejected = length_average(chosen, chosen_length), length_average(rejected, rejected_length)
    margin, num_rows = chosen[rejected_group] - rejected, len(chosen)
    if negatives == "softmax":
        loss = _softmax_loss(beta * margin, rejected_group, num_rows, label_smoothing)
    else:
        pairwise = CPO_LOSSES[loss_type](margin, beta, simpo_gamma, label_smoothing)
        loss = mean_by_group(pairwise, rejected_group, num_rows)
    if cpo_alpha:
        assert mean_chosen_length is not None, "pass the step's mean_chosen_length"
        loss = loss + cpo_alpha * chosen_nll(policy_chosen, mean_length=mean_chosen_length)
    return loss


def objective(config: CPOConfig) -> Objective:
    """CPO as the engine trains it; its rewards are β log π, or of averages where the loss compares those."""

    def loss(scores: Scores) -> Losses:
        chosen, rejected = scores.split(scores.policy)
        chosen_length, rejected_length = scores.split(scores.num_targets)
        losses = cpo_loss(
            chosen,
            rejected,
            scores.completion_group[scores.rejected],
            chosen_length,
            rejected_length,
            beta=config.beta,
            cpo_alpha=config.cpo_alpha,
            simpo_gamma=config.simpo_gamma,
            loss_type=config.loss_type,
            negatives=config.negatives,
            label_smoothing=config.label_smoothing,
            mean_chosen_length=scores.mean_chosen_length,
        )
        averaged = config.loss_type in LENGTH_AVERAGED
        rewards = average_rewards(scores.policy, scores.num_targets, beta=config.beta)
        return Losses(losses, rewards if averaged else config.beta * scores.policy)

    return Objective(loss, PAIRS)
