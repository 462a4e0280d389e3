"""`arabic-qwen doctor`: what this machine can do, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models import precision

_GB = 1e9
_HUB_TIMEOUT = 3  # seconds

#: Parameters, in billions, of the Qwen2.5 sizes.
_SIZES = {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.62, "14B": 14.8, "32B": 32.8, "72B": 72.7}


class Finding(NamedTuple):
    """One thing that was looked at. `missing` limits what can be done; `impossible` leaves nothing to train with."""

    level: Literal["ok", "missing", "info", "impossible"]
    name: str
    text: str


def examine() -> list[Finding]:
    """Look at versions, devices, memory, disk, network and extras; the last finding says what can be trained here."""
    versions = _versions()
    impossible = any(finding.level == "impossible" for finding in versions)
    verdict = Finding("impossible", "training", "impossible until ✗ above are mended") if impossible else _verdict()
    return [*versions, *_devices(), _precision(), *_quantisation(), _attention(), *_room(), _hub(), *_extras(), verdict]


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires("arabic-qwen") or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # a checkout that is not installed


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    findings = [Finding("ok", "python", platform.python_version())]
    for requirement in _requirements():
        if requirement.marker:  # an extra's
            continue
        version = _installed(requirement.name)
        remedy = f"pip install '{requirement}'"
        if version is None:
            findings.append(Finding("impossible", requirement.name, f"not installed; {remedy}"))
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{version} is not supported (needs {requirement.specifier}); {remedy}"
            findings.append(Finding("missing", requirement.name, text))
        elif requirement.name in ("torch", "transformers", "peft"):
            findings.append(Finding("ok", requirement.name, version))
    return findings


def _devices() -> list[Finding]:
    if torch.cuda.is_available():
        findings = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            text = f"{torch.cuda.get_device_name(index)}, {free / _GB:.1f} of {total / _GB:.1f} GB free"
            findings.append(Finding("ok", f"gpu {index}", f"{text}, compute capability {major}.{minor}"))
        return findings
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = "computes in bfloat16" if precision.device_has_bf16() else "bfloat16 only emulated, which is slow"
    return [
        Finding("missing", "gpu", "none that torch can use; training runs on the processor, slowly"),
        Finding("info", "processor", f"{cores} cores, {bf16}"),
    ]


def _precision() -> Finding:
    dtype = str(_default_dtype()).removeprefix("torch.")
    return Finding("ok", "precision", f"with default settings training computes in {dtype}")


def _default_dtype() -> torch.dtype:
    logging.disable(logging.WARNING)  # what it falls back to is said here
    try:
        return precision.compute_dtype(SFTConfig())
    finally:
        logging.disable(logging.NOTSET)


def _quantisation() -> list[Finding]:
    findings = []
    for name, setting, value in (
        ("4 bit", "load_in_4bit", True),
        ("8 bit", "load_in_8bit", True),
        ("fp8", "base_precision", "fp8"),
    ):
        given: dict[str, Any] = {setting: value}
        config = SFTConfig(**given)
        try:
            precision.quantization(config)
            precision.check_fp8(config)
            findings.append(Finding("ok", name, f"possible ({setting})"))
        except ConfigurationError as error:
            reason = str(error).partition(": ")[2].partition("; ")[0]
            findings.append(Finding("missing", name, f"not possible: {reason}"))
    return findings


def _attention() -> Finding:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return Finding("ok", "attention", "packed flash attention, in bfloat16 and float16")
    return Finding("info", "attention", "PyTorch SDPA for each sequence (flash attention needs an Ampere or newer GPU)")


def _room() -> list[Finding]:
    memory = psutil.virtual_memory()
    findings = [Finding("ok", "memory", f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free")]
    for name, folder in (("disk here", Path.cwd()), ("disk of hub cache", Path(constants.HF_HUB_CACHE))):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        findings.append(Finding("ok" if free > 2 * _GB else "missing", name, f"{free / _GB:.1f} GB free ({folder})"))
    return findings


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return Finding("info", "model hub", "HF_HUB_OFFLINE is set: only models that are in the cache or in folders")
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT)
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = f"{constants.ENDPOINT} cannot be reached ({reason}); only models that are in the cache or in folders"
        return Finding("missing", "model hub", text)
    return Finding("ok", "model hub", f"{constants.ENDPOINT} can be reached")


def _extras() -> list[Finding]:
    findings = []
    for requirement in _requirements():
        extra = str(requirement.marker).partition('extra == "')[2].rstrip('"') if requirement.marker else ""
        if extra and extra != "test":
            version = _installed(requirement.name)
            text = version or f"not installed (optional); pip install 'arabic-qwen[{extra}]'"
            findings.append(Finding("ok" if version else "info", requirement.name, text))
    return findings


def _verdict() -> Finding:
    """By rules of thumb: bytes a parameter for weights, gradients and optimizer, and room for activations."""
    cuda = torch.cuda.is_available()
    if cuda:
        free, activations = max(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())), 4.0
    else:
        free, activations = psutil.virtual_memory().available, 2.0
    room = free / _GB - activations

    def largest(bytes_a_parameter: float) -> str:
        fitting = [name for name, billions in _SIZES.items() if billions * bytes_a_parameter <= room]
        return f"Qwen2.5-{fitting[-1]}" if fitting else "the tiny model that comes along only"

    text = f"LoRA up to {largest(_default_dtype().itemsize * 1.1)}, full training up to {largest(16)}"
    if cuda and _quantisation()[0].level == "ok":
        text += f", 4-bit LoRA up to {largest(0.75)}"
    if not cuda:
        text += "; on a processor anything above 0.5B takes very long"
    return Finding("ok", "training", f"{text} (by rule of thumb; `arabic-qwen train CONFIG --dry-run` measures)")
