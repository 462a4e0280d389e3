"""Lets `from src.config import SFTConfig` work from a checkout; gives the same objects as `arabic_qwen`.

Never installed: the distribution packages only `arabic_qwen`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolves `src.X` to the module object of `arabic_qwen.X`."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.startswith("src.") else None

    def create_module(self, spec) -> ModuleType:
        module = importlib.import_module("arabic_qwen" + spec.name.removeprefix("src").removeprefix(".arabic_qwen"))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just overwritten the module's own spec with the alias's.
        module.__spec__ = module.__spec__.loader_state  # type: ignore[union-attr]


sys.path.insert(0, str(Path(__file__).parent))
sys.meta_path.insert(0, _Alias())
