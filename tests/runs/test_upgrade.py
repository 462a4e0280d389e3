"""Runs that version 0.1.0 has written go on as it would have gone on itself; upgrade/make.py says how they were made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from arabic_qwen.config import load_config
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.sources import RUN_CONFIG
from arabic_qwen.training.base_trainer import BaseTrainer

pytestmark = pytest.mark.engine

KEPT = Path(__file__).parent / "upgrade" / "0.1.0"
METHODS = ["sft", "dpo", "ipo", "kto", "cpo", "simpo", "orpo"]

# Without a GPU and with MKL, as it was there: elsewhere the same seed gives other dropout.
SAME_DROPOUT = torch.backends.mkl.is_available() and not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A copy of the old runs, as the working directory."""
    shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")


class Begun(TrainerCallback):
    """Counts the steps that are done when another begins."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def train(config):
    """Train; the trainer, and the steps that were done before each of its steps."""
    begun = Begun()
    trainer = BaseTrainer(config.model_copy(update={"callbacks": [begun]}))
    trainer.train()
    return trainer, begun.steps


def config_of(run, **values):
    return load_config(Path("runs", run, RUN_CONFIG)).model_copy(update=values)


def check_end(method, folder):
    """That the adapters are those with which the old version ended, not those of the checkpoint."""
    expected = load_file("expected.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    before = load_file(f"runs/{method}/checkpoint-3/adapter_model.safetensors")
    assert {f"{method}/{name}" for name in found} == {name for name in expected if name.startswith(f"{method}/")}
    for name, weights in found.items():
        assert (weights - before[name]).abs().max() > 1e-4
        if SAME_DROPOUT:
            # Equal in every bit on the processor that made them; others add up in another order.
            torch.testing.assert_close(weights, expected[f"{method}/{name}"], rtol=0, atol=1e-6)


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_as_it_would_have(method, caplog):
    folder = Path("runs", method)
    logged = (folder / "metrics.jsonl").read_text().splitlines()[:3]
    _, steps = train(config_of(method))
    assert f"Going on from {folder / 'checkpoint-3'}" in caplog.text
    assert steps == [3, 4, 5]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert lines[:3] == logged
    assert [entry["step"] for entry in map(json.loads, lines) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    check_end(method, folder)


def test_another_run_goes_on_from_an_old_checkpoint():
    values = dict(output_dir="runs/other", resume_from_checkpoint="runs/dpo/checkpoint-3")
    _, steps = train(config_of("dpo", **values))
    assert steps == [3, 4, 5]
    check_end("dpo", Path("runs/other"))


def test_a_finished_run_stays_and_answers(caplog):
    before = files("runs/finished")
    config = config_of("finished")
    trainer, steps = train(config)
    assert "runs/finished holds this run, finished" in caplog.text
    assert (steps, trainer.trainer) == ([], None)
    ((question, answer),) = json.loads(Path("expected.json").read_text(encoding="utf-8")).items()
    assert trainer.predict(question, max_length=8) == answer
    loaded = BaseTrainer(config)
    loaded.load_model("runs/finished")
    assert loaded.predict(question, max_length=8) == answer
    assert files("runs/finished") == before


def test_a_changed_setting_is_refused_with_the_remedy():
    before = files("runs/sft")
    message = (
        r"^output_dir: runs/sft holds a run with other settings \(lora_r: 2 → 4\); "
        r".*choose another output_dir, or set overwrite_output_dir to true to discard that run$"
    )
    with pytest.raises(ConfigurationError, match=message):
        train(config_of("sft", lora_r=4))
    assert files("runs/sft") == before
