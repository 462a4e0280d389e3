"""Supervised fine-tuning: negative log-likelihood of the assistant's tokens."""

from __future__ import annotations

import torch

from arabic_qwen.methods.objective import PERPLEXITY, Losses, Objective, Scores
from arabic_qwen.methods.sft import SFTConfig


def chosen_nll(policy_chosen: torch.Tensor, *, mean_length: torch.Tensor | float) -> torch.Tensor:
    """The supervised part of CPO, ORPO and DPO's "sft", a row: −log π(y_c) / mean_length.

    Its mean over the step's rows is the mean over the step's chosen tokens: (Σ −log π(y_c) / rows) / (tokens / rows).

    Args:
        policy_chosen: [N] log-probabilities of the chosen completions, any part of an optimizer step.
        mean_length: target tokens of the step's chosen completions / rows of the step, which need not be in this part.

    Returns:
        [N].
    """
    return -policy_chosen / mean_length


def objective(config: SFTConfig) -> Objective:
    """Mean over the step's tokens."""

    def loss(scores: Scores) -> Losses:
        return Losses(chosen_nll(scores.policy, mean_length=scores.mean_chosen_length))

    return Objective(loss, PERPLEXITY)
