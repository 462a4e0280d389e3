"""Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290) and its variants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from arabic_qwen.methods.dpo import LABEL_SMOOTHED, DPOConfig
from arabic_qwen.methods.ipo.loss import ipo_loss
from arabic_qwen.methods.margins import at_least_float32, hinge, implicit_rewards, length_average, logistic
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores
from arabic_qwen.methods.sft.loss import chosen_nll


@dataclasses.dataclass(frozen=True)
class Pairs:
    """N preference pairs as the functions in `DPO_LOSSES` take them; `dpo_loss` says what the fields are."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    beta: float
    label_smoothing: float = 0.0
    chosen_length: torch.Tensor | None = None
    rejected_length: torch.Tensor | None = None
    mean_chosen_length: torch.Tensor | float | None = None
    discopop_tau: float = 0.05

    @property
    def chosen(self) -> torch.Tensor:
        """Δ_c [N]."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected(self) -> torch.Tensor:
        """Δ_r [N]."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> torch.Tensor:
        """β(Δ_c − Δ_r) [N]."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.chosen_length is not None and self.rejected_length is not None, "pass the completions' lengths"
        return self.chosen_length, self.rejected_length


def _sigmoid(pairs: Pairs) -> torch.Tensor:
    """−(1−ε) log σ(β(Δ_c − Δ_r)) − ε log σ(−β(Δ_c − Δ_r)): https://arxiv.org/abs/2305.18290 eq. 7, smoothed as cDPO."""
    return logistic(pairs.margin, pairs.label_smoothing)


def _hinge(pairs: Pairs) -> torch.Tensor:
    """max(0, 1 − β(Δ_c − Δ_r)): SLiC-HF, https://arxiv.org/abs/2305.10425 section 2."""
    return hinge(pairs.margin, pairs.label_smoothing)


def _ipo(pairs: Pairs) -> torch.Tensor:
    """`ipo_loss` with τ = β."""
    return ipo_loss(
        pairs.policy_chosen,
        pairs.policy_rejected,
        pairs.reference_chosen,
        pairs.reference_rejected,
        *pairs.lengths,
        tau=pairs.beta,
        label_smoothing=pairs.label_smoothing,
    )


def _robust(pairs: Pairs) -> torch.Tensor:
    """(−(1−ε) log σ(m) + ε log σ(−m)) / (1−2ε), m = β(Δ_c − Δ_r): https://arxiv.org/abs/2403.00409 section 3.1.

    Labels wrong with probability ε leave its expectation that of the DPO loss on right ones.
    """
    epsilon = pairs.label_smoothing
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"label_smoothing of loss_type 'robust' must be in [0, 0.5), got {epsilon}")
    wrong = logistic(-pairs.margin)
    return ((1 - epsilon) * logistic(pairs.margin) - epsilon * wrong) / (1 - 2 * epsilon)


def _exo_pair(pairs: Pairs) -> torch.Tensor:
    """KL(q ‖ p), q = (σ(m), σ(−m)), p = (1−ε, ε), m = β(Δ_c − Δ_r): https://arxiv.org/abs/2402.00856 eq. 16."""
    epsilon = pairs.label_smoothing
    if not 0 < epsilon < 1:
        raise ValueError(
            f"loss_type 'exo_pair' takes the logarithm of label_smoothing: set it above 0 (its paper uses 0.001), got {epsilon}"
        )
    log_right, log_wrong = logsigmoid(pairs.margin), logsigmoid(-pairs.margin)
    right = log_right.exp() * (log_right - math.log1p(-epsilon))
    return right + log_wrong.exp() * (log_wrong - math.log(epsilon))


def _nca_pair(pairs: Pairs) -> torch.Tensor:
    """−log σ(βΔ_c) − ½ log σ(−βΔ_c) − ½ log σ(−βΔ_r): https://arxiv.org/abs/2402.05369 section 4.1."""
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return logistic(chosen) + (logistic(-chosen) + logistic(-rejected)) / 2


def _sppo_hard(pairs: Pairs) -> torch.Tensor:
    """(Δ_c − 1/(2β))² + (Δ_r + 1/(2β))²: https://arxiv.org/abs/2405.00675 eq. 4.7 with win probabilities 1 and 0."""
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen - target) ** 2 + (pairs.rejected + target) ** 2


def _bco_pair(pairs: Pairs) -> torch.Tensor:
    """−log σ(βΔ_c) − log σ(−βΔ_r): https://arxiv.org/abs/2404.04656 section 4, with δ = 0."""
    return logistic(pairs.beta * pairs.chosen) + logistic(-pairs.beta * pairs.rejected)


