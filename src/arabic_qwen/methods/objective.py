"""What a method optimises: the interface between the packed step and a loss, and the metrics that go with it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from arabic_qwen.methods.margins import mean_by_group


@dataclasses.dataclass
class Scores:
    """Log-probabilities of T targets of C completions in G groups, any part of an optimizer step or evaluation set.

    Attributes:
        logps: [T] float32, the policy's log-probability of each target, with its gradient.
        reference_logps: [T] float32, the reference's; None for methods without one.
        target_completion: [T] int64 in [0, C), the completion that a target belongs to.
        completion_group: [C] int64 in [0, G), the group that a completion belongs to.
        chosen, rejected: int64 in [0, C), the desirable completions and the others; [G] each where rows are pairs.
        num_targets: [C] int64.
        lengths: [C] float32, as the data gives them, else `num_targets`; for reports.
        tags: [G] int64, which part of the set each group is measured with too.
        mean_chosen_length: targets of desirable completions / groups, over the whole step.
        auxiliary: what :attr:`Objective.auxiliary` gave, summed over the whole step; None for methods without.
    """

    logps: torch.Tensor
    reference_logps: torch.Tensor | None
    target_completion: torch.Tensor
    completion_group: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    num_targets: torch.Tensor
    lengths: torch.Tensor
    tags: torch.Tensor
    mean_chosen_length: torch.Tensor | float
    auxiliary: torch.Tensor | None = None

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """[C] sums over each completion's targets of values [T]."""
        return values.new_zeros(len(self.num_targets)).index_add(0, self.target_completion, values)

    @functools.cached_property
    def policy(self) -> torch.Tensor:
        """[C] the policy's log-probabilities, summed over the completion."""
        return self.summed(self.logps)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """[C] the reference's."""
        assert self.reference_logps is not None, "the objective needs_reference"
        return self.summed(self.reference_logps)

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [C] of chosen and of rejected completions."""
        return values[self.chosen], values[self.rejected]

    def to(self, device: torch.device | str) -> Scores:
        return dataclasses.replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def tagged(self, tag: int) -> Scores:
        """Those of the groups with this tag; `mean_chosen_length` and `auxiliary` stay."""
        groups = self.tags == tag
        completions = groups[self.completion_group]
        targets = completions[self.target_completion]
        new_completion, new_group = completions.cumsum(0) - 1, groups.cumsum(0) - 1
        return dataclasses.replace(
            self,
            logps=self.logps[targets],
            reference_logps=None if self.reference_logps is None else self.reference_logps[targets],
            target_completion=new_completion[self.target_completion[targets]],
            completion_group=new_group[self.completion_group[completions]],
            chosen=new_completion[self.chosen[completions[self.chosen]]],
            rejected=new_completion[self.rejected[completions[self.rejected]]],
            num_targets=self.num_targets[completions],
            lengths=self.lengths[completions],
            tags=self.tags[groups],
        )


def join_scores(parts: list[Scores]) -> Scores:
    """Parts as one; `mean_chosen_length` and `auxiliary` are those of the first."""
    completions = list(itertools.accumulate((len(part.num_targets) for part in parts), initial=0))
    groups = list(itertools.accumulate((len(part.tags) for part in parts), initial=0))

    def joined(name: str, starts: list[int] | None = None) -> torch.Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([value + start for value, start in zip(values, starts or [0] * len(parts), strict=False)])

    return dataclasses.replace(
        parts[0],
        logps=joined("logps"),
        reference_logps=None if parts[0].reference_logps is None else joined("reference_logps"),
        target_completion=joined("target_completion", completions),
        completion_group=joined("completion_group", groups),
        chosen=joined("chosen", completions),
        rejected=joined("rejected", completions),
        num_targets=joined("num_targets"),
        lengths=joined("lengths"),
        tags=joined("tags"),
    )


class Losses(NamedTuple):
    """What a loss gives.

    Attributes:
        losses: [G], whose mean over all groups of the step is the step's loss.
        rewards: [C], what the loss lets each completion win or lose by; without a gradient. None: it has none.
        logged: further scalars that are reported, as means over groups.
    """

    losses: torch.Tensor
    rewards: torch.Tensor | None = None
    logged: Mapping[str, torch.Tensor] = {}


#: Sums over groups, by name; divided by "groups" (or what `derive` makes of them) when they are reported.
Sums = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What is reported with a loss.

    Attributes:
        names: of what `derive` gives.
        sums: (scores, their losses, without gradients) -> sums that metrics are made of.
        derive: (sums as floats, loss) -> metrics.
    """

    names: tuple[str, ...]
    sums: Callable[[Scores, Losses], Sums]
    derive: Callable[[dict[str, float], float], dict[str, float]]


def _perplexity(sums: dict[str, float], loss: float) -> dict[str, float]:
    return {"perplexity": math.exp(min(loss, 700.0))}  # exp(710) overflows a float


#: exp(loss), for a loss that is a mean over tokens.
PERPLEXITY = Metrics(("perplexity",), lambda scores, losses: {}, _perplexity)


