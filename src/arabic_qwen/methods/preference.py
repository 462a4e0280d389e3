"""Settings that preference methods share."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from arabic_qwen.config.base import BaseConfig, Text

LabelSmoothing = Annotated[
    float, Field(ge=0, lt=0.5, description="Assumed share of pairs labelled the wrong way round")
]


class PreferenceConfig(BaseConfig):
    """What all preference methods share: the strength of the preference and the lengths of prompt and answer."""

    sections: ClassVar[dict[str, str]] = BaseConfig.sections | {"beta": "Preference optimisation"}

    beta: float = Field(
        default=0.1, gt=0, description="Strength of the preference; higher stays closer to the reference"
    )
    max_prompt_length: int = Field(
        default=256, ge=1, description="Longest prompt, in tokens; longer ones lose their beginning"
    )
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="Longest prompt with answer, in tokens; longer answers are cut; null: max_seq_length",
    )

    @property
    def length_key(self) -> str:
        return "max_length" if self.max_length else "max_seq_length"


class ReferenceConfig(PreferenceConfig):
    """Methods that compare the policy with a reference: the model as it is before training, unless another is named."""

    ref_model_name: Text | None = Field(default=None, description="Reference model; null: the model before training")
    precompute_reference: bool = Field(
        default=False,
        description="Compute the reference's log-probabilities once, before training, and keep them on disk",
    )
