"""Which groups make each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from arabic_qwen.packing.bins import best_fit_decreasing
from arabic_qwen.packing.group import Group


class Sequences(Dataset[list[Group]]):
    """Training sequences: lists of groups, one each, or as many as fit `capacity` tokens."""

    def __init__(self, groups: Any, capacity: int | None):
        self.groups = groups
        lengths = [group.num_tokens for group in groups]
        self.members = best_fit_decreasing(lengths, capacity) if capacity else [[i] for i in range(len(groups))]
        self.lengths = [sum(lengths[i] for i in members) for members in self.members]
        self.desirable = [groups[members[0]].desirable for members in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[Group]:
        return [self.groups[i] for i in self.members[index]]


class StepSampler(Sampler[list[int]]):
    """Batches of sequence indices for this rank, shuffled by seed and epoch.

    Trainer counts `accumulation` batches a step. All but the last of a step are empty, and the last holds the rank's
    share of the whole step, so that a data worker can pack it. At a ragged end ranks differ by one sequence; none is
    repeated.
    """

    def __init__(self, args: TrainingArguments, lengths: list[int], desirable: list[bool], epoch: Callable[[], int]):
        self.lengths = lengths
        self.desirable = desirable
        self.epoch = epoch
        self.by_length = args.train_sampling_strategy == "group_by_length"
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.rank, self.world_size = args.process_index, args.world_size
        self.batch_size = args.per_device_train_batch_size * self.world_size
        self.step_size = self.batch_size * args.gradient_accumulation_steps

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        # Desirable and undesirable rows, spread evenly over the epoch, so that every step has its share of both.
        classes = [[i for i in shuffled if self.desirable[i] is kind] for kind in (True, False)]
        if self.by_length:
            classes = [self._by_length(rows, generator) for rows in classes]
        place = {i: (position + 0.5) / len(rows) for rows in classes for position, i in enumerate(rows)}
        return sorted(shuffled, key=lambda i: place[i])

    def _by_length(self, rows: list[int], generator: torch.Generator) -> list[int]:
        """Rows of similar length one after the other."""
        if not rows:
            return []
        lengths = [self.lengths[i] for i in rows]
        return [rows[i] for i in get_length_grouped_indices(lengths, self.step_size, generator=generator)]

    def steps(self) -> list[list[int]]:
        """The sequences of each optimizer step, over all ranks."""
        order = self.order()
        return [order[start : start + self.step_size] for start in range(0, len(order), self.step_size)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield from [[]] * (-(-len(step) // self.batch_size) - 1)
            yield step[self.rank :: self.world_size]
