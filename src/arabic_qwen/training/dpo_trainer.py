"""Direct preference optimisation."""

from __future__ import annotations

from typing import Any

from arabic_qwen.config import DPOConfig
from arabic_qwen.training.preference_trainer import PreferenceTrainer


class DPOTrainer(PreferenceTrainer):
    """Learns from pairs of a chosen and a rejected answer."""

    config_class = DPOConfig


def create_dpo_trainer(config: Any) -> DPOTrainer:
    """A trainer for DPO with `config`, usually a DPOConfig."""
    return DPOTrainer(config)
