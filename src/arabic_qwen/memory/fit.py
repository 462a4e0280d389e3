"""Chooses the token budget, and how many layers recompute their activations, from the memory that is free."""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from arabic_qwen.data.stream import GroupStream
from arabic_qwen.memory.limit import is_out_of_memory
from arabic_qwen.memory.model import moment_bytes
from arabic_qwen.models.layers import decoder_layers, recompute_first
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.group import Group

logger = logging.getLogger(__name__)

#: Tokens that keep a GPU busy with the layers of a 7B; more only take memory.
FULL_BUDGET = 8192
PROCESSOR_BUDGET = 2048
_MLP_OF_7B = 3584 * 18944  # weights of each of its three products
_LARGEST_BUDGET = 8 * FULL_BUDGET
#: Share of the free memory that may be used: micro-batches differ, and what is free is never in one piece.
USABLE = 0.92

#: (tokens of a micro-batch, layers that keep their activations) -> bytes at the peak of a step; inf: out of memory.
Measure = Callable[[int, int], float]


class Fit(NamedTuple):
    """What was chosen."""

    token_budget: int
    recomputed: int  # layers
    peak: float  # bytes; inf: not even this fits


def default_budget() -> int:
    return FULL_BUDGET if torch.cuda.is_available() else PROCESSOR_BUDGET


