"""What each method optimises: from target log-probabilities to a loss and the metrics reported with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from arabic_qwen.data.packing import PackedBatch
from arabic_qwen.losses.sft import sft_loss


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts over a whole optimizer step or evaluation set, all ranks: what its micro-batches' losses are divided by."""

    groups: torch.Tensor | int
    tokens: torch.Tensor | int  # target tokens of each group's first completion


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training method, as far as the engine knows it.

    Attributes:
        loss: (logps [T], batch, totals) -> scalar; the values for a step's micro-batches add up to its loss.
        derived_metrics: from the evaluation loss to further metrics.
    """

    loss: Callable[[torch.Tensor, PackedBatch, Totals], torch.Tensor]
    derived_metrics: Callable[[float], dict[str, float]]


def _perplexity(loss: float) -> dict[str, float]:
    return {"perplexity": math.exp(min(loss, 700.0))}  # exp(710) overflows a float


OBJECTIVES = {
    "sft": Objective(
        loss=lambda logps, batch, totals: sft_loss(logps, num_tokens=totals.tokens),
        derived_metrics=_perplexity,
    ),
}
