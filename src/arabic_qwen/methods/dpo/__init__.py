"""Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290) and its variants."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from arabic_qwen.config.base import Condition
from arabic_qwen.methods.preference import LabelSmoothing, ReferenceConfig
from arabic_qwen.methods.registry import Method

DPOLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "bco_pair",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]

#: Forms of the loss that have label smoothing; the others' papers define none.
LABEL_SMOOTHED = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "aot", "aot_unpaired", "sigmoid_norm")


class DPOConfig(ReferenceConfig):
    """Direct preference optimisation (Rafailov et al., 2305.18290) and its relatives."""

    method: ClassVar[str] = "dpo"
    acts_where: ClassVar[dict[str, Condition]] = ReferenceConfig.acts_where | {
        "discopop_tau": (lambda config: config.loss_type == "discopop", "it is the temperature of loss_type discopop"),
        "beta": (lambda config: config.loss_type != "sft", "loss_type sft has no preference term"),
    }

    learning_rate: float = Field(default=5e-7, gt=0, description="Peak learning rate")
    loss_type: DPOLoss = Field(default="sigmoid", description="Form of the loss, by TRL's names")
    label_smoothing: LabelSmoothing = 0.0
    discopop_tau: float = Field(default=0.05, gt=0, le=1, description="Temperature of loss_type discopop")

    def notices(self) -> list[str]:
        said = super().notices()
        if self.loss_type == "ipo":
            said.append(f"loss_type: 'ipo' is another name of method ipo with tau={self.beta:g}")
        if self.loss_type == "sft":
            said.append("loss_type: 'sft' is another name of method sft on the chosen answers")
        return said

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> DPOConfig:
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "loss_type 'exo_pair' takes the logarithm of label_smoothing; set it above 0 (its paper uses 0.001)"
            )
        if self.label_smoothing and self.loss_type not in LABEL_SMOOTHED:
            raise ValueError(
                f"loss_type {self.loss_type!r} has no label smoothing; set label_smoothing to 0, "
                f"or choose one of {', '.join(LABEL_SMOOTHED)}"
            )
        return self


METHOD = Method(DPOConfig, rows=("pair",), objective="arabic_qwen.methods.dpo.loss:objective")
