"""Supervised fine-tuning: negative log-likelihood of the assistant's tokens."""

import torch


def sft_loss(policy_logps: torch.Tensor, *, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """−Σ log π(token) / num_tokens.

    Args:
        policy_logps: [T] log-probabilities of target tokens, any part of an optimizer step.
        num_tokens: target tokens of the whole step, so that the parts' losses add up to the step's token mean.

    Returns:
        Scalar.
    """
    return -policy_logps.sum() / num_tokens
