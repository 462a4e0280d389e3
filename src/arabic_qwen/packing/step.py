"""An optimizer step's groups, packed."""

from __future__ import annotations

import dataclasses
from typing import Any

from arabic_qwen.packing.batch import PackedBatch, pack
from arabic_qwen.packing.bins import micro_batches
from arabic_qwen.packing.group import Group, with_mismatched


@dataclasses.dataclass
class Step:
    """One rank's share of an optimizer step, or of an evaluation set."""

    groups: list[Group]
    token_budget: int  # by which they are cut
    rows: list[list[int]]  # of each batch
    batches: list[PackedBatch]
    mismatched: list[PackedBatch]  # for KTO: the prompts of each batch with completions of others
    shared: list[PackedBatch]  # for KTO: the prompts of each batch with both completions, for the reference
    chosen_tokens: int  # targets of the groups' first completions
    num_tokens: int  # in the streams
    place: dict[str, Any] | None = None  # how far the data is used after this step, when it is streamed

    def pin_memory(self) -> Step:
        def pinned(batches: list[PackedBatch]) -> list[PackedBatch]:
            return [batch.pin_memory() for batch in batches]

        return dataclasses.replace(
            self, batches=pinned(self.batches), mismatched=pinned(self.mismatched), shared=pinned(self.shared)
        )


@dataclasses.dataclass
class Collate:
    """Packs sequences into a step; a class, for data workers that are not forked take nothing that cannot be pickled."""

    token_budget: int
    needs_kl: bool

    def __call__(self, sequences: list[list[Group]]) -> Step:
        groups = [group for sequence in sequences for group in sequence]
        batches = micro_batches(groups, self.token_budget)
        # All of a set have one, but where it has a single prompt.
        kl_batches = batches if self.needs_kl and all(group.mismatched for group in groups) else []
        return Step(
            groups=groups,
            token_budget=self.token_budget,
            rows=[[group.row for group in batch] for batch in batches],
            batches=[pack(batch) for batch in batches],
            mismatched=[pack([with_mismatched(group, own=False) for group in batch]) for batch in kl_batches],
            shared=[pack([with_mismatched(group, own=True) for group in batch]) for batch in kl_batches],
            chosen_tokens=sum(int(group.completions[0].targets.sum()) for group in groups),
            num_tokens=sum(group.num_tokens for group in groups),
        )
