"""Preference optimisation: KTO, IPO, CPO, and what DPO and SimPO share with them."""

from __future__ import annotations

from typing import Any

from arabic_qwen.config import BaseConfig, CPOConfig, IPOConfig, KTOConfig, ORPOConfig, PreferenceConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.training.base_trainer import BaseTrainer


class PreferenceTrainer(BaseTrainer):
    """Learns which answers are better; the method follows from the configuration's class."""

    config_class: type[BaseConfig] = PreferenceConfig

    def __init__(self, config: Any):
        if not isinstance(config, BaseConfig) and not hasattr(self.config_class, "method"):
            raise ConfigurationError(f"{type(self).__name__} needs a configuration class, which says the method")
        super().__init__(config)


class KTOTrainer(PreferenceTrainer):
    """Kahneman-Tversky optimisation."""

    config_class = KTOConfig


class IPOTrainer(PreferenceTrainer):
    """Identity preference optimisation."""

    config_class = IPOConfig


class CPOTrainer(PreferenceTrainer):
    """Contrastive preference optimisation."""

    config_class = CPOConfig


class ORPOTrainer(PreferenceTrainer):
    """Odds-ratio preference optimisation."""

    config_class = ORPOConfig


def create_kto_trainer(config: Any) -> KTOTrainer:
    """A trainer for KTO with `config`, usually a KTOConfig."""
    return KTOTrainer(config)


def create_ipo_trainer(config: Any) -> IPOTrainer:
    """A trainer for IPO with `config`, usually an IPOConfig."""
    return IPOTrainer(config)


def create_cpo_trainer(config: Any) -> CPOTrainer:
    """A trainer for CPO with `config`, usually a CPOConfig."""
    return CPOTrainer(config)


def create_orpo_trainer(config: Any) -> ORPOTrainer:
    """A trainer for ORPO with `config`, usually an ORPOConfig."""
    return ORPOTrainer(config)
