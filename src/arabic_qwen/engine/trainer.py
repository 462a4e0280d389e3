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
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.locations import RowLocations, name_rows
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.engine.guards import GuardedTrainer
from arabic_qwen.errors import ConfigurationError, TrainingError
from arabic_qwen.generation.samples import Samples
from arabic_qwen.memory import fit as fitting
from arabic_qwen.memory.limit import within_memory
from arabic_qwen.methods.objective import Losses, Objective, Scores, Sums, join_scores
from arabic_qwen.models.reference import Reference
from arabic_qwen.packing.batch import PackedBatch
from arabic_qwen.packing.sampler import Sequences, StepSampler
from arabic_qwen.packing.step import Collate, Step

_BY_DIALECT = ("loss", "rewards/accuracies")

T = TypeVar("T")


class _StreamedSteps(IterableDataset[Step]):
    def __init__(self, steps: Callable[[], Iterator[Step]]):
        self._steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self._steps()


class PackedTrainer(GuardedTrainer):
    """transformers.Trainer whose batches are packed and whose loss is an :class:`Objective`.

    Args:
        objective: the method's loss and metrics.
        reference: (model) -> context in which the reference model is called; for objectives that need one.
        token_budget: tokens of a micro-batch, halved where they do not fit into memory; None: what fits, on CUDA.
        fits_recompute: whether as few layers recompute their activations as memory needs, on CUDA.
        loss_spikes: as :class:`GuardedTrainer` says.
        sequence_capacity: tokens that a training sequence is filled up to with several examples; None: one example.
        kwargs: as for transformers.Trainer; datasets are sequences of :class:`Group`, or a :class:`GroupStream` to train
            on; the model has `enable_packed_forward`.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        token_budget: int | None,
        fits_recompute: bool = False,
        sequence_capacity: int | None = None,
        loss_spikes: Literal["log", "skip"] = "log",
        reference: Reference | None = None,
        **kwargs,
    ):
        try:
            super().__init__(**kwargs)
        except OSError as error:  # it makes the output folder
            folder = kwargs["args"].output_dir
            raise ConfigurationError(
                f"output_dir: {folder} cannot be written ({error.strerror}); choose another output_dir"
            ) from None
        self.objective: Objective = objective
        self.train_groups: Any = self.train_dataset
        self._collate = Collate(token_budget or fitting.default_budget(), objective.auxiliary is not None)
        self._set_budget = token_budget  # by the user
        self.fits_budget, self.fits_recompute = token_budget is None, fits_recompute
        self.recomputed: int | None = None  # layers, where that was chosen
        self.loss_spikes = loss_spikes
        self.sequence_capacity = sequence_capacity
        self.reference: Any = reference
        self.samples: Samples | None = None  # taken at each evaluation of eval_dataset
        self._place: dict[str, Any] = {}
        self._sums: Sums = {}
        self._tokens_since_log = 0
        self._last_log_time = time.perf_counter()

    def _loader(self, sequences: Sequences, batch_sampler: Any) -> DataLoader:
        return DataLoader(
            sequences,
            batch_sampler=batch_sampler,
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    @property
    def can_sample(self) -> bool:
        """Whether this process may answer held-out prompts: the others wait, which sharded weights do not allow."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return self.eval_dataset is not None and self.is_world_process_zero() and not sharded

    @property
    def token_budget(self) -> int:
        return self._collate.token_budget

    @token_budget.setter
    def token_budget(self, tokens: int) -> None:
        self._collate.token_budget = tokens  # of data workers that are running it is not; their steps are cut again

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_groups, GroupStream):
            pinned = self.args.dataloader_pin_memory and torch.cuda.is_available()
            return DataLoader(_StreamedSteps(self._streamed_steps), batch_size=None, pin_memory=pinned)
        self._filler = self.train_groups[0]
        self._places = getattr(self.train_groups, "places", None)
        sequences = Sequences(self.train_groups, self.sequence_capacity)
        # Trainer has set state.epoch when it starts an epoch, also in the middle of one after a resume.
        sampler = StepSampler(
            self.args, sequences.lengths, sequences.desirable, epoch=lambda: int(self.state.epoch or 0)
        )
        return self._loader(sequences, sampler)

    def begin(self) -> None:
        super().begin()
        fitting.fit(self)

    def _streamed_steps(self) -> Iterator[Step]:
        """This rank's share of each step, from where the data was left.

        Every process reads and packs the whole window, so that the steps are the same for any number of them.
        """
        # Trainer skips the steps that were done before.
        yield from [self._collate([])] * (self.args.gradient_accumulation_steps * self._place.get("done", 0))
        skipped = self._place.get("step", 0)
        for place, window in self.train_groups.windows(self._place):
            yield from self._window_steps(place, window, skipped)
            skipped = 0

    def _window_steps(self, place: dict[str, Any], window: GroupDataset, skipped: int) -> Iterator[Step]:
        self._filler, self._places = window[0], window.places
        sequences = Sequences(window, self.sequence_capacity)
        number = place["pass"] * 1_000_003 + place["window"]
        sampler = StepSampler(self.args, sequences.lengths, sequences.desirable, epoch=lambda: number)
        for position, step in enumerate(sampler.steps()[skipped:], skipped + 1):
            yield from [self._collate([])] * (self.args.gradient_accumulation_steps - 1)
            share = self._collate([sequences[i] for i in step[sampler.rank :: sampler.world_size]])
            yield dataclasses.replace(share, place=place | {"step": position})

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        sequences = Sequences(self.eval_dataset if eval_dataset is None else eval_dataset, None)
        indices = range(self.args.process_index, len(sequences), self.args.world_size)
        size = self.args.per_device_eval_batch_size
        return self._loader(sequences, [indices[i : i + size] for i in range(0, len(indices), size)])

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list[Step], None]:
        return list(itertools.islice(epoch_iterator, num_batches)), None  # steps carry their own totals

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of every micro-batch of the step; returns this rank's part of the loss × ranks."""
        if not inputs.groups and not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        random_state, sums = self._random_state(), dict(self._sums)

        def again() -> None:
            model.zero_grad()
            self._set_random_state(random_state)
            self._sums = dict(sums)

        loss = self._within_memory(inputs, self._places, lambda step: self._forward_backward(model, step), again)
        self._tokens_since_log += inputs.num_tokens
        self._place = inputs.place or self._place
        return loss

    def _within_memory(
        self, step: Step, places: RowLocations | None, compute: Callable[[Step], T], again: Callable[[], None]
    ) -> T:
        """`compute` of the step, cut smaller where memory does not suffice; `again` is called before it is repeated."""

        def attempt(token_budget: int) -> T:
            if token_budget < self.token_budget:
                if self.args.world_size > 1:  # the others wait for what this one does not come to
                    raise TrainingError(
                        f"out of memory on process {self.args.process_index}; set token_budget to {token_budget} (it is "
                        f"{self.token_budget}) and run again: it goes on from the last checkpoint"
                    )
                self.token_budget = token_budget
                again()
            if step.groups and step.token_budget > token_budget:
                return compute(dataclasses.replace(self._collate([step.groups]), place=step.place))
            return compute(step)

        groups = step.groups or [self._filler]
        return within_memory(attempt, self.token_budget, groups, lambda group: name_rows(places, [group.row]))[0]

    def _forward_backward(self, model, inputs: Step) -> torch.Tensor:
        """Gradients of the step; returns this rank's part of the loss × ranks."""
        num_groups, mean_length = self._totals(inputs)
        share = self.args.world_size if inputs.groups else 0  # DDP averages gradients over ranks
        step = inputs if inputs.groups else self._collate([[self._filler]])  # it joins the reduction without rows too
        self._add_reference(step)
        auxiliary = self._all_ranks(self._auxiliary_sums(step) * bool(share))
        slopes = self._slopes(inputs.batches, mean_length, auxiliary) if self.objective.whole_step else None
        batches = step.batches
        loss_sum = torch.zeros((), device=self.args.device)
        parts: list[torch.Tensor] = []
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                scores = self._score(model, batch.to(self.args.device), mean_length, auxiliary)
                losses = self.objective.loss(scores)
                self._add_metrics(scores, losses, counted=share > 0)
                if slopes is None:
                    loss = losses.losses.sum() / num_groups * share
                    loss_sum += loss.detach()
                else:
                    loss = (scores.logps * next(slopes, 0.0)).sum() * share
                parts += [scores.logps.detach().sum(), loss.detach()]
                # DeepSpeed would divide by its own count of accumulation steps.
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        loss_sum = self._whole_step_loss if slopes is not None else loss_sum
        self.observe(loss_sum, parts, step.rows)
        return loss_sum

    def _totals(self, step: Step) -> tuple[torch.Tensor | int, torch.Tensor | float]:
        """Groups of the step, and targets of desirable completions / groups, over all ranks."""
        if self.args.world_size == 1:
            return len(step.groups), step.chosen_tokens / max(len(step.groups), 1)
        counts = torch.tensor([len(step.groups), step.chosen_tokens], device=self.args.device, dtype=torch.float32)
        groups, tokens = self.accelerator.reduce(counts, "sum")
        return groups, tokens / groups

    def _score(self, model, batch: PackedBatch, mean_length, auxiliary: torch.Tensor | None = None) -> Scores:
        """Log-probabilities of a batch's targets, beside the reference's."""
        return Scores(
            logps=model(packed=batch),
            reference_logps=batch.reference,
            target_completion=batch.target_completion,
            completion_group=batch.completion_group,
            chosen=batch.chosen,
            rejected=batch.rejected,
            num_targets=batch.num_targets,
            lengths=batch.lengths,
            tags=batch.tags,
            mean_chosen_length=mean_length,
            auxiliary=auxiliary,
        )

    @torch.no_grad()
    def _add_reference(self, step: Step) -> None:
        """Put the reference's log-probabilities into the step's batches, where the objective needs them."""
        if not self.objective.needs_reference or all(batch.reference is not None for batch in step.batches):
            return
        with self.accelerator.autocast(), self.reference(self.model) as frozen:
            for number, batch in enumerate(step.batches):
                if not step.shared:
                    batch.reference = frozen(packed=batch.to(self.args.device))
                    continue
                shared, own, auxiliary = (part.to(self.args.device) for part in step.shared[number])
                logps = frozen(packed=shared)
                batch.reference, step.auxiliary[number].reference = logps[own], logps[auxiliary]

    @torch.no_grad()
    def _auxiliary_sums(self, step: Step, num_tags: int = 0) -> torch.Tensor:
        """[1 + tags, K] sums of this rank's auxiliary completions: of all, and by tag; K is 0 for methods without."""
        if self.objective.auxiliary is None:
            return torch.zeros(1 + num_tags, 0, device=self.args.device)
        # Not through DDP, whose ranks must call forward equally often: one may have no rows.
        parts = [self._score(self.model, batch.to(self.args.device), 1.0) for batch in step.auxiliary]
        scores = join_scores(parts or [self._no_scores()])
        some = [scores, *(scores.tagged(tag) for tag in range(1, 1 + num_tags))]
        return torch.stack([self.objective.auxiliary(of_tag) for of_tag in some])

    def _no_scores(self) -> Scores:
        """Of no completions: what an objective makes of them has the shape that it makes of any."""
        empty, none = torch.zeros(0, device=self.args.device), torch.zeros(0, dtype=torch.long, device=self.args.device)
        return Scores(empty, empty, none, none, none, none, none, empty, none, 1.0)

    def _all_ranks(self, sums: torch.Tensor) -> torch.Tensor | None:
        """The [K] sums of all auxiliary completions, from :meth:`_auxiliary_sums` of all ranks."""
        return self.accelerator.reduce(sums, "sum")[0] if self.objective.auxiliary else None

    def _slopes(self, batches: list[PackedBatch], mean_length, auxiliary) -> Iterator[torch.Tensor]:
        """d loss / d log-probability of each batch's targets, where the loss needs the whole step at once."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # the pass with gradients sees the same dropout
            parts = [self._score(self.model, batch.to(self.args.device), mean_length, auxiliary) for batch in batches]
        scores, own = self._gather(parts)
        logps = scores.logps.requires_grad_()
        loss = self.objective.loss(scores).losses.mean()
        (slope,) = torch.autograd.grad(loss, logps)
        self._whole_step_loss = loss.detach()
        return iter(slope[own].split([len(part.logps) for part in parts]))

    def _gather(self, parts: list[Scores]) -> tuple[Scores, slice]:
        """All ranks' scores as one, and which targets of it are this rank's."""
        everyone = [parts]
        if self.args.world_size > 1:
            everyone = gather_object([[part.to("cpu") for part in parts]])
        counts = [sum(len(part.logps) for part in own) for own in everyone]
        start = sum(counts[: self.args.process_index])
        joined = join_scores([part.to(self.args.device) for own in everyone for part in own])
        return joined, slice(start, start + counts[self.args.process_index])

    @torch.no_grad()
    def _add_metrics(self, scores: Scores, losses: Losses, counted: bool) -> None:
        """Add to the sums, or only zeros: all ranks must have the same ones when they are reduced."""
        for name, value in self.objective.metrics.sums(scores, losses).items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double() * counted

    def progress(self) -> dict[str, Any]:
        place = self._place and self._place | {"done": self.state.global_step}
        budget = {"token_budget": self.token_budget, "set_budget": self._set_budget}
        return {**budget, "recomputed": self.recomputed, "place": place}

    def go_on(self, progress: dict[str, Any]) -> None:
        self._place = progress.get("place", {})
        if "token_budget" in progress and progress.get("set_budget") == self._set_budget:  # what was found to fit
            self.token_budget, self.fits_budget = progress["token_budget"], False
        if self.fits_recompute and progress.get("recomputed") is not None:
            self.recomputed, self.fits_recompute = progress["recomputed"], False

    def running(self) -> dict[str, Any]:
        return super().running() | {"sums": dict(self._sums)}

    def keep_running(self, sums: dict[str, Any]) -> None:
        super().keep_running(sums)
        self._sums = {name: value.to(self.args.device) for name, value in sums["sums"].items()}

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate reads padded inputs; tokens per second is logged instead

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self._sums:
                values = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum").tolist()
                logs |= self.objective.metrics.derive(dict(zip(self._sums, values, strict=True)), logs["loss"])
                self._sums = {}
            now = time.perf_counter()
            logs["tokens_per_second"] = round(self._tokens_since_log / (now - self._last_log_time), 1)
            self._tokens_since_log, self._last_log_time = 0, now
        logs.pop("total_flos", None)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._last_log_time = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss over the whole set (not a mean of batch means) and the objective's metrics; some of both by dialect."""
        started = time.perf_counter()
        if not self.accelerator._models:  # evaluation without training
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader
        sequences: Any = dataloader.dataset  # Sequences
        model: Any = self.model
        model.eval()
        parts: list[Scores] = []
        dialects = getattr(sequences.groups, "dialects", ())
        sums = self._auxiliary_sums(self._collate([]), len(dialects))

        def measure(step: Step) -> tuple[torch.Tensor, list[Scores]]:
            self._add_reference(step)
            auxiliary = self._auxiliary_sums(step, len(dialects))
            return auxiliary, [self._score(model, batch.to(self.args.device), 1.0) for batch in step.batches]

        for step in dataloader:
            auxiliary, scores = self._within_memory(
                step, getattr(sequences.groups, "places", None), measure, lambda: None
            )
            sums = sums + auxiliary
            parts += scores
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        joined, _ = self._gather(parts)
        if self.objective.auxiliary:
            sums = self.accelerator.reduce(sums, "sum")
        metrics = self._measure(joined, sums[0])
        for tag, dialect in enumerate(dialects, 1):
            part = self._measure(joined.tagged(tag), sums[tag])
            metrics |= {f"{name}/{dialect}": part[name] for name in _BY_DIALECT if name in part}
        if self.samples and sequences.groups is self.eval_dataset:
            with self.accelerator.autocast():
                metrics |= self.samples(model, self.state.global_step)
        self._last_log_time += time.perf_counter() - started  # tokens per second are those of training
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(sequences),
        )

    def _measure(self, scores: Scores, auxiliary: torch.Tensor) -> dict[str, float]:
        """Loss and metrics of a whole set."""
        scores.mean_chosen_length = scores.num_targets[scores.chosen].sum() / len(scores.tags)
        scores.auxiliary = auxiliary
        losses = self.objective.loss(scores)
        loss = losses.losses.mean().item()
        sums = {name: value.item() for name, value in self.objective.metrics.sums(scores, losses).items()}
        return {"loss": loss, **self.objective.metrics.derive(sums, loss)}
