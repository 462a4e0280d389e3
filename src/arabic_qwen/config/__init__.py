"""Configuration classes, one per training method. Imports no torch, and a method's own only when it is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arabic_qwen.config.base import BaseConfig
from arabic_qwen.config.yaml_io import read_config_file
from arabic_qwen.errors import ConfigurationError

if TYPE_CHECKING:
    from arabic_qwen.methods.cpo import CPOConfig
    from arabic_qwen.methods.dpo import DPOConfig
    from arabic_qwen.methods.ipo import IPOConfig
    from arabic_qwen.methods.kto import KTOConfig
    from arabic_qwen.methods.orpo import ORPOConfig
    from arabic_qwen.methods.preference import PreferenceConfig, ReferenceConfig
    from arabic_qwen.methods.sft import SFTConfig
    from arabic_qwen.methods.simpo import SimPOConfig

# Classes that are imported from here (PEP 562), and the module under `arabic_qwen.methods` that has each.
_CLASSES = {
    "SFTConfig": "sft",
    "DPOConfig": "dpo",
    "KTOConfig": "kto",
    "IPOConfig": "ipo",
    "CPOConfig": "cpo",
    "SimPOConfig": "simpo",
    "ORPOConfig": "orpo",
    "PreferenceConfig": "preference",
    "ReferenceConfig": "preference",
}

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


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"arabic_qwen.methods.{_CLASSES[name]}"), name)


def _registry() -> Any:
    return importlib.import_module("arabic_qwen.methods.registry")  # which imports this package


class _MethodConfigs(Mapping[str, type[BaseConfig]]):
    """The configuration class of each method that is registered."""

    def __getitem__(self, method: str) -> type[BaseConfig]:
        return _registry().METHODS[method].config

    def __iter__(self) -> Iterator[str]:
        return iter(_registry().METHODS)

    def __len__(self) -> int:
        return len(_registry().METHODS)


METHOD_CONFIGS = _MethodConfigs()


def load_config(path: str | os.PathLike, overrides: list[str] | None = None) -> BaseConfig:
    """Read the YAML file of a run; its `method:` picks the class.

    Raises:
        ConfigurationError: as :meth:`BaseConfig.from_yaml`, or `method:` is missing or unknown.
    """
    file = read_config_file(path, overrides or [])
    method = file.values.pop("method", None)
    if method is None:
        known = ", ".join(METHOD_CONFIGS)
        raise ConfigurationError(f"{path}: method: is missing; add a line `method: NAME`, one of {known}")
    try:
        found = _registry().known_method(method if isinstance(method, str) else repr(method))
    except ConfigurationError as error:
        raise ConfigurationError(file.locate(str(error))) from None
    return found.config.from_file(file)
