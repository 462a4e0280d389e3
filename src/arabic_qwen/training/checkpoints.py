"""What an output folder holds, and whether a run may write into it."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from arabic_qwen.config import BaseConfig, load_config
from arabic_qwen.data.bad_rows import BAD_ROWS_FILE, is_first_process
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.loading import RUN_CONFIG
from arabic_qwen.training.report import LOSS_CURVE, METRICS_FILE

logger = logging.getLogger(__name__)

SUMMARY = "run_summary.json"  # written last: a folder that has it holds a finished run

# May differ when a run goes on: they do not change what is learned.
_HARMLESS = {"overwrite_output_dir", "report_to", "run_name", "logging_steps", "output_dir", "max_bad_rows"}


def open_run(config: BaseConfig) -> Path:
    """Make the output folder ready for `config` and record it there.

    An earlier run with the same settings stays, to be continued or found finished. A finished run with other settings
    is set aside: its folder gets a number (`sft-1`). Of several processes only the first
    writes; the others can rely on it once the process group is up.

    Raises:
        ConfigurationError: the folder holds an unfinished run with other settings, or cannot be written.
    """
    folder = Path(config.resolved_output_dir)
    if not is_first_process():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite_output_dir:
            _discard(folder)
        record = folder / RUN_CONFIG
        if not is_finished(folder) and not last_checkpoint(folder):
            (folder / BAD_ROWS_FILE).unlink(missing_ok=True)  # of a run that was refused
        elif record.is_file():
            changed = _differences(load_config(record), config)
            if changed and (
                not is_finished(folder) or Path(config.model_name).absolute().is_relative_to(folder.absolute())
            ):
                raise ConfigurationError(
                    f"output_dir: {folder} holds a run with other settings ({'; '.join(changed)}); "
                    "choose another output_dir, or set overwrite_output_dir to true to discard that run"
                )
            if changed:
                _set_aside(folder)
        config.model_copy(update={"output_dir": str(folder)}).to_yaml(record)
    except OSError as error:
        raise ConfigurationError(f"output_dir: {folder} cannot be written ({error.strerror}); choose another") from None
    return folder


def _differences(old: BaseConfig, new: BaseConfig) -> list[str]:
    """What was changed, as `name: before → after`; settings that do not change what is learned are left out."""
    before, after = ({"method": config.method, **config.model_dump()} for config in (old, new))
    names = [name for name in after if before.get(name) != after[name] and name not in _HARMLESS]
    return [f"{name}: {before.get(name)!r} → {after[name]!r}" for name in names]


def _set_aside(folder: Path) -> None:
    """Rename the folder of a finished run, so that another run can take its name and nothing is lost."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-{n}").exists())
    aside = folder.rename(folder.with_name(f"{folder.name}-{number}"))
    folder.mkdir()
    logger.warning("%s held a finished run with other settings, which is in %s now", folder, aside)


def _discard(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in (SUMMARY, METRICS_FILE, LOSS_CURVE, RUN_CONFIG, BAD_ROWS_FILE):
        (folder / name).unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder))


def is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).is_file()


def finish_run(folder: Path, summary: dict[str, Any]) -> None:
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
