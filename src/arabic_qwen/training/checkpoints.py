"""What an output folder holds, and whether a run may write into it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer import TRAINER_STATE_NAME

from arabic_qwen.config import BaseConfig, load_config
from arabic_qwen.data.bad_rows import BAD_ROWS_FILE, is_first_process
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.sources import RUN_CONFIG
from arabic_qwen.redaction import redact
from arabic_qwen.training.report import LOSS_CURVE, METRICS_FILE
from arabic_qwen.training.samples import SAMPLES_FILE

logger = logging.getLogger(__name__)

SUMMARY = "run_summary.json"  # written last: a folder that has it holds a finished run

# May differ when a run goes on: they do not change what is learned.
_HARMLESS = {
    "overwrite_output_dir",
    "report_to",
    "run_name",
    "logging_steps",
    "output_dir",
    "max_bad_rows",
    "eval_samples",
    "dialect_model",
}


class Run(NamedTuple):
    """What an output folder holds of the run that is to be written there."""

    folder: Path
    finished: bool = False
    checkpoint: str | None = None  # to go on from
    in_the_way: bool = False  # it holds a finished run with other settings


def find_run(config: BaseConfig) -> Run:
    """What the output folder holds of a run with these settings; writes nothing.

    Raises:
        ConfigurationError: the folder holds an unfinished run with other settings, or cannot be written.
    """
    folder = Path(config.resolved_output_dir)
    _check_writable(folder)
    if config.overwrite_output_dir or not folder.is_dir():
        return Run(folder)
    finished, checkpoint = is_finished(folder), _newest_checkpoint(folder)
    record = folder / RUN_CONFIG
    changed, hint = [], ""
    if record.is_file():
        old = load_config(record)
        if not finished and "normalize" not in old.model_fields_set:
            old.normalize = False
            hint = " (it was begun by a version that did not normalise: go on with normalize=false)"
        changed = _differences(old, config)
    if not changed:
        return Run(folder, finished, checkpoint)
    if not finished and not checkpoint:
        return Run(folder)
    if not finished or Path(config.model_name).absolute().is_relative_to(folder.absolute()):
        raise ConfigurationError(
            f"output_dir: {folder} holds a run with other settings ({'; '.join(changed)}){hint}; "
            "choose another output_dir, or set overwrite_output_dir to true to discard that run"
        )
    return Run(folder, in_the_way=True)


def begin_run(run: Run, config: BaseConfig) -> None:
    """Make the output folder ready and record the configuration there; of several processes the first does it.

    An earlier run is discarded with `overwrite_output_dir`; a finished one with other settings is set aside: its folder
    gets a number (`sft-1`).

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    if not is_first_process():
        return
    try:
        if config.overwrite_output_dir:
            _discard(run.folder)
        elif run.in_the_way:
            _set_aside(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        config.model_copy(update={"output_dir": str(run.folder)}).to_yaml(run.folder / RUN_CONFIG)
    except OSError as error:
        raise _not_writable(run.folder, error.strerror) from None


def _check_writable(folder: Path) -> None:
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise _not_writable(folder, error.strerror) from None
    if not there.is_dir():
        raise _not_writable(folder, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _not_writable(folder, "no permission")


def _not_writable(folder: Path, reason: str | None) -> ConfigurationError:
    return ConfigurationError(f"output_dir: {folder} cannot be written ({reason}); choose another output_dir")


def _newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if (path / TRAINER_STATE_NAME).is_file():  # what transformers writes last
            return str(path)
        logger.warning("%s: was not written to its end; it is passed over", path)
    return None


def _differences(old: BaseConfig, new: BaseConfig) -> list[str]:
    """What was changed, as `name: before → after`; settings that do not change what is learned are left out."""
    before, after = ({"method": config.method, **config.model_dump()} for config in (old, new))
    changed = (name for name in after if redact(repr(before.get(name))) != redact(repr(after[name])))
    names = [name for name in changed if name not in _HARMLESS]
    return [f"{name}: {before.get(name)!r} → {after[name]!r}" for name in names]


def _set_aside(folder: Path) -> None:
    """Rename the folder of a finished run, so that another run can take its name and nothing is lost."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-{n}").exists())
    aside = folder.rename(folder.with_name(f"{folder.name}-{number}"))
    logger.warning("%s held a finished run with other settings, which is in %s now", folder, aside)


def _discard(folder: Path) -> None:
    """Remove what a run wrote, and nothing else; of links, the link."""
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.is_symlink():
            checkpoint.unlink()
        elif checkpoint.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(checkpoint)
    for name in (SUMMARY, METRICS_FILE, SAMPLES_FILE, LOSS_CURVE, RUN_CONFIG, BAD_ROWS_FILE):
        (folder / name).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).is_file()


def finish_run(folder: Path, summary: dict[str, Any]) -> None:
    text = redact(json.dumps(summary, indent=2, ensure_ascii=False))
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
