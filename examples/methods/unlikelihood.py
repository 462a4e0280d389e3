"""Unlikelihood training (Welleck et al., 2019, https://arxiv.org/abs/1908.04319): a loss of single tokens.

arabic-qwen train unlikelihood.yaml --plugin examples/methods/unlikelihood.py
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from arabic_qwen.methods.margins import average_rewards
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores
from arabic_qwen.methods.preference import PreferenceConfig
from arabic_qwen.methods.registry import Method, register


class UnlikelihoodConfig(PreferenceConfig):
    """Unlikelihood training (Welleck et al., 1908.04319): tokens of rejected answers are to be unlikely."""

    method: ClassVar[str] = "unlikelihood"
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate")
    beta: float = Field(default=1.0, gt=0, description="Weight of the rejected answers' tokens")


def objective(config: UnlikelihoodConfig) -> Objective:
    """Mean over tokens of −log p where they are chosen, and of −β log(1 − p) where they are rejected (eq. 4)."""

    def loss(scores: Scores) -> Losses:
        unlikely = -torch.log(-torch.expm1(scores.logps.clamp(max=-1e-6)))  # −log(1 − p), p a hair below 1
        chosen, _ = scores.split(-scores.policy / scores.num_targets)
        _, rejected = scores.split(config.beta * scores.summed(unlikely) / scores.num_targets)
        return Losses(chosen + rejected, average_rewards(scores.policy, scores.num_targets, beta=1.0))

    return Objective(loss, PAIRS)


METHOD = register(Method(UnlikelihoodConfig, rows=("pair",), objective=objective))
