"""Supervised fine-tuning: negative log-likelihood of the assistant's tokens."""

import torch


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
