"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from arabic_qwen.config import SFTConfig
from arabic_qwen.training.base_trainer import BaseTrainer


class SFTTrainer(BaseTrainer):
    """Trains on conversations; the loss is taken on what the assistant says."""

    config_class = SFTConfig

    def generate_response(self, instruction: str, max_length: int = 256, **kwargs: Any) -> str:
        """Answer one instruction; `kwargs` as for :meth:`predict`."""
        return self.predict(instruction, max_length=max_length, **kwargs)


def create_sft_trainer(config: Any) -> SFTTrainer:
    """A trainer for supervised fine-tuning with `config`, usually an SFTConfig."""
    return SFTTrainer(config)
