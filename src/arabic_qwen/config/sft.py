"""Parameters of supervised fine-tuning."""

from typing import ClassVar, Literal

from pydantic import Field

from arabic_qwen.config.base import BaseConfig


class SFTConfig(BaseConfig):
    """Supervised fine-tuning: the common parameters and how conversations become tokens."""

    method: ClassVar[str] = "sft"
    sections: ClassVar[dict[str, str]] = BaseConfig.sections | {"packing": "Supervised fine-tuning"}

    packing: bool = Field(
        True, description="A training sequence is max_seq_length tokens of several examples, kept apart"
    )
    instruction_template: Literal["alpaca", "chatml", "tokenizer"] = Field(
        "alpaca", description="Prompt format: alpaca, chatml, or the tokenizer's own chat template"
    )
    response_template: str = Field("### Response:\n", description="What precedes the answer in the alpaca template")
    system_prompt: str | None = Field(None, description="System prompt of conversations that have none")
