"""What each method optimises: a loss for each group of completions, and the metrics that are reported with it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from arabic_qwen.data.loaders import (
    CPODataLoader,
    DataLoader,
    DPODataLoader,
    IPODataLoader,
    KTODataLoader,
    SFTDataLoader,
)
from arabic_qwen.losses.cpo import LENGTH_AVERAGED, cpo_loss
from arabic_qwen.losses.dpo import STEP_COUPLED, dpo_loss, implicit_rewards
from arabic_qwen.losses.ipo import ipo_loss
from arabic_qwen.losses.kto import kto_loss
from arabic_qwen.losses.orpo import orpo_loss
from arabic_qwen.losses.sft import chosen_nll
from arabic_qwen.losses.simpo import simpo_loss


@dataclasses.dataclass
class Scores:
    """Log-probabilities of C completions in G groups, any part of an optimizer step or evaluation set."""

    policy: torch.Tensor  # [C] float32, summed over the completion's targets
    reference: torch.Tensor | None  # [C] float32; None for methods without one
    num_targets: torch.Tensor  # [C] int64
    lengths: torch.Tensor  # [C] float32, as the data gives them, else num_targets
    first: torch.Tensor  # [G] int64, each group's chosen completion
    others: torch.Tensor  # [C − G] int64, the rejected completions
    others_group: torch.Tensor  # [C − G] int64 in [0, G)
    label: torch.Tensor  # [G] bool
    mean_chosen_length: torch.Tensor | float  # targets of first completions / groups, over the whole step
    tags: torch.Tensor  # [G] int64, which part of the set each group is measured with too
    kl: torch.Tensor | float = 0.0  # KTO's z, over the whole step

    def tagged(self, tag: int) -> Scores:
        """Those of the groups with this tag; `mean_chosen_length` and `kl` stay."""
        groups = self.tags == tag
        others = groups[self.others_group]
        completions = torch.zeros_like(self.num_targets, dtype=torch.bool)
        completions[self.first[groups]] = completions[self.others[others]] = True
        place, group = completions.cumsum(0) - 1, groups.cumsum(0) - 1  # the new indices
        return dataclasses.replace(
            self,
            policy=self.policy[completions],
            reference=None if self.reference is None else self.reference[completions],
            num_targets=self.num_targets[completions],
            lengths=self.lengths[completions],
            first=place[self.first[groups]],
            others=place[self.others[others]],
            others_group=group[self.others_group[others]],
            label=self.label[groups],
            tags=self.tags[groups],
        )

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of chosen [G] and of rejected completions [C − G]."""
        return values[self.first], values[self.others]

    def to(self, device: torch.device | str) -> Scores:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved)


def join_scores(parts: list[Scores]) -> Scores:
    """Parts as one; `mean_chosen_length` and `kl` are those of the first."""
    completions = list(itertools.accumulate((len(part.policy) for part in parts), initial=0))
    groups = list(itertools.accumulate((len(part.label) for part in parts), initial=0))

    def joined(name: str, starts: list[int] | None = None) -> torch.Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([value + start for value, start in zip(values, starts or [0] * len(parts), strict=False)])

    return dataclasses.replace(
        parts[0],
        policy=joined("policy"),
        reference=None if parts[0].reference is None else joined("reference"),
        num_targets=joined("num_targets"),
        lengths=joined("lengths"),
        first=joined("first", completions),
        others=joined("others", completions),
        others_group=joined("others_group", groups),
        label=torch.cat([part.label for part in parts]),
        tags=joined("tags"),
    )


