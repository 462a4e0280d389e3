"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from arabic_qwen.config.base import BaseConfig
from arabic_qwen.methods.registry import Method


class SFTConfig(BaseConfig):
    """Supervised fine-tuning: the common parameters and packing."""

    method: ClassVar[str] = "sft"
    sections: ClassVar[dict[str, str]] = BaseConfig.sections | {"packing": "Supervised fine-tuning"}

    packing: bool = Field(
        default=True, description="A training sequence is max_seq_length tokens of several examples, kept apart"
    )

    @property
    def sequence_capacity(self) -> int | None:
        return self.max_seq_length if self.packing else None


METHOD = Method(SFTConfig, rows=("conversation",), objective="arabic_qwen.methods.sft.loss:objective")
