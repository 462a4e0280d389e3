"""What an output folder holds, whether a run may write into it, and what it goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from arabic_qwen.config import BaseConfig, load_config
from arabic_qwen.data.bad_rows import BAD_ROWS_FILE, is_first_process
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.files import existing, remove_folder, remove_unfinished, write_atomically
from arabic_qwen.models.safety import pickled_weights
from arabic_qwen.models.sources import RUN_CONFIG
from arabic_qwen.redaction import redact
from arabic_qwen.runs.checkpoints import MANIFEST, damage, find_checkpoints, read_progress
from arabic_qwen.runs.lock import check_free, locked
from arabic_qwen.runs.report import LOSS_CURVE, METRICS_FILE, SAMPLES_FILE

logger = logging.getLogger(__name__)

SUMMARY = "run_summary.json"  # written last: a folder that has it holds a finished run

# May differ when a run goes on: they do not change what is learned.
_HARMLESS = {
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "resume_changed",
    "report_to",
    "run_name",
    "logging_steps",
    "output_dir",
    "max_bad_rows",
    "eval_samples",
    "dialect_model",
    "token_budget",
    "gradient_checkpointing",
    "torch_compile",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
}

# Say what the checkpoint's weights and optimizer state are; may not even differ where the user says so.
_OF_THE_WEIGHTS = {
    "model_name",
    "use_lora",
    "lora_r",
    "lora_target_modules",
    "lora_bias",
    "use_dora",
    "init_lora_weights",
    "load_in_4bit",
    "load_in_8bit",
    "optim",
}


class Run(NamedTuple):
    """What an output folder holds of the run that is to be written there."""

    folder: Path
    finished: bool = False
    checkpoint: str | None = None  # to go on from
    in_the_way: bool = False  # it holds a run that must make room


def find_run(config: BaseConfig) -> Run:
    """What the output folder holds of a run with these settings, and what it goes on from; writes nothing.

    Raises:
        ConfigurationError: the folder holds an unfinished run with other settings, another process writes into it, or
            it cannot be written; the checkpoint that is asked for is none.
    """
    folder = Path(config.resolved_output_dir)
    _check_writable(folder)
    if config.overwrite_output_dir or not folder.is_dir():
        return Run(folder, checkpoint=_given_checkpoint(config))
    if is_first_process():
        check_free(folder)
    finished, begun = is_finished(folder), bool(find_checkpoints(folder))
    changed = _differences(folder, config)
    if finished and not changed:
        return Run(folder, finished)
    if finished or (begun and config.resume_from_checkpoint == "never"):
        if Path(config.model_name).absolute().is_relative_to(folder.absolute()):
            raise _other_settings(folder, changed or ["it is the model that is trained on"])
        return Run(folder, in_the_way=True, checkpoint=_given_checkpoint(config))
    if not begun:
        return Run(folder, checkpoint=_given_checkpoint(config))
    _check_changes(folder, changed, config)
    return Run(folder, checkpoint=_newest_checkpoint(folder, config))


def _check_changes(folder: Path, changed: list[str], config: BaseConfig) -> None:
    """Raise ConfigurationError unless training may go on from what is in the folder."""
    if config.resume_changed:
        changed = [text for text in changed if text.partition(":")[0] in _OF_THE_WEIGHTS]
    if changed:
        raise _other_settings(folder, changed, may_go_on=not config.resume_changed)


def _other_settings(folder: Path, changed: list[str], may_go_on: bool = False) -> ConfigurationError:
    remedy = "choose another output_dir, or set overwrite_output_dir to true to discard that run"
    if may_go_on:
        remedy = f"set resume_changed to true to go on with the new ones, {remedy}"
    return ConfigurationError(f"output_dir: {folder} holds a run with other settings ({'; '.join(changed)}); {remedy}")


def _given_checkpoint(config: BaseConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names.

    Raises:
        ConfigurationError: it is not there, damaged, of a run with other settings, or about to be discarded.
    """
    if config.resume_from_checkpoint in ("auto", "never"):
        return None
    checkpoint = Path(config.resume_from_checkpoint)
    if not checkpoint.is_dir():
        raise ConfigurationError(
            f"resume_from_checkpoint: {checkpoint} does not exist; give auto, never or a checkpoint-<step> folder"
        )
    if checkpoint.absolute().is_relative_to(Path(config.resolved_output_dir).absolute()):
        raise ConfigurationError(
            f"resume_from_checkpoint: {checkpoint} is in output_dir, which is to be emptied; choose another output_dir"
        )
    _check_not_pickled(checkpoint)
    if reason := damage(checkpoint):
        raise ConfigurationError(f"resume_from_checkpoint: {checkpoint}: {reason}; choose another checkpoint")
    read_progress(checkpoint)
    _check_changes(checkpoint, _differences(checkpoint, config), config)
    return str(checkpoint)


def _newest_checkpoint(folder: Path, config: BaseConfig) -> str | None:
    """The newest checkpoint of the folder that is whole.

    Raises:
        ConfigurationError: `resume_from_checkpoint` names an older one, or checkpoints are pickled.
    """
    for checkpoint in find_checkpoints(folder):
        _check_not_pickled(checkpoint)
        reason = damage(checkpoint) if is_first_process() else None  # the others are told by the first
        if reason:
            logger.warning("%s: %s, so it is passed over", checkpoint, reason)
            continue
        given = Path(config.resume_from_checkpoint)
        if given.absolute().parent == folder.absolute() and given.name != checkpoint.name:
            raise ConfigurationError(
                f"resume_from_checkpoint: {given} is not the newest of its run, which is {checkpoint.name}; "
                "set it to auto to go on from that, or choose another output_dir for a run that branches off"
            )
        return str(checkpoint)
    return None


