"""An optimizer step's groups, packed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from arabic_qwen.packing.batch import PackedBatch, pack
from arabic_qwen.packing.bins import micro_batches
from arabic_qwen.packing.group import Group, auxiliary_group


class SharedBatch(NamedTuple):
    """A batch's prompts with own and auxiliary completions, for the reference, which computes both at once."""

    batch: PackedBatch
    own: torch.Tensor  # int64: the targets of own completions, in the order of the batch's own targets
    auxiliary: torch.Tensor  # int64: those of auxiliary ones


@dataclasses.dataclass
class Step:
    """One rank's share of an optimizer step, or of an evaluation set."""

    groups: list[Group]
    token_budget: int  # by which they are cut
    rows: list[list[int]]  # of each batch
    batches: list[PackedBatch]
    auxiliary: list[PackedBatch]  # the prompts of each batch with their auxiliary completions; none: a method without
    shared: list[SharedBatch]
    chosen_tokens: int  # targets of desirable completions
    num_tokens: int  # in the streams
    place: dict[str, Any] | None = None  # how far the data is used after this step, when it is streamed

    def pin_memory(self) -> Step:
        return dataclasses.replace(
            self,
            batches=[batch.pin_memory() for batch in self.batches],
            auxiliary=[batch.pin_memory() for batch in self.auxiliary],
            shared=[SharedBatch(b.pin_memory(), own.pin_memory(), rest.pin_memory()) for b, own, rest in self.shared],
        )


@dataclasses.dataclass
class Collate:
    """Packs sequences into a step; a class, for data workers that are not forked take nothing that cannot be pickled."""

    token_budget: int
    needs_auxiliary: bool

    def __call__(self, sequences: list[list[Group]]) -> Step:
        groups = [group for sequence in sequences for group in sequence]
        batches = micro_batches(groups, self.token_budget)
        # All of a set have some, but where it has a single prompt.
        scored = batches if self.needs_auxiliary and all(group.auxiliary for group in groups) else []
        return Step(
            groups=groups,
            token_budget=self.token_budget,
            rows=[[group.row for group in batch] for batch in batches],
            batches=[pack(batch) for batch in batches],
            auxiliary=[pack([auxiliary_group(group, own=False) for group in batch]) for batch in scored],
            shared=[_shared(batch) for batch in scored],
            chosen_tokens=sum(int(c.targets.sum()) for group in groups for c in group.completions if c.desirable),
            num_tokens=sum(group.num_tokens for group in groups),
        )


def _shared(groups: list[Group]) -> SharedBatch:
    batch = pack([auxiliary_group(group, own=True) for group in groups])
    is_own = [own for g in groups for own in [True] * len(g.completions) + [False] * len(g.auxiliary)]
    of_target = torch.tensor(is_own)[batch.target_completion]
    return SharedBatch(batch, of_target.nonzero()[:, 0], (~of_target).nonzero()[:, 0])
