"""The training engine: transformers.Trainer on packed batches.

The unit of a batch stays what it is everywhere: per_device_train_batch_size × gradient_accumulation_steps sequences
a device make one optimizer step. How the step's sequences are cut into micro-batches is decided by a token budget, and
neither loss nor gradient depends on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput

from arabic_qwen.data.packing import Group, PackedBatch, best_fit_decreasing, micro_batches, pack
from arabic_qwen.training.objectives import Objective, Totals


@dataclasses.dataclass
class Step:
    """One rank's share of an optimizer step, or of an evaluation batch."""

    batches: list[PackedBatch]
    totals: Totals
    num_tokens: int  # in the streams

    def pin_memory(self) -> Step:
        return dataclasses.replace(self, batches=[batch.pin_memory() for batch in self.batches])


def _count(groups: Sequence[Group]) -> Totals:
    return Totals(len(groups), sum(int(group.completions[0].targets.sum()) for group in groups))


class _Sequences(Dataset[list[Group]]):
    """Training sequences: lists of groups, one each, or as many as fit `capacity` tokens."""

    def __init__(self, groups: Any, capacity: int | None):
        self.groups = groups
        lengths = [group.num_tokens for group in groups]
        self.members = best_fit_decreasing(lengths, capacity) if capacity else [[i] for i in range(len(groups))]
        self.lengths = [sum(lengths[i] for i in members) for members in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[Group]:
        return [self.groups[i] for i in self.members[index]]


class _StepSampler(Sampler[list[int]]):
    """Batches of sequence indices for this rank, shuffled by seed and epoch.

    Trainer counts `accumulation` batches a step. All but the last of a step are empty, and the last holds the rank's
    share of the whole step, so that a data worker can pack it. At a ragged end ranks differ by one sequence; none is
    repeated.
    """

    def __init__(self, args: TrainingArguments, lengths: list[int], epoch: Callable[[], int]):
        self.lengths = lengths
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
        if self.by_length:
            return get_length_grouped_indices(self.lengths, self.step_size, generator=generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for start in range(0, len(order), self.step_size):
            step = order[start : start + self.step_size]
            yield from [[]] * (-(-len(step) // self.batch_size) - 1)
            yield step[self.rank :: self.world_size]


class PackedTrainer(Trainer):
    """transformers.Trainer whose batches are packed and whose loss is an :class:`Objective`.

    Args:
        objective: the method's loss and metrics.
        token_budget: tokens of a micro-batch.
        sequence_capacity: tokens that a training sequence is filled up to with several examples; None: one example.
        kwargs: as for transformers.Trainer; datasets are sequences of :class:`Group`, the model has
            `enable_packed_forward`.
    """

    def __init__(self, *, objective: Objective, token_budget: int, sequence_capacity: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.train_groups: Any = self.train_dataset
        self.token_budget = token_budget
        self.sequence_capacity = sequence_capacity
        self._tokens_since_log = 0
        self._last_log_time = time.perf_counter()

    def _loader(self, sequences: _Sequences, batch_sampler: Any) -> DataLoader:
        return DataLoader(
            sequences,
            batch_sampler=batch_sampler,
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _collate(self, sequences: list[list[Group]]) -> Step:
        groups = [group for sequence in sequences for group in sequence]
        return Step(micro_batches(groups, self.token_budget), _count(groups), sum(group.num_tokens for group in groups))

    def get_train_dataloader(self) -> DataLoader:
        sequences = _Sequences(self.train_groups, self.sequence_capacity)
        # Trainer has set state.epoch when it starts an epoch, also in the middle of one after a resume.
        sampler = _StepSampler(self.args, sequences.lengths, epoch=lambda: int(self.state.epoch or 0))
        return self._loader(sequences, sampler)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        sequences = _Sequences(self.eval_dataset if eval_dataset is None else eval_dataset, None)
        indices = range(self.args.process_index, len(sequences), self.args.world_size)
        size = self.args.per_device_eval_batch_size
        return self._loader(sequences, [indices[i : i + size] for i in range(0, len(indices), size)])

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list[Step], None]:
        return list(itertools.islice(epoch_iterator, num_batches)), None  # steps carry their own totals

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of every micro-batch of the step; returns this rank's part of the loss × ranks."""
        if not inputs.totals.groups and not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        totals, ranks = inputs.totals, self.args.world_size
        batches = inputs.batches or [pack([self.train_groups[0]])]  # a rank without rows still joins the reduction
        share = ranks if inputs.batches else 0  # DDP averages gradients over ranks
        if ranks > 1:
            counts = torch.tensor([totals.groups, totals.tokens], device=self.args.device)
            totals = Totals(*self.accelerator.reduce(counts, "sum"))
        loss_sum = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                batch = batch.to(self.args.device)
                loss = self.objective.loss(model(packed=batch), batch, totals) * share
                # DeepSpeed would divide by its own count of accumulation steps.
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
            loss_sum += loss.detach()
        self._tokens_since_log += inputs.num_tokens
        return loss_sum

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate reads padded inputs; tokens per second is logged instead

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_second"] = round(self._tokens_since_log / (now - self._last_log_time), 1)
            self._tokens_since_log, self._last_log_time = 0, now
        logs.pop("total_flos", None)
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        self._last_log_time = time.perf_counter()
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss over the whole set (not a mean of batch means) and the objective's derived metrics."""
        started = time.perf_counter()
        if not self.accelerator._models:  # evaluation without training
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader
        sequences: _Sequences = dataloader.dataset  # type: ignore[assignment]
        totals = _count(sequences.groups)
        model: Any = self.model
        model.eval()
        loss = torch.zeros((), device=self.args.device)
        for step in dataloader:
            for batch in step.batches:
                batch = batch.to(self.args.device)
                loss += self.objective.loss(model(packed=batch), batch, totals)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_value = self.accelerator.reduce(loss, "sum").item()
        metrics = {"loss": loss_value, **self.objective.derived_metrics(loss_value)}
        self._last_log_time += time.perf_counter() - started  # tokens per second are those of training
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(sequences),
        )
