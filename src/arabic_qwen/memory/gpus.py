"""The devices that `arabic-qwen plan` knows: GPUs by name, and this machine."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import psutil
import torch

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.memory.fit import USABLE

_CONTEXT = 0.5e9  # bytes that CUDA takes for itself
_GIGABYTE = 0.985e9  # bytes of a GPU that is sold with one more GB, at least: with error correction


class Gpu(NamedTuple):
    """What a GPU has, by its data sheet. Or a processor."""

    memory: float  # bytes
    peak: float  # dense bfloat16 operations a second, summed in float32; 0: not known
    bandwidth: float  # bytes a second
    capability: tuple[int, int]  # CUDA's compute capability; (0, 0): a processor

    @property
    def is_gpu(self) -> bool:
        return self.capability > (0, 0)

    @property
    def limit(self) -> float:
        """Bytes that a run may take."""
        return USABLE * (self.memory - _CONTEXT) if self.is_gpu else self.memory


GPUS = {
    "RTX 3060": Gpu(12.6e9, 25e12, 0.36e12, (8, 6)),
    "RTX 3090": Gpu(25.3e9, 71e12, 0.936e12, (8, 6)),
    "RTX 4090": Gpu(25.3e9, 165e12, 1.008e12, (8, 9)),
    "L4": Gpu(23.7e9, 121e12, 0.3e12, (8, 9)),
    "A10": Gpu(23.7e9, 125e12, 0.6e12, (8, 6)),
    "L40S": Gpu(47.7e9, 362e12, 0.864e12, (8, 9)),
    "A100 40GB": Gpu(42.3e9, 312e12, 1.555e12, (8, 0)),
    "A100 80GB": Gpu(85.1e9, 312e12, 2.039e12, (8, 0)),
    "H100 80GB": Gpu(85.0e9, 989e12, 3.35e12, (9, 0)),
    "H200": Gpu(150.1e9, 989e12, 4.8e12, (9, 0)),
}
SHOWN = ("RTX 3060", "RTX 4090", "A100 80GB", "H100 80GB")

# Words that drivers add to the names of the GPUs above. Any other word, as PCIe, Ti or Laptop, makes it another GPU.
_ADDED = re.compile(r"nvidia|geforce|sxm\d|hbm\w+")


def known(name: str) -> tuple[str, Gpu]:
    """The GPU of :data:`GPUS` that has all words of `name`; or any, by its memory, as "16GB", taken as Ampere.

    Raises:
        ConfigurationError: there is none.
    """
    if size := re.fullmatch(r"([1-9]\d*) ?gb", name.lower()):
        return f"{size[1]} GB", Gpu(int(size[1]) * _GIGABYTE, 0.0, 0.0, (8, 0))
    found = [key for key in GPUS if key.lower().replace(" ", "") == name.lower().replace(" ", "")]
    found = found or [key for key in GPUS if _words(name) and _words(name) <= _words(key)]
    if not found:
        close = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(GPUS)}"
        hint += "; of others give the memory, as 16GB"
        raise ConfigurationError(f"--gpu: {name!r} is unknown; {hint}")
    return found[-1], GPUS[found[-1]]


def gpu_named(name: str) -> Gpu | None:
    """The GPU that a driver calls so, as "NVIDIA H100 80GB HBM3"; None: it is not in the table."""
    found = [key for words in (_words, _without_size) for key in GPUS if words(key) == words(name)]
    return GPUS[found[0]] if found else None


def _words(name: str) -> set[str]:
    return {word for word in re.split("[ -]+", name.lower()) if word and not _ADDED.fullmatch(word)}


def _without_size(name: str) -> set[str]:
    return {word for word in _words(name) if not word.endswith("gb")}


def this_device() -> tuple[str, Gpu]:
    """This machine's name and what it has, of memory what is free; one that is not in the table has no known speed."""
    if not torch.cuda.is_available():
        return "this processor", Gpu(psutil.virtual_memory().available, 0.0, 0.0, (0, 0))
    name, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]  # less what CUDA has taken by now
    gpu = gpu_named(name) or Gpu(0.0, 0.0, 0.0, (0, 0))
    capability = torch.cuda.get_device_capability()
    return f"this {name.removeprefix('NVIDIA ')}", gpu._replace(memory=free + _CONTEXT, capability=capability)
