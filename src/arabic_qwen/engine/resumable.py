"""transformers.Trainer with checkpoints that no kill can break, and from which a run goes on exactly."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback

from arabic_qwen.config import BaseConfig
from arabic_qwen.engine.callbacks import ProgressDisplay
from arabic_qwen.engine.workers import watched_workers
from arabic_qwen.files import UNFINISHED, check_space, writing
from arabic_qwen.memory.limit import told_memory
from arabic_qwen.models.loading import saved_bytes
from arabic_qwen.models.sources import RUN_CONFIG
from arabic_qwen.runs.checkpoints import (
    OPTIMIZER,
    PROGRESS,
    RANDOM,
    SCALER,
    SCHEDULER,
    damage,
    find_checkpoints,
    publish,
    read_progress,
    rotate,
    step_of,
)
from arabic_qwen.runs.signals import EvaluationStopped, StopOnSignal
from arabic_qwen.runs.state import load_state, save_state

logger = logging.getLogger(__name__)


class _Begin(TrainerCallback):
    """Lets a trainer act when training begins, before its other callbacks."""

    def __init__(self, begin: Callable[[], None]):
        self._begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()


class ResumableTrainer(Trainer):
    """Overrides how checkpoints are written and read; :meth:`progress`, :meth:`go_on` and :meth:`begin` are for subclasses.

    DeepSpeed and FSDP keep their engines' own files for optimizer and scheduler.

    Attributes:
        run_config: the run's settings, written into each checkpoint.
        data_sums: what the training data is told by (:func:`arabic_qwen.runs.run_folder.data_sums`).
        stop: whether a signal has asked to stop.
    """

    run_config: BaseConfig | None = None
    optimizer: Any
    lr_scheduler: Any
    data_sums: dict[str, str] | None = None
    stop: StopOnSignal | None = None

    def progress(self) -> dict[str, Any]:
        """What a subclass needs in order to go on, as JSON can hold it."""
        return {}

    def go_on(self, progress: dict[str, Any]) -> None:
        """Go on from what :meth:`progress` gave; {}: start."""

    def running(self) -> dict[str, Any]:
        """What this process has added up since the last log entry: numbers, tensors, and dicts of these."""
        return {"loss": self._tr_loss, "last_logged": self._globalstep_last_logged}

    def keep_running(self, sums: dict[str, Any]) -> None:
        """Go on from what :meth:`running` gave."""
        self._tr_loss.copy_(sums["loss"])
        self._globalstep_last_logged = sums["last_logged"]

    # ---------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; raises KeyboardInterrupt or SystemExit where a signal has stopped it."""
        self._saved_step = self._seen_step = -1
        self._due: dict[str, bool] | None = None  # an evaluation that a signal has put off
        self._over = False
        progress: dict[str, Any] = {}
        if resume_from_checkpoint:
            progress = read_progress(Path(resume_from_checkpoint))
            self._due, self._over, self._best_step = progress["due"], progress["over"], progress["best_step"]
        self._resumed_from = resume_from_checkpoint
        self.go_on(progress.get("trainer", {}))
        if self.is_deepspeed_enabled:
            _restrict_deepspeed()
        self.callback_handler.callbacks.insert(0, _Begin(self.begin))
        try:
            with told_memory(), watched_workers():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(_Begin)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressDisplay):  # an exception skips on_train_end
                    callback.close()
        if self.stop and self.stop.received:
            self.stop.leave()
        return result

    def begin(self) -> None:
        """Called once model, optimizer and schedule are ready: puts a checkpoint's state into them and the callbacks."""
        if self._resumed_from:
            self._restore_callbacks(Path(self._resumed_from))
            if not self._has_shards:
                self._restore_optimizer(Path(self._resumed_from))

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        self._finish_step(kwargs["trial"], kwargs["ignore_keys_for_eval"])
        # A checkpoint may be of a run's last step, or of the evaluation by which it stopped early.
        self.control.should_training_stop |= self._over or self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _finish_step(self, trial: Any, ignore_keys: Any = None) -> None:
        """Evaluate what a signal has put off at the checkpoint that training goes on from."""
        if not self._due:
            return
        due, self._due = self._due, None
        try:
            metrics = self._evaluate(trial, ignore_keys)
        except EvaluationStopped:
            self.control.should_training_stop = True
            return
        if self._determine_best_metric(metrics, trial) and due["save"]:
            self.state.best_model_checkpoint = self._resumed_from

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args: Any, **kwargs: Any) -> None:
        """Called at the end of each step, and again at the end of an epoch; a signal is followed here."""
        if self.stop is None:
            return super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        again = self._seen_step == self.state.global_step
        if again and self._saved_step == self.state.global_step and self.stop.received:
            return None  # the epoch was broken off
        self._seen_step = self.state.global_step
        due = {"save": self.control.should_save}
        if self.stop.received and self.control.should_evaluate:
            self.control.should_evaluate, self._due = False, due
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self._due = due
        # After an epoch's last step there may be something to evaluate and to save in the call that comes at once.
        if self.stop.received and (again or self._due or not float(self.state.epoch or 0).is_integer()):
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_training_stop = True
        return None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Dropout must not depend on whether an evaluation lay between two steps: data loaders draw a seed.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with told_memory(), watched_workers(), torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        if self.stop and self.stop.received:
            # Training would load the best checkpoint, and delete the last one where one is kept.
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        else:
            self._finish_step(trial)
        best = self.state.best_model_checkpoint
        if best and self.args.load_best_model_at_end and (reason := damage(Path(best))):
            logger.warning("%s: %s; the last model is kept, not the best", best, reason)
            self.state.best_model_checkpoint = None
        return super()._finalize_training(trial, *args)

    # ---------------------------------------------------------------- writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if step == self._saved_step:
            return
        run = Path(str(self.args.output_dir))
        checkpoint = run / f"checkpoint-{step}"
        unfinished = run / f"{UNFINISHED}{checkpoint.name}"
        self.store_flos()
        # One that a signal brought about is not among those that the best is chosen from.
        if self.state.best_global_step == step and self.control.should_save:
            self.state.best_model_checkpoint = str(checkpoint)
        with writing(checkpoint):
            needed = self._checkpoint_bytes(run)
        with writing(checkpoint, needed):
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
                remedy = "free some space there, choose another output_dir, or lower save_total_limit"
                check_space(checkpoint, needed, remedy)
                unfinished.mkdir()  # without parents: a folder that was removed or unmounted is not made again
            self.accelerator.wait_for_everyone()
            try:
                self._write_checkpoint(unfinished)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    publish(unfinished, checkpoint)
            except Exception:  # a full disk, or a data worker that was killed meanwhile
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                rotate(run, self.args.save_total_limit, {str(checkpoint), best or str(checkpoint)})
        self.accelerator.wait_for_everyone()
        self._saved_step = step

    def _checkpoint_bytes(self, run: Path) -> int:
        """Bytes that a checkpoint takes, about: as the last one did, or of weights and optimizer in memory."""
        last = find_checkpoints(run)[:1]
        if last:
            return sum(file.stat().st_size for file in last[0].rglob("*") if file.is_file())
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        sizes = (value.nbytes for value in moments if isinstance(value, torch.Tensor))
        return saved_bytes(self.model) + sum(sizes)

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        random_states = gather_object([self._random_state() | self.running()])
        if self._has_shards:
            self._save_optimizer_and_scheduler(str(folder))
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self._has_shards:
            save_state(self.optimizer.state_dict(), folder / OPTIMIZER)
            save_state(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        if self.accelerator.scaler is not None:
            save_state(self.accelerator.scaler.state_dict(), folder / SCALER)
        save_state(random_states, folder / RANDOM)
        callbacks: dict[str, list[dict[str, Any]]] = {}
        for callback in self._stateful_callbacks:
            callbacks.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = callbacks  # type: ignore[assignment]
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.run_config:
            self.run_config.to_yaml(folder / RUN_CONFIG)
        # Stopped early; a signal sets this only once the step is saved.
        over = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        best = self.state.best_model_checkpoint
        progress = {
            "over": over,
            "due": self._due,
            "best_step": step_of(Path(best)) if best else None,
            "data": self.data_sums or {},
            "trainer": self.progress(),
        }
        (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        Path(str(output_dir or self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)  # pickled

    @property
    def _has_shards(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def _stateful_callbacks(self) -> list[Any]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]

    def _random_state(self) -> dict[str, Any]:
        numpy: Any = np.random.get_state()
        name, key, *rest = numpy
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": (name, key.tolist(), *rest),
            "torch": torch.get_rng_state(),
        }
        if self.args.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.args.device)
        return state

    # ---------------------------------------------------------------- reading

    def _restore_callbacks(self, checkpoint: Path) -> None:
        """Counters go on (early stopping's patience); what the callbacks were made with is this run's."""
        states: Any = self.state.stateful_callbacks
        for callback in self._stateful_callbacks:
            if saved := states.get(type(callback).__name__):
                vars(callback).update(saved.pop(0)["attributes"])
        best = checkpoint.parent / f"checkpoint-{self._best_step}"
        if best.is_dir():  # where it is now: the folder may have been moved
            self.state.best_model_checkpoint = str(best)

    def _restore_optimizer(self, checkpoint: Path) -> None:
        decay = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(load_state(checkpoint / OPTIMIZER))
        scheduler = self.lr_scheduler
        rates = getattr(scheduler, "base_lrs", [])
        scheduler.load_state_dict(load_state(checkpoint / SCHEDULER))
        if isinstance(scheduler, LambdaLR):  # the settings are this run's, where it may change them
            scheduler.base_lrs = rates
            rules = zip(rates, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [rate * rule(scheduler.last_epoch) for rate, rule in rules]
            groups = zip(self.optimizer.param_groups, rates, scheduler._last_lr, decay, strict=True)
            for group, rate, now, weight_decay in groups:
                group.update(initial_lr=rate, lr=now, weight_decay=weight_decay)
        if self.accelerator.scaler is not None and Path(checkpoint, f"{SCALER}.json").is_file():
            self.accelerator.scaler.load_state_dict(load_state(checkpoint / SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_state(Path(checkpoint, RANDOM))
        if len(states) != self.args.world_size:
            logger.warning(
                "%s: was written by %d processes, this run has %d; dropout and batches differ from what they would have been",
                checkpoint,
                len(states),
                self.args.world_size,
            )
            return
        state = states[self.args.process_index]
        self._set_random_state(state)
        self.keep_running(state)

    def _set_random_state(self, state: dict[str, Any]) -> None:
        """Go on from what `_random_state` gave."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.args.device)


def _restrict_deepspeed() -> None:
    """Of DeepSpeed's pickled shards read tensors and these records of its own, and nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks for all objects
