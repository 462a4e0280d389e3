"""A binary classifier of answers whose threshold is what the policy gained on answers to other prompts.

After BCO (Jung et al., 2024, https://arxiv.org/abs/2404.04656), with KTO's estimate in the place of its running mean.

    arabic-qwen train offset.yaml --plugin examples/methods/offset.py
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from arabic_qwen.data.auxiliary import mismatched
from arabic_qwen.methods.margins import implicit_rewards, logistic
from arabic_qwen.methods.objective import LABELS, Losses, Objective, Scores
from arabic_qwen.methods.preference import ReferenceConfig
from arabic_qwen.methods.registry import Method, register


class OffsetConfig(ReferenceConfig):
    """Binary classifier optimisation (Jung et al., 2404.04656) with a threshold from answers to other prompts."""

    method: ClassVar[str] = "offset"
    learning_rate: float = Field(default=1e-6, gt=0, description="Peak learning rate")


def objective(config: OffsetConfig) -> Objective:
    """−log σ(±(βΔ − δ)), + for good answers, where δ is the mean of βΔ over the step's mismatched completions."""

    def sums(scores: Scores) -> torch.Tensor:
        gained = scores.policy - scores.reference
        return torch.stack([gained.sum(), gained.new_full((), len(gained))])

    def loss(scores: Scores) -> Losses:
        assert scores.auxiliary is not None
        total, count = scores.auxiliary
        threshold = config.beta * total / count.clamp(min=1)
        sign = torch.full_like(scores.policy, -1.0).index_fill(0, scores.chosen, 1.0)
        losses = logistic(sign * (config.beta * (scores.policy - scores.reference) - threshold))
        rewards = implicit_rewards(scores.policy, scores.reference, beta=config.beta)
        return Losses(losses, rewards, {"threshold": threshold})

    return Objective(loss, LABELS, needs_reference=True, auxiliary=sums, logged=("threshold",))


METHOD = register(Method(OffsetConfig, rows=("feedback",), objective=objective, auxiliary=mismatched))