def busy_budget(hidden: int, intermediate: int) -> int:
    """Tokens that keep a GPU busy: small layers have as many kernels as large ones, and else wait for their launches.

    Args:
        hidden: width of the model.
        intermediate: width of its MLP.
    """
    return min(max(FULL_BUDGET, FULL_BUDGET * _MLP_OF_7B // (hidden * intermediate)), _LARGEST_BUDGET)


def choose(
    measure: Measure,
    *,
    layers: int,
    limit: float,
    longest: int,
    busy: int = FULL_BUDGET,
    token_budget: int | None = None,
    recomputed: int | None = None,
) -> Fit:
    """The token budget, then the number of recomputed layers, that make best use of `limit` bytes.

    Args:
        measure: is called a few times; what is chosen has been measured to fit, if anything does.
        layers: of the model.
        longest: tokens of the longest group, which a micro-batch must hold.
        busy: the largest budget, or a half or a quarter of it; above FULL_BUDGET only where nothing more is recomputed for it.
        token_budget: where it is given, it stays.
        recomputed: where it is given, it stays.
    """
    measure = functools.cache(measure)
    grows = token_budget is None
    kept = 0 if recomputed is None else layers - recomputed
    if token_budget is None:
        token_budget = _largest_budget(lambda tokens: measure(tokens, kept), limit, longest)
    tokens = max(token_budget, longest)
    peak = measure(tokens, kept)
    if recomputed is None and peak <= limit:
        kept, peak = _most_kept(lambda number: measure(tokens, number), layers, limit, peak)
    if grows and token_budget == FULL_BUDGET and (recomputed is not None or kept == layers):
        while busy > token_budget:
            found = measure(max(busy, longest), kept)
            if found <= limit:
                return Fit(busy, layers - kept, found)
            busy //= 2
    return Fit(token_budget, layers - kept, peak)


def _largest_budget(measure: Callable[[int], float], limit: float, longest: int) -> int:
    tokens = max(FULL_BUDGET, longest)
    if measure(tokens) <= limit:
        return FULL_BUDGET
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        peak = measure(tokens)
        if peak <= limit:
            break
    else:
        return longest
    less = measure(tokens // 2)
    a_token = max((peak - less) / (tokens - tokens // 2), 1.0)
    more = min(tokens + int((limit - peak) / a_token), 2 * tokens, FULL_BUDGET)
    return more if more > tokens and measure(more) <= limit else tokens


def _most_kept(measure: Callable[[int], float], layers: int, limit: float, peak: float) -> tuple[int, float]:
    """Layers that can keep their activations, and the peak with so many; `peak`: with none.

    The first two cost less than each further one: a recomputed layer's are in memory for a time too, and the last layer has
    no MLP but where a target is predicted.
    """
    kept, trying, too_many = 0, 1, layers + 1
    while kept < trying < too_many:
        found = measure(trying)
        if found == math.inf:
            too_many, trying = trying, (kept + trying) // 2
            continue
        a_layer = max((found - peak) / (trying - kept), 1.0)
        if found <= limit:
            kept, peak = trying, found
        else:
            too_many = trying
        trying = min(kept + (1 if kept < 3 else max(int((limit - peak) / a_layer), 1)), too_many - 1)
    return kept, peak


def longest_groups(ordered: Sequence[Group], tokens: int) -> list[Group]:
    """Of groups, longest first, those that fit into `tokens`, over again where there are too few; at least one."""
    chosen, room = [ordered[0]], tokens - ordered[0].num_tokens
    while room >= ordered[-1].num_tokens:
        for group in ordered:
            if group.num_tokens > room:
                continue
            chosen.append(group)
            room -= group.num_tokens
    return chosen


def largest_step(lengths: Sequence[int], rows: int, capacity: int | None) -> int:
    """Tokens of an optimizer step of `rows` rows, at most.

    Args:
        lengths: tokens of the groups, longest first.
        capacity: tokens that a row is filled up to with several groups; None: a row is a group.
    """
    return rows * max(capacity, lengths[0]) if capacity else sum(lengths[:rows])


class CudaMeasure:
    """:data:`Measure` by forward and backward passes, which leave nothing behind but the compiled kernels.

    Args:
        model: as prepared for training, but without DDP around it: processes may measure differently often.
        groups: to take the longest of, sorted by length, longest first.
        largest_step: tokens; a micro-batch never has more, whatever the budget.
        optimizer_bytes: that will be added once the optimizer has made its first step.
    """

    def __init__(self, model: Any, groups: Sequence[Group], largest_step: int, optimizer_bytes: float):
        self.model = model
        self.groups = groups
        self.largest_step = largest_step
        self.optimizer_bytes = optimizer_bytes
        self.device = next(model.parameters()).device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def memory(self) -> int:
        """Bytes that this process may have, with what it has already."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def __call__(self, tokens: int, kept: int) -> float:
        recompute_first(self.model, len(decoder_layers(self.model)) - kept)
        batch = pack(longest_groups(self.groups, min(tokens, self.largest_step))).to(self.device)
        self.model.train()
        try:
            with torch.random.fork_rng([self.device]):
                for parameter in self.trained:  # all but the first micro-batch of a step find gradients there
                    parameter.grad = torch.zeros_like(parameter)
                torch.cuda.reset_peak_memory_stats(self.device)
                self.model(packed=batch).sum().backward()
            return torch.cuda.max_memory_allocated(self.device) + self.optimizer_bytes
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            for parameter in self.trained:
                parameter.grad = None
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)  # the run's peak is not that of a try


def fit(trainer: Any) -> None:
    """Set what a :class:`PackedTrainer`, ready for its first step, leaves to be chosen.

    Processes choose alike: what the one with least memory can do.
    """
    if trainer.recomputed is not None:
        recompute_first(trainer.model, trainer.recomputed)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not (trainer.fits_budget or trainer.fits_recompute) or trainer.args.device.type != "cuda" or sharded:
        return
    groups = trainer.train_groups
    if isinstance(groups, GroupStream):
        _, groups = next(groups.windows({}))
    layers = decoder_layers(trainer.model)
    groups = sorted(groups, key=lambda group: -group.num_tokens)
    longest = groups[0].num_tokens
    rows = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    lengths = sorted((group.num_budgeted for group in groups), reverse=True)
    step = largest_step(lengths, rows, trainer.sequence_capacity)
    busy = busy_budget(trainer.model.config.hidden_size, trainer.model.config.intermediate_size)
    moments = moment_bytes(trainer.model, "8bit" in str(trainer.args.optim).lower())
    measure = CudaMeasure(trainer.model, groups, step, 0 if trainer.optimizer.state else moments)
    memory = measure.memory()
    found = choose(
        measure,
        layers=len(layers),
        limit=USABLE * memory,
        longest=longest,
        busy=min(busy, step),
        token_budget=None if trainer.fits_budget else trainer.token_budget,
        recomputed=None if trainer.fits_recompute else sum(layer.gradient_checkpointing for layer in layers),
    )
    everyone = gather_object([found])
    trainer.token_budget = min(one.token_budget for one in everyone)
    recomputed = max(one.recomputed for one in everyone)
    if trainer.fits_recompute:  # else it is the configuration's, which may change on resume
        trainer.recomputed = recomputed
    trainer.fits_budget = trainer.fits_recompute = False
    recompute_first(trainer.model, recomputed)
    used = "more" if math.isinf(found.peak) else f"{found.peak / 1e9:.0f}"
    logger.info(
        f"token_budget {trainer.token_budget:,}, {recomputed} of {len(layers)} layers recomputed: "
        f"{used} of {memory / 1e9:.0f} GB"
    )
    if found.peak > USABLE * memory:
        logger.warning(
            f"the longest example, of {longest:,} tokens, will hardly fit into memory; "
            "`arabic-qwen plan` says what each setting saves"
        )
