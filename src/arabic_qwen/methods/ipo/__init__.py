"""Identity preference optimisation (Azar et al., 2023, https://arxiv.org/abs/2310.12036)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from arabic_qwen.config.base import Condition
from arabic_qwen.data.preferences import to_measured_pair
from arabic_qwen.methods.preference import LabelSmoothing, ReferenceConfig
from arabic_qwen.methods.registry import Method, one_conversation


class IPOConfig(ReferenceConfig):
    """Identity preference optimisation (Azar et al., 2310.12036)."""

    method: ClassVar[str] = "ipo"
    learning_rate: float = Field(default=5e-7, gt=0, description="Peak learning rate")
    acts_where: ClassVar[dict[str, Condition]] = ReferenceConfig.acts_where | {
        "beta": (lambda config: False, "in IPO it only scales the rewards that are reported; tau is its strength")
    }

    beta: float = Field(
        default=0.1, gt=0, description="Scale of the reported rewards, and nothing else; tau is what acts"
    )
    tau: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the preference: the log-ratio margin per token is drawn to 1 / (2 tau)",
    )
    label_smoothing: LabelSmoothing = 0.0


METHOD = Method(
    IPOConfig,
    rows=("pair",),
    read=one_conversation(to_measured_pair),
    objective="arabic_qwen.methods.ipo.loss:objective",
)