def _pair_sums(scores: Scores, losses: Losses) -> Sums:
    """Sums over groups with a chosen and a rejected completion; several of a kind count by their mean."""
    assert losses.rewards is not None, "pairs are measured by rewards"
    rewards = losses.rewards.detach().double()  # for the variances
    groups = len(scores.tags)
    of_chosen, of_rejected = scores.split(scores.completion_group)

    def means(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = scores.split(values.double())
        return mean_by_group(chosen, of_chosen, groups), mean_by_group(rejected, of_rejected, groups)

    chosen, rejected = means(rewards)
    chosen_logps, rejected_logps = means(scores.policy.detach())
    chosen_length, rejected_length = means(scores.lengths)
    count = rewards.new_zeros(groups).index_add(0, of_rejected, torch.ones_like(rewards[scores.rejected]))
    some = count > 0
    margin = torch.where(some, chosen - rejected, 0.0)
    longer = torch.where(some, chosen_length - rejected_length, 0.0)
    won = (chosen[of_rejected] > rewards[scores.rejected]).double()
    return {
        "groups": rewards.new_full((), groups),
        "pairs": some.float().sum(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": margin.sum(),
        "rewards/accuracies": torch.where(some, mean_by_group(won, of_rejected, groups), 0.0).sum(),
        "logps/chosen": chosen_logps.sum(),
        "logps/rejected": rejected_logps.sum(),
        "_margin²": margin.square().sum(),
        "_longer": longer.sum(),
        "_longer²": longer.square().sum(),
        "_margin·longer": (margin * longer).sum(),
        **{f"={name}": value * groups for name, value in losses.logged.items()},
    }


def _pair_metrics(sums: dict[str, float], loss: float) -> dict[str, float]:
    """Means over groups, and the correlation of the margin with how much longer the chosen completion is."""
    pairs, groups = max(sums["pairs"], 1.0), max(sums["groups"], 1.0)
    means = {name: value / pairs for name, value in sums.items() if name not in ("groups", "pairs") and name[0] != "="}
    metrics = {name: value for name, value in means.items() if name[0] != "_"}
    for name in ("rewards/chosen", "logps/chosen"):
        metrics[name] = sums[name] / groups
    margin, longer = means["rewards/margins"], means["_longer"]
    variances = (means["_margin²"] - margin**2, means["_longer²"] - longer**2)
    varies = pairs > 2 and all(
        v > 1e-12 * means[name] for v, name in zip(variances, ("_margin²", "_longer²"), strict=True)
    )
    metrics["length_bias"] = 0.0
    if varies:
        correlation = (means["_margin·longer"] - margin * longer) / math.sqrt(math.prod(variances))
        metrics["length_bias"] = min(max(correlation, -1.0), 1.0)
    return metrics | _logged(sums)


def _logged(sums: dict[str, float]) -> dict[str, float]:
    return {name[1:]: value / max(sums["groups"], 1.0) for name, value in sums.items() if name[0] == "="}


_REWARDS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

#: Rewards and log-probabilities of chosen and rejected completions of the same prompt.
PAIRS = Metrics((*_REWARDS, "length_bias"), _pair_sums, _pair_metrics)


def _label_sums(scores: Scores, losses: Losses) -> Sums:
    assert losses.rewards is not None, "labelled completions are measured by rewards"
    (good, bad), (good_logps, bad_logps) = scores.split(losses.rewards.detach()), scores.split(scores.policy.detach())
    return {
        "groups": good.new_full((), len(scores.tags)),
        "good": good.new_full((), len(good)),
        "rewards/chosen": good.sum(),
        "rewards/rejected": bad.sum(),
        "rewards/accuracies": (good > 0).float().sum() + (bad <= 0).float().sum(),
        "logps/chosen": good_logps.sum(),
        "logps/rejected": bad_logps.sum(),
        **{f"={name}": value * len(scores.tags) for name, value in losses.logged.items()},
    }


def _label_metrics(sums: dict[str, float], loss: float) -> dict[str, float]:
    """Means over the rows of each class; those of a class without rows are left out."""
    count = {"chosen": sums["good"], "rejected": sums["groups"] - sums["good"]}
    metrics = {}
    for name, value in sums.items():
        rows = count.get(name.rpartition("/")[2], sums["groups"])
        if rows and name not in ("groups", "good") and name[0] != "=":
            metrics[name] = value / rows
    if all(count.values()):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics | _logged(sums)


#: Rewards and log-probabilities of good and of bad completions, each with a prompt of its own.
LABELS = Metrics(_REWARDS, _label_sums, _label_metrics)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method's loss with its settings, as far as the engine knows it.

    Attributes:
        loss: of the step's scores, or of any part of them.
        metrics: what is reported.
        needs_reference: scores carry the reference's log-probabilities.
        whole_step: the loss of a group depends on the other groups of the step.
        auxiliary: (scores of auxiliary completions) -> [K] sums, which are added up over the whole step and reach the loss
            as :attr:`Scores.auxiliary`; no gradient passes through them.
        logged: names of what the loss logs.
    """

    loss: Callable[[Scores], Losses]
    metrics: Metrics
    needs_reference: bool = False
    whole_step: bool = False
    auxiliary: Callable[[Scores], torch.Tensor] | None = None
    logged: tuple[str, ...] = ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.metrics.names, *self.logged)