def _check_not_pickled(checkpoint: Path) -> None:
    pickled = pickled_weights(checkpoint)
    if pickled and not (checkpoint / MANIFEST).is_file():  # so it is another program's
        raise ConfigurationError(
            f"{checkpoint}: holds pickled state ({pickled[0]}), which can run code when it is read and is not loaded; "
            "set resume_from_checkpoint to never to start again, or model_name to this folder and output_dir to "
            "another to train on from its weights"
        )


@contextlib.contextmanager
def begin_run(run: Run, config: BaseConfig, sums: Mapping[str, str]) -> Iterator[str | None]:
    """Make the output folder ready, lock it, record the configuration; of several processes the first does it.

    An earlier run is discarded with `overwrite_output_dir`; one that is in the way is set aside: its folder gets a number
    (`sft-1`).

    Args:
        run: what :func:`find_run` found.
        sums: the data's (:func:`data_sums`).

    Returns:
        A context; inside, the folder is locked. It gives the checkpoint to go on from, the same to all processes.

    Raises:
        ConfigurationError: the folder cannot be written, another run writes into it, or the data has changed.
    """
    PartialState().wait_for_everyone()  # others may be writing the reference's cache
    with contextlib.ExitStack() as stack:
        checkpoint = [run.checkpoint]
        if is_first_process():
            try:
                if run.in_the_way:
                    check_free(run.folder)  # another run may have begun since
                    _set_aside(run.folder)
                run.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(run.folder))
                if config.overwrite_output_dir:
                    _discard(run.folder)
                remove_unfinished(run.folder)
                if run.checkpoint and not config.resume_changed:
                    _check_data(Path(run.checkpoint), sums)
                config.model_copy(update={"output_dir": str(run.folder)}).to_yaml(run.folder / RUN_CONFIG)
            except OSError as error:
                raise _not_writable(run.folder, error.strerror) from None
        broadcast_object_list(checkpoint)
        yield checkpoint[0]


def data_sums(dataset: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each split's token ids and targets, in their order; of what is streamed, of its files' names and sizes."""
    sums = {}
    for name, split in dataset.items():
        if isinstance(split, GroupDataset):
            digest = hashlib.sha256()
            for group in split:
                digest.update(group.prompt.tobytes() + (b"+" if group.desirable else b"-"))
                for ids, targets, _ in group.completions:
                    digest.update(b"|" + ids.tobytes() + targets.tobytes())
            sums[name] = digest.hexdigest()
        elif isinstance(split, GroupStream):
            sums[name] = hashlib.sha256("\n".join(split.identity).encode()).hexdigest()
    return sums


def _check_data(checkpoint: Path, sums: Mapping[str, str]) -> None:
    before = read_progress(checkpoint)["data"]
    changed = sorted(name for name in sums.keys() & before.keys() if sums[name] != before[name])
    if changed:
        raise ConfigurationError(
            f"dataset_path: the {' and '.join(changed)} data is not what it was when {checkpoint} was written; put the "
            "old files back, set resume_changed to true to go on with the new ones, or choose another output_dir"
        )


def _check_writable(folder: Path) -> None:
    try:
        there = existing(folder)
    except OSError as error:  # a name that is too long
        raise _not_writable(folder, error.strerror) from None
    if not there.is_dir():
        raise _not_writable(folder, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _not_writable(folder, "no permission")


def _not_writable(folder: Path, reason: str | None) -> ConfigurationError:
    return ConfigurationError(f"output_dir: {folder} cannot be written ({reason}); choose another output_dir")


def _differences(folder: Path, config: BaseConfig) -> list[str]:
    """How the settings recorded in a folder differ, as `name: before → after`; without those that change nothing."""
    if not (folder / RUN_CONFIG).is_file():
        return []
    old = load_config(folder / RUN_CONFIG)
    before, after = ({"method": settings.method, **settings.model_dump()} for settings in (old, config))
    changed = (name for name in after if redact(repr(before.get(name))) != redact(repr(after[name])))
    names = [name for name in changed if name not in _HARMLESS]
    return [f"{name}: {before.get(name)!r} → {after[name]!r}" for name in names]


def _set_aside(folder: Path) -> None:
    """Rename the folder of a run, so that another run can take its name and nothing is lost."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-{n}").exists())
    aside = folder.rename(folder.with_name(f"{folder.name}-{number}"))
    logger.warning("%s held another run, which is in %s now", folder, aside)


def _discard(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for checkpoint in find_checkpoints(folder):
        remove_folder(checkpoint)
    for name in (SUMMARY, METRICS_FILE, SAMPLES_FILE, LOSS_CURVE, RUN_CONFIG, BAD_ROWS_FILE):
        (folder / name).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).is_file()


def finish_run(folder: Path, summary: dict[str, Any]) -> None:
    text = redact(json.dumps(summary, indent=2, ensure_ascii=False))
    write_atomically(folder / SUMMARY, text + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
