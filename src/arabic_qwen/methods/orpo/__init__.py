"""Odds-ratio preference optimisation (Hong et al., 2024, https://arxiv.org/abs/2403.07691)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from arabic_qwen.methods.preference import PreferenceConfig
from arabic_qwen.methods.registry import Method


class ORPOConfig(PreferenceConfig):
    """Odds-ratio preference optimisation (Hong et al., 2403.07691): learns the chosen answer and the preference at once."""

    method: ClassVar[str] = "orpo"
    learning_rate: float = Field(default=8e-6, gt=0, description="Peak learning rate")
    beta: float = Field(default=0.1, ge=0, description="Weight of the odds-ratio term (the paper's lambda)")


METHOD = Method(ORPOConfig, rows=("pair",), objective="arabic_qwen.methods.orpo.loss:objective")
