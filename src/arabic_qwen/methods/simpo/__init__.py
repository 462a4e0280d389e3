"""Simple preference optimisation (Meng et al., 2024, https://arxiv.org/abs/2405.14734)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from arabic_qwen.methods.preference import LabelSmoothing, PreferenceConfig
from arabic_qwen.methods.registry import Method


class SimPOConfig(PreferenceConfig):
    """Simple preference optimisation (Meng et al., 2405.14734): length-averaged, without reference."""

    method: ClassVar[str] = "simpo"
    learning_rate: float = Field(default=1e-6, gt=0, description="Peak learning rate")
    beta: float = Field(default=2.0, gt=0, description="Scale of the length-averaged log-probabilities")
    gamma_beta_ratio: float = Field(default=0.5, ge=0, description="Target margin, in units of beta")
    loss_type: Literal["simpo"] = Field(default="simpo", description="Form of the loss")
    label_smoothing: LabelSmoothing = 0.0


METHOD = Method(SimPOConfig, rows=("pair",), objective="arabic_qwen.methods.simpo.loss:objective")
