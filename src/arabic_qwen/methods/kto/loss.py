"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

import torch

from arabic_qwen.methods.kto import KTOConfig
from arabic_qwen.methods.margins import at_least_float32, implicit_rewards
from arabic_qwen.methods.objective import LABELS, Losses, Objective, Scores


def kto_kl(log_ratio_sum: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """z = max(0, Σ(log π − log π_ref) / count), the estimate of KL(π ‖ π_ref) that rewards are measured from.

    Section 4.1 of https://arxiv.org/abs/2402.01306. No gradient.

    Args:
        log_ratio_sum: scalar, the sum over prompts with the completion of another row, of log-probabilities summed over
            the completion. All of the optimizer step, of all ranks: the clamp of a part is not a part of the clamp.
        count: such prompts.

    Returns:
        Scalar; 0 for a step without such completions.
    """
    return (log_ratio_sum.detach() / torch.as_tensor(count).clamp(min=1)).clamp(min=0)


def kto_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    label: torch.Tensor,
    kl: torch.Tensor | float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """λ_D (1 − σ(β(Δ − z))) for a desirable completion, λ_U (1 − σ(β(z − Δ))) for an undesirable one.

    Δ = log π − log π_ref. Eq. 7 of https://arxiv.org/abs/2402.01306.

    Args:
        policy, reference: [N] log-probabilities, summed over the completion.
        label: [N], true where the completion is desirable.
        kl: z, the whole step's `kto_kl`; no gradient reaches it.
        beta: β, how fast a reward saturates.
        desirable_weight, undesirable_weight: λ_D and λ_U.

    Returns:
        [N] losses, in the order of the rows.
    """
    gain = at_least_float32(policy) - at_least_float32(reference) - torch.as_tensor(kl).detach()
    desirable = label.bool()
    # 1 − σ(x) = σ(−x), which does not cancel
    loss = torch.sigmoid(beta * torch.where(desirable, -gain, gain))
    return torch.where(desirable, desirable_weight, undesirable_weight) * loss


def objective(config: KTOConfig) -> Objective:
    """KTO as the engine trains it; z comes from completions of other prompts, as :func:`kto_kl` says."""

    def log_ratios(scores: Scores) -> torch.Tensor:
        ratios = scores.policy - scores.reference
        return torch.stack([ratios.sum(), ratios.new_full((), len(ratios))])

    def loss(scores: Scores) -> Losses:
        assert scores.auxiliary is not None
        kl = kto_kl(*scores.auxiliary)
        desirable = torch.zeros_like(scores.policy, dtype=torch.bool).index_fill(0, scores.chosen, True)
        losses = kto_loss(
            scores.policy,
            scores.reference,
            desirable,
            kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        rewards = implicit_rewards(scores.policy, scores.reference, beta=config.beta)
        return Losses(losses, rewards, {"kl": kl})

    return Objective(loss, LABELS, needs_reference=True, auxiliary=log_ratios, logged=("kl",))
