"""`train --dry-run`: the run without the steps."""

import re
from pathlib import Path

import pytest
import torch

from arabic_qwen.commands import dry_run
from arabic_qwen.config import METHOD_CONFIGS, DPOConfig
from arabic_qwen.errors import DatasetError, TrainingError
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.commands.test_cli import in_process


def config_for(method, model_dir, **values):
    settings = {"model_name": str(model_dir), "instruction_template": "chatml", "torch_dtype": "float32"}
    sample = {"sft": "sft", "kto": "kto"}.get(method, "dpo")
    return METHOD_CONFIGS[method](**settings | {"dataset_path": f"sample:{sample}", "output_dir": "run"} | values)


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_every_method_is_rehearsed_and_nothing_written(model_dir, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(dry_run.dry_run(config_for(method, model_dir)))
    assert not list(tmp_path.iterdir())
    for part in ("of them trained", "train  ", "validation", "steps  ", "first step", "time  ", "memory  "):
        assert part in text
    assert text.endswith("nothing was written")


def test_steps_are_those_of_the_run(model_dir, sft_file, tmp_path):
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "packing": False}
    config = config_for("sft", model_dir, dataset_path=str(sft_file), output_dir=str(tmp_path / "run"), **values)
    text = "\n".join(dry_run.dry_run(config))
    trainer = BaseTrainer(config)
    trainer.train()
    assert f"steps      {trainer.trainer.state.global_step}," in text
    assert "first step 4 examples" in text


def test_a_stream_is_rehearsed_from_its_first_rows(model_dir):
    text = "\n".join(dry_run.dry_run(config_for("dpo", model_dir, streaming=True, max_steps=7)))
    assert "streamed, " in text
    assert "steps      7," in text


def test_a_list_of_bad_rows_that_is_not_written_is_not_named(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"instruction": "س"}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"or raise max_bad_rows \(now 0\) to leave it out$"):
        dry_run.dry_run(config_for("sft", model_dir, dataset_path="rows.jsonl"))


def test_memory_and_time_follow_from_what_was_measured(model_dir, monkeypatch):
    config = config_for("dpo", model_dir, max_steps=10, token_budget=100)
    monkeypatch.setattr(dry_run, "_measure", lambda engine: dry_run.Measured(50, 0.5, 10**9, 2 * 10**9))
    lines = dry_run.dry_run(config)
    cost = "\n".join(lines)
    assert "100 tokens/s, measured on 50 tokens" in cost
    (tokens,) = map(int, re.findall(r"about ([\d,]+) tokens each", cost))
    assert f"about 0 min {10 * tokens / 100:02.0f} s" in cost
    largest = int(re.findall(r"largest of (\d+) tokens", cost)[0])
    assert f"{largest / 50:.2f} GB activations" in cost


def test_what_fits_is_chosen_for_the_whole_run(model_dir, sft_file, monkeypatch):
    """Not for the few examples that are measured."""
    seen = []

    def fit(trainer):
        seen.append((len(trainer.train_groups), trainer.args.per_device_train_batch_size))
        trainer.token_budget = 77 if len(seen) == 1 else trainer.token_budget

    monkeypatch.setattr("arabic_qwen.memory.fit.fit", fit)
    config = config_for("sft", model_dir, dataset_path=str(sft_file), packing=False, per_device_train_batch_size=3)
    lines = dry_run.dry_run(config)
    assert seen[0] == (len(BaseTrainer(config).load_and_validate_dataset()["train"].groups), 3)
    assert "of token_budget=77 filled" in "\n".join(lines)


def test_errors_are_those_of_the_run(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"none\.jsonl: cannot be read"):
        dry_run.dry_run(config_for("sft", model_dir, dataset_path="none.jsonl"))


def test_too_little_memory_is_told(model_dir, monkeypatch):
    def overflow(self, *args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("arabic_qwen.engine.trainer.PackedTrainer.training_step", overflow)
    with pytest.raises(TrainingError, match=r"^out of memory .*; lower token_budget"):
        dry_run.dry_run(config_for("sft", model_dir))


def test_precomputed_reference_is_left_to_the_run(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config_for("dpo", model_dir, precompute_reference=True).to_yaml("dpo.yaml")
    code, shown, said = in_process(monkeypatch, capsys, "train", "dpo.yaml", "--dry-run")
    assert code == 0, said
    assert "nothing was written" in shown
    assert [path.name for path in Path().iterdir()] == ["dpo.yaml"]
    assert isinstance(DPOConfig.from_yaml("dpo.yaml"), DPOConfig)
