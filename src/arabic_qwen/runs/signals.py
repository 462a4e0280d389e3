"""What a run does when it is asked to stop: Ctrl-C, SIGTERM, and SIGUSR1, by which SLURM says that time is up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback

#: Which signals stop a run after its running step; those that the system has.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class EvaluationStopped(Exception):
    """A signal came before or during an evaluation, which is not waited for."""


class StopOnSignal(TrainerCallback):
    """Takes the signals while it is entered: the first is noted, a second one stops the process at once.

    Attributes:
        received: the signal, once there was one; of several processes all learn of it when they end the same step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noted: signal.Signals | None = None  # by this process
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self._before: dict[int, Any] = {}
        self._training = False

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        """Give signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number)
        if self._alone:
            self.received = self._noted
        self.__exit__()
        print("stopping after this step, which is saved; once more to stop at once", file=sys.stderr)

    def leave(self) -> NoReturn:
        """End the run as the signal asks for.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was another: 143.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self._alone:
            received = torch.tensor(int(self._noted or 0), device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(received)) if received else None

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.received and self._alone:  # several processes have to come to an evaluation's end together
            if not self._training:  # the run's last evaluation
                self.leave()
            raise EvaluationStopped
