"""Parameters of preference optimisation, one class a method."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from arabic_qwen.config.base import BaseConfig, Text

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

#: Forms of DPO's loss that have label smoothing (losses.dpo.LABEL_SMOOTHED; this package does not import torch).
_LABEL_SMOOTHED = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "aot", "aot_unpaired", "sigmoid_norm")


LabelSmoothing = Annotated[
    float, Field(ge=0, lt=0.5, description="Assumed share of pairs labelled the wrong way round")
]


class PreferenceConfig(BaseConfig):
    """What all preference methods share: the strength of the preference and the lengths of prompt and answer."""

    sections: ClassVar[dict[str, str]] = BaseConfig.sections | {"beta": "Preference optimisation"}

    beta: float = Field(0.1, gt=0, description="Strength of the preference; higher stays closer to the reference")
    max_prompt_length: int = Field(256, ge=1, description="Longest prompt, in tokens; longer ones lose their beginning")
    max_length: int | None = Field(
        None, ge=8, description="Longest prompt with answer, in tokens; longer answers are cut; null: max_seq_length"
    )

    @property
    def length_key(self) -> str:
        return "max_length" if self.max_length else "max_seq_length"


class ReferenceConfig(PreferenceConfig):
    """Methods that compare the policy with a reference: the model as it is before training, unless another is named."""

    ref_model_name: Text | None = Field(None, description="Reference model; null: the model before training")
    precompute_reference: bool = Field(
        False, description="Compute the reference's log-probabilities once, before training, and keep them on disk"
    )


class DPOConfig(ReferenceConfig):
    """Direct preference optimisation (Rafailov et al., 2305.18290) and its relatives."""

    method: ClassVar[str] = "dpo"
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate")
    loss_type: DPOLoss = Field("sigmoid", description="Form of the loss, by TRL's names")
    label_smoothing: LabelSmoothing = 0.0
    discopop_tau: float = Field(0.05, gt=0, le=1, description="Temperature of loss_type discopop")

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> DPOConfig:
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "loss_type 'exo_pair' takes the logarithm of label_smoothing; set it above 0 (its paper uses 0.001)"
            )
        if self.label_smoothing and self.loss_type not in _LABEL_SMOOTHED:
            raise ValueError(
                f"loss_type {self.loss_type!r} has no label smoothing; set label_smoothing to 0, "
                f"or choose one of {', '.join(_LABEL_SMOOTHED)}"
            )
        return self


class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306): answers that are good or bad, not pairs."""

    method: ClassVar[str] = "kto"
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate")
    desirable_weight: float = Field(1.0, ge=0, description="Weight of desirable answers")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of undesirable answers")
    unpair_preferences: bool = Field(
        False, description="Also read chosen/rejected pairs, each as a good and a bad answer"
    )


class IPOConfig(ReferenceConfig):
    """Identity preference optimisation (Azar et al., 2310.12036)."""

    method: ClassVar[str] = "ipo"
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate")
    tau: float = Field(0.1, gt=0, description="Regularisation: the log-ratio margin per token is drawn to 1 / (2 tau)")
    label_smoothing: LabelSmoothing = 0.0


class CPOConfig(PreferenceConfig):
    """Contrastive preference optimisation (Xu et al., 2401.08417), with any number of rejected answers."""

    method: ClassVar[str] = "cpo"
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate")
    cpo_alpha: float = Field(1.0, ge=0, description="Weight of the chosen answer's negative log-likelihood")
    simpo_gamma: float = Field(1.0, ge=0, description="Target margin of loss_type simpo")
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = Field("sigmoid", description="Form of the pairwise term")
    negatives: Literal["mean", "softmax"] = Field(
        "mean", description="Several rejected answers: mean over pairs, or one softmax over all (loss_type sigmoid)"
    )
    label_smoothing: LabelSmoothing = 0.0

    @model_validator(mode="after")
    def _check_negatives(self) -> CPOConfig:
        if self.negatives == "softmax" and self.loss_type != "sigmoid":
            raise ValueError(
                f"negatives 'softmax' needs loss_type 'sigmoid', not {self.loss_type!r}; set negatives to mean"
            )
        return self


class SimPOConfig(PreferenceConfig):
    """Simple preference optimisation (Meng et al., 2405.14734): length-averaged, without reference."""

    method: ClassVar[str] = "simpo"
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate")
    beta: float = Field(2.0, gt=0, description="Scale of the length-averaged log-probabilities")
    gamma_beta_ratio: float = Field(0.5, ge=0, description="Target margin, in units of beta")
    loss_type: Literal["simpo"] = Field("simpo", description="Form of the loss")
    label_smoothing: LabelSmoothing = 0.0


class ORPOConfig(PreferenceConfig):
    """Odds-ratio preference optimisation (Hong et al., 2403.07691): learns the chosen answer and the preference at once."""

    method: ClassVar[str] = "orpo"
    learning_rate: float = Field(8e-6, gt=0, description="Peak learning rate")
    beta: float = Field(0.1, ge=0, description="Weight of the odds-ratio term (the paper's lambda)")
