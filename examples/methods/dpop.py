"""DPO-Positive (Pal et al., 2024, https://arxiv.org/abs/2402.13228): DPO that keeps the chosen answer likely.

arabic-qwen train dpop.yaml --plugin examples/methods/dpop.py
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from arabic_qwen.methods.margins import implicit_rewards, logistic
from arabic_qwen.methods.objective import PAIRS, Losses, Objective, Scores
from arabic_qwen.methods.preference import ReferenceConfig
from arabic_qwen.methods.registry import Method, register


class DPOPConfig(ReferenceConfig):
    """DPO-Positive (Pal et al., 2402.13228): a chosen answer that gets less likely than it was costs extra."""

    method: ClassVar[str] = "dpop"
    learning_rate: float = Field(default=5e-7, gt=0, description="Peak learning rate")
    penalty: float = Field(
        default=50.0, ge=0, description="Weight of what the chosen answer loses (the paper's lambda)"
    )


def objective(config: DPOPConfig) -> Objective:
    """−log σ(β(Δ_c − Δ_r − λ max(0, −Δ_c))), eq. 3, where Δ = log π − log π_ref."""

    def loss(scores: Scores) -> Losses:
        chosen, rejected = scores.split(scores.policy - scores.reference)
        losses = logistic(config.beta * (chosen - rejected - config.penalty * torch.relu(-chosen)))
        return Losses(losses, implicit_rewards(scores.policy, scores.reference, beta=config.beta))

    return Objective(loss, PAIRS, needs_reference=True)


METHOD = register(Method(DPOPConfig, rows=("pair",), objective=objective))