#: Sums over groups, by name; divided by "groups" (or what `derive` makes of them) when they are reported.
Sums = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training method, as far as the engine knows it.

    Attributes:
        loss: scores -> [G] losses; the step's loss is their mean over all its groups.
        sums: (scores, detached) -> sums that metrics are made of.
        derive: (sums as floats, loss) -> metrics.
        metrics: the names of what `derive` gives.
        needs_reference: scores carry the reference's log-probabilities.
        needs_kl: scores carry KTO's z.
        whole_step: the loss of a group depends on the other groups of the step.
    """

    loss: Callable[[Scores], torch.Tensor]
    sums: Callable[[Scores], Sums]
    derive: Callable[[dict[str, float], float], dict[str, float]]
    metrics: tuple[str, ...]
    needs_reference: bool = False
    needs_kl: bool = False
    whole_step: bool = False


_REPORTED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def _perplexity(sums: dict[str, float], loss: float) -> dict[str, float]:
    return {"perplexity": math.exp(min(loss, 700.0))}  # exp(710) overflows a float


def _pair_sums(rewards: Callable[[Scores], torch.Tensor]) -> Callable[[Scores], Sums]:
    """Sums over groups with a rejected completion; several negatives count by their mean."""

    def sums(scores: Scores) -> Sums:
        chosen, rejected = scores.split(rewards(scores).detach().double())  # for the variances
        chosen_logps, rejected_logps = scores.split(scores.policy.detach())
        chosen_length, rejected_length = scores.split(scores.lengths.double())
        row = scores.others_group
        count = torch.zeros_like(chosen).index_add(0, row, torch.ones_like(rejected))
        some = count > 0

        def mean(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(chosen).index_add(0, row, values) / count.clamp(min=1)

        margin = torch.where(some, chosen - mean(rejected), 0.0)
        longer = torch.where(some, chosen_length - mean(rejected_length), 0.0)
        wins = torch.where(some, mean((chosen[row] > rejected).double()), 0.0)
        return {
            "groups": chosen.new_full((), len(chosen)),
            "pairs": some.float().sum(),
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": mean(rejected).sum(),
            "rewards/margins": margin.sum(),
            "rewards/accuracies": wins.sum(),
            "logps/chosen": chosen_logps.sum(),
            "logps/rejected": mean(rejected_logps.double()).sum(),
            "_margin²": margin.square().sum(),
            "_longer": longer.sum(),
            "_longer²": longer.square().sum(),
            "_margin·longer": (margin * longer).sum(),
        }

    return sums


def _pair_metrics(sums: dict[str, float], loss: float) -> dict[str, float]:
    """Means over groups, and the correlation of the margin with how much longer the chosen completion is."""
    pairs = max(sums["pairs"], 1.0)
    metrics = {
        name: value / pairs for name, value in sums.items() if name not in ("groups", "pairs") and name[0] != "_"
    }
    for name in ("rewards/chosen", "logps/chosen"):
        metrics[name] = sums[name] / max(sums["groups"], 1.0)
    means = {
        name: sums[name] / pairs for name in ("rewards/margins", "_margin²", "_longer", "_longer²", "_margin·longer")
    }
    margin, longer = means["rewards/margins"], means["_longer"]
    variances = (means["_margin²"] - margin**2, means["_longer²"] - longer**2)
    varies = pairs > 2 and all(
        v > 1e-12 * means[name] for v, name in zip(variances, ("_margin²", "_longer²"), strict=True)
    )
    metrics["length_bias"] = 0.0
    if varies:
        correlation = (means["_margin·longer"] - margin * longer) / math.sqrt(math.prod(variances))
        metrics["length_bias"] = min(max(correlation, -1.0), 1.0)
    return metrics


def _kto_sums(beta: float) -> Callable[[Scores], Sums]:
    def sums(scores: Scores) -> Sums:
        assert scores.reference is not None
        rewards = implicit_rewards(scores.policy, scores.reference, beta=beta)
        good = scores.label.float()
        bad = 1 - good
        logps = scores.policy.detach()
        return {
            "groups": good.sum() + bad.sum(),
            "good": good.sum(),
            "rewards/chosen": (rewards * good).sum(),
            "rewards/rejected": (rewards * bad).sum(),
            "rewards/accuracies": ((rewards > 0) == scores.label).float().sum(),
            "logps/chosen": (logps * good).sum(),
            "logps/rejected": (logps * bad).sum(),
            "kl": torch.as_tensor(scores.kl, device=good.device) * len(good),
        }

    return sums


def _kto_metrics(sums: dict[str, float], loss: float) -> dict[str, float]:
    """Means over the rows of each class; those of a class without rows are left out."""
    count = {"chosen": sums["good"], "rejected": sums["groups"] - sums["good"]}
    metrics = {}
    for name, value in sums.items():
        rows = count.get(name.rpartition("/")[2], sums["groups"])
        if rows and name not in ("groups", "good"):
            metrics[name] = value / rows
    if all(count.values()):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def _implicit(beta: float) -> Callable[[Scores], torch.Tensor]:
    def rewards(scores: Scores) -> torch.Tensor:
        assert scores.reference is not None
        return implicit_rewards(scores.policy, scores.reference, beta=beta)

    return rewards


def _pairs(scores: Scores) -> list[torch.Tensor]:
    """Policy and reference log-probabilities of chosen and rejected completions, [G] each."""
    assert scores.reference is not None
    return [*scores.split(scores.policy), *scores.split(scores.reference)]


def _averaged(beta: float) -> Callable[[Scores], torch.Tensor]:
    """Rewards of the methods without a reference that average over tokens."""
    return lambda scores: beta * scores.policy / scores.num_targets


def _pair_objective(
    loss: Callable[[Scores], torch.Tensor], rewards: Callable[[Scores], torch.Tensor], **needs: bool
) -> Objective:
    return Objective(loss, _pair_sums(rewards), _pair_metrics, (*_REPORTED, "length_bias"), **needs)


def _sft(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        return chosen_nll(scores.policy, mean_length=scores.mean_chosen_length)

    return Objective(loss, lambda scores: {}, _perplexity, ("perplexity",))


def _dpo(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        chosen_length, rejected_length = scores.split(scores.num_targets)
        return dpo_loss(
            *_pairs(scores),
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            discopop_tau=config.discopop_tau,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            mean_chosen_length=scores.mean_chosen_length,
        )

    whole_step = config.loss_type in STEP_COUPLED
    return _pair_objective(loss, _implicit(config.beta), needs_reference=True, whole_step=whole_step)


def _ipo(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        return ipo_loss(
            *_pairs(scores), *scores.split(scores.num_targets), tau=config.tau, label_smoothing=config.label_smoothing
        )

    return _pair_objective(loss, _implicit(config.beta), needs_reference=True)


def _kto(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        assert scores.reference is not None
        return kto_loss(
            scores.policy,
            scores.reference,
            scores.label,
            scores.kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )

    metrics = (*_REPORTED, "kl")
    return Objective(loss, _kto_sums(config.beta), _kto_metrics, metrics, needs_reference=True, needs_kl=True)


def _cpo(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        chosen, rejected = scores.split(scores.policy)
        chosen_length, rejected_length = scores.split(scores.num_targets)
        return cpo_loss(
            chosen,
            rejected,
            scores.others_group,
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

    if config.loss_type in LENGTH_AVERAGED:
        return _pair_objective(loss, _averaged(config.beta))
    return _pair_objective(loss, lambda scores: config.beta * scores.policy)


def _simpo(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        return simpo_loss(
            *scores.split(scores.policy),
            *scores.split(scores.num_targets),
            beta=config.beta,
            gamma_beta_ratio=config.gamma_beta_ratio,
            label_smoothing=config.label_smoothing,
        )

    return _pair_objective(loss, _averaged(config.beta))


def _orpo(config: Any) -> Objective:
    def loss(scores: Scores) -> torch.Tensor:
        chosen, rejected = scores.split(scores.policy)
        chosen_length, rejected_length = scores.split(scores.num_targets)
        preference = orpo_loss(chosen, rejected, chosen_length, rejected_length, beta=config.beta)
        return preference + chosen_nll(chosen, mean_length=scores.mean_chosen_length)

    return _pair_objective(loss, _averaged(config.beta))


class Method(NamedTuple):
    """A training method: how its rows become groups, and what it makes of their log-probabilities."""

    data_loader: type[DataLoader]
    objective: Callable[[Any], Objective]  # given the method's configuration


#: The methods, by name; each has a configuration class of the same name in `config.METHOD_CONFIGS`.
METHODS: dict[str, Method] = {
    "sft": Method(SFTDataLoader, _sft),
    "dpo": Method(DPODataLoader, _dpo),
    "ipo": Method(IPODataLoader, _ipo),
    "kto": Method(KTODataLoader, _kto),
    "cpo": Method(CPODataLoader, _cpo),
    "simpo": Method(DPODataLoader, _simpo),
    "orpo": Method(DPODataLoader, _orpo),
}
