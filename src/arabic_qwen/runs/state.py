"""State of optimizers, schedulers and random number generators as JSON, its tensors as safetensors: no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_state(state: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of numbers, texts, None and tensors as `path`.json and `path`.safetensors.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(state, "", tensors))
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))


def load_state(path: Path) -> Any:
    """What :func:`save_state` wrote, tensors on the processor."""
    tensors = path.with_suffix(".safetensors")
    return _decode(
        json.loads(path.with_suffix(".json").read_text(encoding="utf-8")),
        load_file(tensors) if tensors.is_file() else {},
    )


# JSON has neither tuples nor keys that are no text: {"tuple": […]}, {"dict": [[key, value], …]}, {"tensor": name}.


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_encode(part, f"{name}/{number}", tensors) for number, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    return value


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_decode(part, tensors) for part in inner)
    return {key: _decode(part, tensors) for key, part in inner}