def _aot(pairs: Pairs) -> torch.Tensor:
    """Logistic loss of β(sort(log π(y_c)/π(y_r)) − sort(log π_ref(y_c)/π_ref(y_r))).

    https://arxiv.org/abs/2406.05882 section 3. The i-th loss is of the i-th smallest values, not of the i-th pair.
    """
    policy = (pairs.policy_chosen - pairs.policy_rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return logistic(pairs.beta * (policy - reference), pairs.label_smoothing)


def _aot_unpaired(pairs: Pairs) -> torch.Tensor:
    """Logistic loss of β(sort(Δ_c) − sort(Δ_r)).

    https://arxiv.org/abs/2406.05882 section 3. The i-th loss is of the i-th smallest values, not of the i-th pair.
    """
    margin = pairs.chosen.sort().values - pairs.rejected.sort().values
    return logistic(pairs.beta * margin, pairs.label_smoothing)


def _apo_zero(pairs: Pairs) -> torch.Tensor:
    """1 − σ(βΔ_c) + σ(βΔ_r), for chosen completions better than the model's: https://arxiv.org/abs/2408.06266 eq. 7."""
    return torch.sigmoid(-pairs.beta * pairs.chosen) + torch.sigmoid(pairs.beta * pairs.rejected)


def _apo_down(pairs: Pairs) -> torch.Tensor:
    """σ(βΔ_c) + 1 − σ(β(Δ_c − Δ_r)), for chosen ones worse than the model's: https://arxiv.org/abs/2408.06266 eq. 8."""
    return torch.sigmoid(pairs.beta * pairs.chosen) + torch.sigmoid(-pairs.margin)


def _discopop(pairs: Pairs) -> torch.Tensor:
    """σ(−m/τ) · −log σ(m) + σ(m/τ) · exp(−m), m = β(Δ_c − Δ_r): https://arxiv.org/abs/2406.08414 eq. 5.

    As one exponential the second term does not overflow while τ ≤ 1.
    """
    margin, scaled = pairs.margin, pairs.margin / pairs.discopop_tau
    return torch.sigmoid(-scaled) * logistic(margin) + torch.exp(logsigmoid(scaled) - margin)


def _sigmoid_norm(pairs: Pairs) -> torch.Tensor:
    """−log σ(β(Δ_c / len_c − Δ_r / len_r)): Tülu 3, https://arxiv.org/abs/2411.15124 section 5."""
    chosen_length, rejected_length = pairs.lengths
    h = length_average(pairs.chosen, chosen_length) - length_average(pairs.rejected, rejected_length)
    return logistic(pairs.beta * h, pairs.label_smoothing)


def _sft(pairs: Pairs) -> torch.Tensor:
    """−log π(y_c) / mean_chosen_length: the mean over the step's pairs is the mean over its chosen tokens."""
    assert pairs.mean_chosen_length is not None, "pass the step's mean_chosen_length"
    return chosen_nll(pairs.policy_chosen, mean_length=pairs.mean_chosen_length)


DPO_LOSSES: dict[str, Callable[[Pairs], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "bco_pair": _bco_pair,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
}

STEP_COUPLED = frozenset({"aot", "aot_unpaired"})
"""Loss types that sort over the pairs: they need the whole step's vectors, of all ranks, in one call."""


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_length: torch.Tensor | None = None,
    rejected_length: torch.Tensor | None = None,
    mean_chosen_length: torch.Tensor | float | None = None,
    discopop_tau: float = 0.05,
) -> torch.Tensor:
    """The loss of each pair: −(1−ε) log σ(β(Δ_c − Δ_r)) − ε log σ(−β(Δ_c − Δ_r)), or another `loss_type`.

    Δ = log π − log π_ref. Eq. 7 of https://arxiv.org/abs/2305.18290 at ε = 0; the functions in `DPO_LOSSES` give
    formula and source of the others. Pairs may come in any parts of an optimizer step, but for the types in
    `STEP_COUPLED`, whose i-th loss is not that of the i-th pair.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: [N] log-probabilities, summed over the
            completion.
        beta: β > 0; the larger, the closer the policy stays to the reference. τ for "ipo".
        loss_type: a key of `DPO_LOSSES`.
        label_smoothing: ε, the probability that a label is wrong; below 0.5 for "robust", above 0 for "exo_pair", and 0
            for the types that are not in `LABEL_SMOOTHED`.
        chosen_length, rejected_length: [N] target tokens of the completions; for "ipo" and "sigmoid_norm".
        mean_chosen_length: target tokens of the step's chosen completions / pairs of the step; for "sft".
        discopop_tau: temperature of "discopop", in (0, 1].

    Returns:
        [N] losses.

    Raises:
        ValueError: unknown `loss_type`, or a `label_smoothing` that the type cannot take.
    """
    if loss_type not in DPO_LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose one of {', '.join(DPO_LOSSES)}")
    if label_smoothing and loss_type not in LABEL_SMOOTHED:
        raise ValueError(
            f"loss_type {loss_type!r} has no label smoothing: set label_smoothing to 0, or choose one of {', '.join(LABEL_SMOOTHED)}"
        )
    pairs = Pairs(
        at_least_float32(policy_chosen),
        at_least_float32(policy_rejected),
        at_least_float32(reference_chosen),
        at_least_float32(reference_rejected),
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        mean_chosen_length=mean_chosen_length,
        discopop_tau=discopop_tau,
    )
    return DPO_LOSSES[loss_type](pairs)


def objective(config: DPOConfig) -> Objective:
    """DPO as the engine trains it; its rewards are β(log π − log π_ref)."""

    def loss(scores: Scores) -> Losses:
        chosen_length, rejected_length = scores.split(scores.num_targets)
        losses = dpo_loss(
            *scores.split(scores.policy),
            *scores.split(scores.reference),
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            discopop_tau=config.discopop_tau,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            mean_chosen_length=scores.mean_chosen_length,
        )
        return Losses(losses, implicit_rewards(scores.policy, scores.reference, beta=config.beta))

    return Objective(loss, PAIRS, needs_reference=True, whole_step=config.loss_type in STEP_COUPLED)
