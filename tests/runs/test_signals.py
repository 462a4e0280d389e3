"""Runs that are asked to stop: during a step, an evaluation, a save; and what then goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from arabic_qwen.runs import checkpoints
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import sft_config
from tests.runs.test_checkpoints import EXACT, outcome

pytestmark = pytest.mark.engine

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}


class Send(TrainerCallback):
    """Sends this process a signal at one moment of one step."""

    def __init__(self, name, moment, step, times=1):
        self.number, self.moment, self.step, self.times = getattr(signal, name), moment, step, times

    def send(self, moment, step):
        if self.times and (moment, step) == (self.moment, self.step):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.send("step", state.global_step + 1)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches = getattr(self, "batches", 0) + 1
        self.send("evaluation", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.send("saved", state.global_step)


STRATEGIES = {
    "epoch": dict(evaluation_strategy="epoch", save_strategy="epoch"),
    "steps": dict(evaluation_strategy="steps", save_strategy="steps", save_steps=2),
}


def make_config(model_dir, sft_file, folder):
    """Two epochs of three steps, dropout, the best model; four evaluation batches."""
    values = EXACT | dict(num_train_epochs=2, per_device_eval_batch_size=1, validation_split=0.3, packing=False)
    values |= dict(per_device_train_batch_size=3, learning_rate=1e-2) | STRATEGIES["steps"]
    return sft_config(model_dir, sft_file, folder, **values)


@pytest.fixture
def config(model_dir, sft_file, tmp_path):
    return make_config(model_dir, sft_file, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(model_dir, sft_file, tmp_path_factory):
    """What runs of each strategy learn."""

    def run(strategy):
        config = make_config(model_dir, sft_file, tmp_path_factory.mktemp(strategy) / "run")
        assert train(config.model_copy(update=STRATEGIES[strategy])) == 0
        return learned(Path(config.output_dir))

    return {strategy: run(strategy) for strategy in STRATEGIES}


def train(config, *callbacks):
    """The code that the command would exit with."""
    try:
        BaseTrainer(config.model_copy(update={"callbacks": [*callbacks]})).train()
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code
    return 0


def learned(folder):
    """The files of :func:`outcome`, the best model's among them, and each step's evaluation."""
    files = {name: content for name, content in outcome(folder).items() if isinstance(content, bytes)}
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return files, {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("name", sorted(CODES))
def test_last_moments(config, tmp_path, uninterrupted, name, strategy):
    every_moment(config, tmp_path, uninterrupted, name, strategy, last=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_moment(config, tmp_path, uninterrupted, strategy):
    every_moment(config, tmp_path, uninterrupted, "SIGTERM", strategy)


def every_moment(config, tmp_path, uninterrupted, name, strategy, last=None):
    """Stop a run in `last` of the moments, or in all; what goes on from there ends as if it had never stopped."""
    config = config.model_copy(update=STRATEGIES[strategy])
    by_epoch = strategy == "epoch"
    evaluated = [3, 6] if by_epoch else [1, 2, 5, 6]
    steps = (1, 3, 6) if by_epoch else (1, 2, 3, 6)
    moments = [("step", step) for step in steps] + [("evaluation", step) for step in evaluated]
    moments += [("saved", 3 if by_epoch else 2)]
    for moment, step in moments[-last:] if last else moments:
        folder = tmp_path / f"{moment}-{step}" / "run"
        stopped = config.model_copy(update={"output_dir": str(folder)})
        send = Send(name, moment, step)
        assert train(stopped, send) == CODES[name], (moment, step)
        newest = checkpoints.find_checkpoints(folder)[0]
        assert checkpoints.step_of(newest) == step and checkpoints.damage(newest) is None
        assert not (folder / "run_summary.json").exists()
        if moment == "evaluation":
            assert send.batches % 4 == 1  # the rest was not waited for
        assert train(stopped) == 0
        assert learned(folder) == uninterrupted[strategy], (moment, step)


def test_signals_go_back_to_who_had_them(config):
    before = [signal.getsignal(getattr(signal, name)) for name in sorted(CODES)]
    train(config, Send("SIGUSR1", "step", 1))
    assert [signal.getsignal(getattr(signal, name)) for name in sorted(CODES)] == before


def test_the_last_evaluation_is_not_waited_for_either(config):
    class SendAtTheEnd(Send):
        def on_train_end(self, args, state, control, **kwargs):
            self.moment, self.step = "evaluation", state.global_step

    assert train(config, SendAtTheEnd("SIGTERM", "never", 0)) == 143
    assert not Path(config.output_dir, "run_summary.json").exists()
    assert train(config) == 0


SECOND = """
import signal, sys
from arabic_qwen.commands import cli
from arabic_qwen.engine import resumable

save = resumable.save_state

def twice(state, path):
    if "checkpoint-4" in str(path):
        for _ in range(2):
            signal.raise_signal(getattr(signal, NAME))  # unlike os.kill, it waits until the handler has run
    save(state, path)

resumable.save_state = twice
NAME = sys.argv.pop()
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_one_during_a_save_stops_at_once_without_harm(config, tmp_path, name):
    config.to_yaml(tmp_path / "run.yaml")
    command = [sys.executable, "-c", SECOND, "train", str(tmp_path / "run.yaml"), name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == {"SIGINT": 130, "SIGTERM": -signal.SIGTERM}[name], result.stderr
    folder = Path(config.output_dir)
    assert [path.name for path in checkpoints.find_checkpoints(folder)] == ["checkpoint-2"]
    assert train(config) == 0
    assert not list(folder.glob(".unfinished-*"))
