"""Simple preference optimisation: length-averaged, without reference."""

from __future__ import annotations

from typing import Any

from arabic_qwen.config import SimPOConfig
from arabic_qwen.training.preference_trainer import PreferenceTrainer


class SimPOTrainer(PreferenceTrainer):
    """Learns from pairs of a chosen and a rejected answer."""

    config_class = SimPOConfig


def create_simpo_trainer(config: Any) -> SimPOTrainer:
    """A trainer for SimPO with `config`, usually a SimPOConfig."""
    return SimPOTrainer(config)
