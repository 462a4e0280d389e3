"""Contrastive preference optimisation (Xu et al., 2024, https://arxiv.org/abs/2401.08417)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from arabic_qwen.config.base import Condition
from arabic_qwen.data.preferences import to_contrast
from arabic_qwen.methods.preference import LabelSmoothing, PreferenceConfig
from arabic_qwen.methods.registry import Method, one_conversation


class CPOConfig(PreferenceConfig):
    """Contrastive preference optimisation (Xu et al., 2401.08417), with any number of rejected answers."""

    method: ClassVar[str] = "cpo"
    acts_where: ClassVar[dict[str, Condition]] = PreferenceConfig.acts_where | {
        "simpo_gamma": (lambda config: config.loss_type == "simpo", "it is the margin of loss_type simpo"),
    }

    learning_rate: float = Field(default=5e-7, gt=0, description="Peak learning rate")
    cpo_alpha: float = Field(default=1.0, ge=0, description="Weight of the chosen answer's negative log-likelihood")
    simpo_gamma: float = Field(
        default=1.0,
        ge=0,
        description="Target margin of loss_type simpo, in units of reward; without effect in the others",
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = Field(
        default="sigmoid", description="Form of the pairwise term"
    )
    negatives: Literal["mean", "softmax"] = Field(
        default="mean",
        description="Several rejected answers: mean over pairs, or one softmax over all (loss_type sigmoid)",
    )
    label_smoothing: LabelSmoothing = 0.0

    def notices(self) -> list[str]:
        said = super().notices()
        if self.loss_type == "simpo" and not self.cpo_alpha:
            ratio = f"gamma_beta_ratio={self.simpo_gamma / self.beta:g}"
            said.append(f"loss_type: 'simpo' with cpo_alpha 0 is another name of method simpo with {ratio}")
        return said

    @model_validator(mode="after")
    def _check_negatives(self) -> CPOConfig:
        if self.negatives == "softmax" and self.loss_type != "sigmoid":
            raise ValueError(
                f"negatives 'softmax' needs loss_type 'sigmoid', not {self.loss_type!r}; set negatives to mean"
            )
        return self


METHOD = Method(
    CPOConfig,
    rows=("pair", "contrast"),
    read=one_conversation(to_contrast),
    objective="arabic_qwen.methods.cpo.loss:objective",
)
