"""What a step may not do to a run: numbers that are not finite stay out of the weights, and spikes of the loss are told.

Whether an update is good is found on the device, and the update is left out there. The processor reads of it one step
later, so that no step waits for the device, and before anything is logged, measured or saved.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal, NoReturn

import torch
from accelerate.utils import gather_object

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.locations import RowLocations, name_rows
from arabic_qwen.engine.resumable import ResumableTrainer
from arabic_qwen.errors import TrainingError
from arabic_qwen.runs.signals import StopOnSignal

logger = logging.getLogger(__name__)

_WINDOW = 50  # losses that the level is taken from
_FEWEST = 20  # without which there is no level
_DEVIATIONS = 6  # above the mean: a spike
_LEAST = 0.01  # a deviation, of the mean, or of 1 where that is less: a level may be constant, and may be 0


@dataclasses.dataclass
class _Judged:
    """A step whose flags are on their way from the device."""

    step: int
    rows: list[list[int]]  # of each micro-batch
    before: dict[str, Any] | None  # the run at the end of the step before
    values: torch.Tensor  # [5 + 2 × micro-batches]
    ready: torch.cuda.Event | None  # after which the values are there


class GuardedTrainer(ResumableTrainer):
    """A subclass calls :meth:`observe` in each step. DeepSpeed has checks of its own.

    Attributes:
        loss_spikes: "log": a step whose loss is far above those before it is only told; "skip": its update is left out.
    """

    loss_spikes: Literal["log", "skip"] = "log"
    _places: RowLocations | None = None
    _judged: deque[_Judged]
    _before: dict[str, Any] | None
    _failed: torch.Tensor  # [] bool; from then on no update is made
    _recent: torch.Tensor  # [_WINDOW] losses, the newest first
    _known: int  # how many of them
    _observed: tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As :class:`ResumableTrainer`'s.

        Raises:
            TrainingError: loss or gradient were not finite; a checkpoint from before that step is there.
        """
        self._judged, self._before = deque(), None
        self._failed = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._recent, self._known = torch.zeros(_WINDOW, device=self.args.device), 0
        return super().train(*args, **kwargs)

    def running(self) -> dict[str, Any]:
        return super().running() | {"recent": self._recent, "known": self._known}

    def keep_running(self, sums: dict[str, Any]) -> None:
        super().keep_running(sums)
        if "recent" in sums:  # not in checkpoints of earlier versions
            self._recent, self._known = sums["recent"].to(self.args.device), sums["known"]

    def observe(self, loss: torch.Tensor, parts: list[torch.Tensor], rows: list[list[int]]) -> None:
        """Note a step before its update.

        Args:
            loss: scalar, this rank's part × ranks.
            parts: of each micro-batch two scalars: its log-probabilities and its part of the loss, summed.
            rows: of each micro-batch.
        """
        self._observed = loss, parts, rows

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called between clipping and the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.is_deepspeed_enabled:
            self._judge(model, grad_norm)
        return grad_norm

    @torch.no_grad()
    def _judge(self, model: Any, grad_norm: torch.Tensor) -> None:
        """Leave the update out where it must not be made."""
        loss, parts, rows = self._observed
        failed = ~torch.isfinite(loss)
        if self.accelerator.scaler is None:  # which lets gradients overflow now and then, and skips those updates
            failed = failed | ~torch.isfinite(grad_norm)
        if self.args.world_size > 1:
            failures, total = self.accelerator.reduce(torch.stack([failed.float(), loss]), "sum")
            failed, loss = failures > 0, total / self.args.world_size
        level = self._recent[: self._known]
        limit = torch.full_like(loss, math.inf)
        if self._known >= _FEWEST:
            mean = level.mean()
            limit = mean + _DEVIATIONS * torch.maximum(level.std(), _LEAST * mean.abs().clamp(min=1))
        spike = loss > limit
        # A spike's too: with two of them in the window, a level that has risen for good is none any more.
        self._recent = torch.cat([loss[None], self._recent[:-1]])
        self._known = min(self._known + 1, _WINDOW)
        self._failed = self._failed | failed
        skipped = self._failed | spike if self.loss_spikes == "skip" else self._failed
        values = torch.stack([x.float() for x in (failed, spike, loss, limit, grad_norm, *parts)])
        ready = torch.cuda.Event() if loss.is_cuda else None
        values = values.to("cpu", non_blocking=True)  # page-locked
        if ready:
            ready.record()
        self._judged.append(_Judged(self.state.global_step + 1, rows, self._before, values, ready))
        if self._optimizer_can_skip:
            self.optimizer.optimizer.found_inf = skipped.float()  # the one that accelerate wraps
        else:  # the others are waited for
            self._read_judged(0)
            if skipped:
                model.zero_grad()  # optimizers pass over what has no gradient

    @property
    def _optimizer_can_skip(self) -> bool:
        """Whether its kernels take a flag, as torch's fused ones do for gradient scaling, which sets it itself."""
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        return fused and self.accelerator.scaler is None and not self.is_fsdp_enabled

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        now = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        self._read_judged(0 if now or (self.stop and self.stop.received) else 1)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not self.is_deepspeed_enabled:
            self._before = self._run_state()

    def _save_checkpoint(self, *args: Any) -> None:
        self._read_judged(0)  # a signal may have come since
        super()._save_checkpoint(*args)

    def _finalize_training(self, *args: Any) -> Any:
        self._read_judged(0)
        return super()._finalize_training(*args)

    def _read_judged(self, unread: int) -> None:
        """Follow what was found in all steps but the last `unread`; the same on every rank."""
        while len(self._judged) > unread:
            judged = self._judged.popleft()
            if judged.ready:
                judged.ready.synchronize()
            failed, spike, loss, limit, grad_norm, *parts = judged.values.tolist()
            if failed:
                self._stop_before(judged, loss, grad_norm, parts)
            elif spike:
                done = "its update is left out; " if self.loss_spikes == "skip" else ""
                rows = self._name_rows(row for rows in judged.rows for row in rows)
                if self.is_world_process_zero():
                    logger.warning(
                        "step %d: the loss is %.4g, far above the steps before it (at most %.4g is usual); %sit is of %s",
                        judged.step,
                        loss,
                        limit,
                        done,
                        rows,
                    )

    def _name_rows(self, rows: Iterable[int]) -> str:
        """Of all ranks."""
        own = list(rows)
        return "; ".join(gather_object([name_rows(self._places, own)] if own else [])) or name_rows(None, [])

    def _stop_before(self, judged: _Judged, loss: float, grad_norm: float, parts: list[float]) -> NoReturn:
        """End the run as it was before a step.

        Raises:
            TrainingError: names the step's rows.
        """
        checks = list(zip(parts[::2], parts[1::2], strict=True))
        what = f"loss is {loss}"
        # Where one micro-batch has made all others so, as KTO's z and whole-step losses do, its own numbers tell.
        culprits = [not math.isfinite(logps) for logps, _ in checks]
        if not any(culprits):
            culprits = [not math.isfinite(part) for _, part in checks]
        if not any(culprits) and math.isfinite(loss):
            what, culprits = f"gradient's norm is {grad_norm}", [True] * len(checks)
        rows = self._name_rows(row for bad, rows in zip(culprits, judged.rows, strict=True) if bad for row in rows)
        self._judged.clear()
        saved = self._return_to(judged.before)
        raise TrainingError(
            f"step {judged.step}: the {what}, in {rows}; the weights are as they were before it{saved}. If the loss had "
            f"grown before, begin anew with a learning_rate below {self.args.learning_rate:g} and "
            "resume_from_checkpoint=never; else correct these rows, or set torch_dtype to float32, and go on with "
            "resume_changed=true"
        )

    def _run_state(self) -> dict[str, Any]:
        """What a checkpoint of now would hold, beside weights and optimizer; small."""
        return {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "progress": self.progress(),
            "running": self.running() | {"loss": self._tr_loss.clone()},  # Trainer adds to it in place
            "random": self._random_state(),
            "scheduler": self.lr_scheduler.state_dict(),
        }

    def _return_to(self, before: dict[str, Any] | None) -> str:
        """Save the run as it was at the end of an earlier step since which no update was made; says where."""
        if before is None:  # no step is done since the run has begun, or has gone on from a checkpoint
            return f", in {self._resumed_from}" if self._resumed_from else ""
        self.state.global_step, self.state.epoch = before["step"], before["epoch"]
        self.go_on(before["progress"])
        self.keep_running(before["running"])
        self._set_random_state(before["random"])
        self.lr_scheduler.load_state_dict(before["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.control.should_training_stop = self.control.should_save = False
        self._due = None  # it was of the step that is taken back
        self._save_checkpoint(self.model, None)
        return f", in {self.args.output_dir}/checkpoint-{before['step']}"


class WaitingTrainer(ResumableTrainer):
    """Looks at the gradient of each step before its update: for trainers that do not :meth:`~GuardedTrainer.observe`."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None or self.is_deepspeed_enabled  # which skip such updates themselves
        if not scaled and not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient's norm is {float(grad_norm)}; this update is not made, and "
                "the run goes on from its last checkpoint. Correct the data, lower learning_rate, or set torch_dtype to "
                "float32, and go on with resume_changed=true"
            )
        return grad_norm


def make_resumable(trainer: Any, config: BaseConfig, sums: dict[str, str], stop: StopOnSignal) -> None:
    """Give a trainer what :class:`ResumableTrainer` needs; one of another class is guarded by waiting."""
    if not isinstance(trainer, ResumableTrainer):
        trainer.__class__ = type(type(trainer).__name__, (WaitingTrainer, type(trainer)), {})
    trainer.run_config, trainer.data_sums, trainer.stop = config, sums, stop
    trainer.add_callback(stop)
