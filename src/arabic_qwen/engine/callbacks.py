"""What a run shows while it goes on, and what it leaves behind: progress, metrics.jsonl, loss curve."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import EarlyStoppingCallback, TrainerCallback

from arabic_qwen.config import BaseConfig
from arabic_qwen.engine.arguments import Schedule
from arabic_qwen.files import append, write_atomically
from arabic_qwen.runs.report import METRICS_FILE, SAMPLES_FILE, draw_loss_curve, read_entries

logger = logging.getLogger(__name__)


class ProgressDisplay(TrainerCallback):
    """A bar with live loss and time left on a terminal, one line a log entry elsewhere; on rank 0 only."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.losses: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("Training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        new = {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
        again = all(self.losses.get(name) == value for name, value in new.items())
        self.losses |= new
        text = " · ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        if self.bar:
            self.bar.update(self.task, description=f"Training · {text}")
        elif state.is_world_process_zero and not again:
            steps = state.global_step - getattr(self, "first_step", state.global_step)
            left = ""
            if steps:
                seconds = (time.monotonic() - self.started) / steps * (state.max_steps - state.global_step)
                left = f" · {int(seconds // 60)}:{int(seconds % 60):02} left"
            self.console.print(f"step {state.global_step}/{state.max_steps} · {text}{left}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Take the bar away and show the cursor again."""
        if self.bar:
            self.bar.stop()
            self.bar = None


class RunLog(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` and draws `loss_curve.png` at the end of training."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, SAMPLES_FILE):  # after a resume, entries of the steps that are done again go
                path = Path(args.output_dir, name)
                kept = [entry for entry in read_entries(path) if 0 < entry["step"] <= state.global_step]
                lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept]
                write_atomically(path, "".join(lines)) if kept else path.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            entry = json.dumps({"step": state.global_step, "epoch": state.epoch, **logs})
            append(Path(args.output_dir, METRICS_FILE), entry + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_loss_curve(Path(args.output_dir))


def run_callbacks(config: BaseConfig, schedule: Schedule) -> list[TrainerCallback]:
    """Progress, metrics file and loss curve, early stopping where it can work, then `config.callbacks`."""
    own: list[TrainerCallback] = [ProgressDisplay(), RunLog()]
    given = list(config.callbacks)
    stoppers = [callback for callback in given if isinstance(callback, EarlyStoppingCallback)]
    if schedule.evaluation == "no" or not schedule.keep_best:
        if stoppers:
            logger.warning("Resolved: no early stopping, which needs evaluation and load_best_model_at_end")
        given = [callback for callback in given if callback not in stoppers]
    elif not stoppers and config.early_stopping_patience is not None:
        own.append(EarlyStoppingCallback(config.early_stopping_patience, config.early_stopping_threshold))
    return own + given
