"""Work that does not fit into memory is done again in smaller parts."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from arabic_qwen.errors import TrainingError, one_line
from arabic_qwen.packing.group import Group

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


@contextlib.contextmanager
def told_memory() -> Iterator[None]:
    """A context whose work cannot be cut smaller, as the optimizer's step.

    Raises:
        TrainingError: memory does not suffice.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error)
    raise TrainingError(
        f"out of memory ({reason}); lower token_budget, or set gradient_checkpointing to true or eval_samples to 0, and "
        "run again: a run goes on from its last checkpoint. If that is not enough, begin anew with optim=adamw_8bit, "
        "load_in_4bit=true or a smaller model"
    )


def within_memory(
    compute: Callable[[int], T],
    token_budget: int,
    groups: Sequence[Group],
    where: Callable[[Group], str] = lambda group: "an example",
) -> tuple[T, int]:
    """`compute(token_budget)`, with half the budget where memory does not suffice, until each group is alone.

    Args:
        compute: of all groups, cut by :func:`~arabic_qwen.packing.bins.micro_batches`; may be called several times.
        where: names a group for the error.

    Returns:
        What it returned, and the token budget with which it did.

    Raises:
        TrainingError: the longest group does not fit even alone.
    """
    while True:
        try:
            return compute(token_budget), token_budget
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only here: the error's traceback holds what was computed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(groups, key=lambda group: group.num_budgeted)
        tried = min(token_budget, sum(group.num_budgeted for group in groups))
        if tried <= longest.num_budgeted:
            raise TrainingError(
                f"out of memory with {where(longest)} alone ({longest.num_budgeted:,} tokens); lower max_seq_length, set "
                "load_in_4bit (and to train, gradient_checkpointing) to true, or choose a smaller model"
            )
        smaller = max(tried // 2, longest.num_budgeted)
        logger.warning(
            "out of memory with token_budget %d: the same is done again, and the rest of the run, with %d",
            token_budget,
            smaller,
        )
        token_budget = smaller
