"""Checkpoint folders: written whole or not at all, told from damaged ones by their manifest, rotated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.files import remove_folder, sync_files, sync_folder, write_atomically
from arabic_qwen.models.safety import PICKLED

#: Files of a checkpoint, beside the weights and transformers' trainer_state.json.
PROGRESS = "progress.json"  # what remains of the step, the data's sums, and what the trainer adds
OPTIMIZER, SCHEDULER, SCALER, RANDOM = "optimizer", "scheduler", "scaler", "random"  # .json, .safetensors
MANIFEST = "manifest.json"  # of a checkpoint, written last: the SHA-256 of every other file

_NAME = re.compile(r"checkpoint-(\d+)")
# What DeepSpeed and FSDP write themselves; only tensors and DeepSpeed's own records are read from it.
_SHARDS = re.compile(r"global_step\d+/[^/]+\.pt|(optimizer|pytorch_model_fsdp)\w*\.bin")


def find_checkpoints(run: Path) -> list[Path]:
    """Folders that are named as checkpoints are, the newest first; whether they are whole, :func:`damage` says."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and not path.is_symlink()]
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(unfinished: Path, checkpoint: Path) -> None:
    """Give a checkpoint that is written its manifest and then its name; one that had the name before is removed."""
    sums = {str(file.relative_to(unfinished).as_posix()): _sha256(file) for file in sync_files(unfinished)}
    write_atomically(unfinished / MANIFEST, json.dumps({"sha256": sums}, indent=1))
    if checkpoint.exists():  # damaged, or resume had not passed over it
        remove_folder(checkpoint)
    unfinished.rename(checkpoint)
    sync_folder(checkpoint.parent)


def damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is missing or not as it was written; None: it is whole."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, sha256 in sums.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _sha256(checkpoint / name) != sha256:
                return f"{name} is damaged"
        for file in checkpoint.rglob("*"):  # Trainer would rather load such weights than safetensors
            name = file.relative_to(checkpoint).as_posix()
            if file.suffix in PICKLED and not (name in sums and _SHARDS.fullmatch(name)):
                return f"{name} is pickled, and none of ours"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint notes of its run.

    Raises:
        ConfigurationError: the file is not one of ours.
    """
    with contextlib.suppress(OSError, ValueError):
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        if isinstance(progress, dict) and {"over", "due", "best_step", "data", "trainer"} <= progress.keys():
            return progress
    raise ConfigurationError(
        f"{checkpoint}: its {PROGRESS} is not as this program writes it; set resume_from_checkpoint to another checkpoint "
        "or to never"
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def rotate(run: Path, limit: int | None, keep: set[str]) -> None:
    """Remove the oldest checkpoints until there are `limit`; never the newest nor those in `keep`."""
    checkpoints = find_checkpoints(run)
    kept = {os.path.abspath(path) for path in [*keep, *map(str, checkpoints[:1])]}
    surplus = len(checkpoints) - max(limit, 1) if limit else 0
    for checkpoint in reversed(checkpoints):
        if surplus > 0 and os.path.abspath(checkpoint) not in kept:
            remove_folder(checkpoint)
            surplus -= 1
