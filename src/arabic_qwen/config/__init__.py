"""Configuration classes, one per training method."""

import os

from arabic_qwen.config.base import METHOD_CONFIGS, BaseConfig
from arabic_qwen.config.preference import (
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    PreferenceConfig,
    ReferenceConfig,
    SimPOConfig,
)
from arabic_qwen.config.sft import SFTConfig
from arabic_qwen.config.yaml_io import read_config_file
from arabic_qwen.errors import ConfigurationError

__all__ = [
    "METHOD_CONFIGS",
    "BaseConfig",
    "CPOConfig",
    "DPOConfig",
    "IPOConfig",
    "KTOConfig",
    "ORPOConfig",
    "PreferenceConfig",
    "ReferenceConfig",
    "SFTConfig",
    "SimPOConfig",
    "load_config",
]


def load_config(path: str | os.PathLike, overrides: list[str] | None = None) -> BaseConfig:
    """Read the YAML file of a run; its `method:` picks the class.

    Raises:
        ConfigurationError: as :meth:`BaseConfig.from_yaml`, or `method:` is missing or unknown.
    """
    file = read_config_file(path, overrides or [])
    method = file.values.pop("method", None)
    known = ", ".join(METHOD_CONFIGS)
    if method is None:
        raise ConfigurationError(f"{path}: method: is missing; add a line `method: NAME`, one of {known}")
    if not isinstance(method, str) or method not in METHOD_CONFIGS:
        raise ConfigurationError(file.locate(f"method: {method!r} is unknown; choose one of {known}"))
    return METHOD_CONFIGS[method].from_file(file)
