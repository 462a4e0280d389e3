"""What a run shows while it goes on, and what it leaves behind: progress, metrics.jsonl, loss curve."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import EarlyStoppingCallback, TrainerCallback

from arabic_qwen.config import BaseConfig
from arabic_qwen.training.arguments import Schedule
from arabic_qwen.training.report import METRICS_FILE, draw_loss_curve, read_entries
from arabic_qwen.training.samples import SAMPLES_FILE

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


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM the running step is finished and saved, then training stops; a second one stops at once.

    Attributes:
        received: the signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.received = signal.Signals(number)
        self.close()
        print("stopping after this step, which is saved; once more to stop at once", file=sys.stderr)

    def close(self) -> None:
        """Give signals back to who had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all processes stop at the same step
            received = torch.tensor(int(self.received or 0), device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(received)) if received else None
        if self.received:
            control.should_save = control.should_training_stop = True
            # At its end training would load the best checkpoint, and delete this one where one is kept.
            args.load_best_model_at_end, args.save_total_limit = False, None

    def on_train_end(self, args, state, control, **kwargs):
        self.close()


class RunLog(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` and draws `loss_curve.png` at the end of training."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, SAMPLES_FILE):  # after a resume, entries of the steps that are done again go
                path = Path(args.output_dir, name)
                kept = [entry for entry in read_entries(path) if 0 < entry["step"] <= state.global_step]
                lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept]
                path.write_text("".join(lines), encoding="utf-8") if kept else path.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with Path(args.output_dir, METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **logs}) + "\n")

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
