"""The reference's log-probabilities, computed once before training and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from arabic_qwen.files import write_atomically, writing
from arabic_qwen.memory.limit import within_memory
from arabic_qwen.models.reference import OtherModel, Reference
from arabic_qwen.models.scoring import score_completions
from arabic_qwen.packing.group import Group

logger = logging.getLogger(__name__)

_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "use_cache"}
_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora")  # of adapters, beside their weights


@torch.no_grad()
def precompute(
    splits: Sequence[Sequence[Group]], model: Any, reference: Reference, cache_dir: Path, token_budget: int
) -> list[list[Group]]:
    """The groups with the reference's log-probabilities, from `cache_dir` where the same were computed before.

    The cache's names are hashes of the reference's weights and configuration and of all token ids, so that another model,
    other data or another template give another one.
    """
    with reference(model) as frozen:
        weights = _fingerprint(frozen, "default" if frozen is model else None)
        found = [_reference_logps(groups, frozen, weights, cache_dir, token_budget) for groups in splits]
    if isinstance(reference, OtherModel):
        reference.release()
    return [
        [group._replace(reference=tuple(logps)) for group, logps in zip(groups, values, strict=True)]
        for groups, values in zip(splits, found, strict=True)
    ]


def _reference_logps(
    groups: Sequence[Group], frozen: Any, weights: hashlib._Hash, cache_dir: Path, token_budget: int
) -> list[list[np.ndarray]]:
    """Each group's log-probabilities of its scored completions' targets; every process computes its share."""
    path = cache_dir / f"reference-{_key(weights, groups)}.safetensors"
    logps = _cached(path)
    if all(gather_object([logps is not None])):  # not all processes may see the same folder
        logger.info("reference log-probabilities: %s", path)
    else:
        state = PartialState()
        own = range(state.process_index, len(groups), state.num_processes)
        found = _compute([groups[i] for i in own], frozen, token_budget)
        everyone = dict(gather_object(list(zip(own, found, strict=True))))
        logps = torch.cat([torch.empty(0), *(everyone[i] for i in range(len(groups)))])
        with writing(path):
            cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"logps": logps}, {"sha256": _sha256(logps)}))  # each process writes the same
    assert logps is not None
    lengths = [int(completion.targets.sum()) for group in groups for completion in group.scored()]
    parts = iter(logps.split(lengths))
    return [[next(parts).numpy() for _ in group.scored()] for group in groups]


def _cached(path: Path) -> torch.Tensor | None:
    """What an earlier run has kept; None where that is nothing, or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            logps, kept = file.get_tensor("logps"), file.metadata() or {}
        if kept.get("sha256") == _sha256(logps):
            return logps
    except (SafetensorError, OSError):
        pass
    logger.warning("%s: is damaged; it is computed again", path)
    return None


def _sha256(logps: torch.Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def _compute(groups: Sequence[Group], frozen: Any, token_budget: int) -> list[torch.Tensor]:
    """Of each group, the log-probabilities of the targets of all its scored completions, one after the other."""
    found: list[torch.Tensor] = []
    chunk = 64  # groups a progress step
    starts = range(0, len(groups), chunk)
    for start in track(starts, "Reference", disable=not sys.stderr.isatty(), transient=True):
        some = groups[start : start + chunk]
        pairs = [(group.prompt.tolist(), [c.ids.tolist() for c in group.scored()]) for group in some]

        def score(budget: int, pairs: Any = pairs) -> list[list[torch.Tensor]]:
            return score_completions(frozen, pairs, token_budget=budget)

        scored, token_budget = within_memory(score, token_budget, some)
        for group, scores in zip(some, scored, strict=True):
            targets = [torch.from_numpy(completion.targets) for completion in group.scored()]
            found.append(torch.cat([logps.cpu()[mask] for logps, mask in zip(scores, targets, strict=True)]))
    return found


def _fingerprint(frozen: Any, trained: str | None) -> hashlib._Hash:
    """Hash of weights and configuration; `trained` names the adapters that are not the reference's."""
    config = {name: value for name, value in frozen.config.to_dict().items() if name not in _NOT_THE_MODEL}
    adapters = {n: c.to_dict() for n, c in getattr(frozen, "peft_config", {}).items() if n != trained}
    computed = [{name: adapter.get(name) for name in _SCALES} for adapter in adapters.values()]
    digest = hashlib.sha256(json.dumps([config, computed], sort_keys=True, default=str).encode())
    for name, weight in frozen.state_dict().items():
        if isinstance(weight, torch.Tensor) and (trained is None or f".{trained}." not in name):
            digest.update(f"{name} {weight.dtype} {torch.is_autocast_enabled(weight.device.type)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest


def _key(weights: hashlib._Hash, groups: Sequence[Group]) -> str:
    digest = weights.copy()
    digest.update(b"of each target")  # earlier versions kept sums
    for group in groups:
        digest.update(group.prompt.tobytes())
        for completion in group.scored():
            digest.update(b"|" + completion.ids.tobytes() + completion.targets.tobytes())
    return digest.hexdigest()[:16]
