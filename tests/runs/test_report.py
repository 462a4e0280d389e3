"""Training reports to the services that are installed, without a network."""

import importlib.util

import pytest

from arabic_qwen.config import SFTConfig
from arabic_qwen.training.base_trainer import BaseTrainer

pytestmark = pytest.mark.engine


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.fixture
def train(model_dir, sft_file, tmp_path, monkeypatch):
    def run(service):
        monkeypatch.chdir(tmp_path)
        config = SFTConfig(
            model_name=str(model_dir),
            dataset_path=str(sft_file),
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            eval_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to=service,
            run_name="تجربة",
        )
        BaseTrainer(config).train()
        return tmp_path

    return run


@needs("tensorboard")
def test_tensorboard(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next((train("tensorboard") / "run" / "runs").iterdir())
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "eval/loss", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


@needs("mlflow")
def test_mlflow(train, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    train("mlflow")
    runs = mlflow.search_runs(search_all_experiments=True)
    assert runs["tags.mlflow.runName"].tolist() == ["تجربة"]
    assert {"metrics.loss", "metrics.eval_loss"} <= set(runs.columns)


@needs("wandb")
def test_wandb(train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    folder = train("wandb")
    wandb.teardown()  # writes what it holds back
    record = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert b"train/loss" in record and b"eval/loss" in record
