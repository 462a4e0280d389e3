"""Runs on data that is read as training goes on."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from arabic_qwen.config import SFTConfig
from arabic_qwen.data import stream
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import StopAfter, initial_adapter, sft_config, trained_weights
from tests.preference_runs import (
    CONFIGS,
    preference_config,
    relative_difference,
    run,
    train_on_two_processes,
    write_data,
    write_rows,
)

pytestmark = pytest.mark.engine


def streamed(model_dir, data, folder, **values):
    settings = dict(streaming=True, eval_dataset_path=str(data), save_steps=1, eval_steps=1)
    return sft_config(model_dir, data, folder, **(settings | values))


@pytest.mark.parametrize("packing", [False, True])
def test_one_window_trains_as_the_set_in_memory(model_dir, sft_file, tmp_path, packing):
    values = dict(packing=packing, max_seq_length=96, validation_split=0)
    memory, _ = trained_weights(sft_config(model_dir, sft_file, tmp_path / "memory", **values))
    stream_, trainer = trained_weights(streamed(model_dir, sft_file, tmp_path / "stream", **values))
    assert all(torch.equal(memory[name], stream_[name]) for name in memory)
    card = (tmp_path / "stream" / "README.md").read_text(encoding="utf-8")
    assert f"- train, `{sft_file.name}`: streamed, 12 examples, " in card
    assert trainer.metrics["eval_loss"] > 0


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_interrupted_and_resumed_equals_uninterrupted(model_dir, sft_file, tmp_path, stop, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 5)  # 12 rows are windows of 5, 5 and 2; 8 steps are more than a pass
    values = dict(lora_dropout=0.1, max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    whole, trainer = trained_weights(streamed(model_dir, sft_file, tmp_path / "whole", **values))
    interrupted = BaseTrainer(streamed(model_dir, sft_file, tmp_path / "cut", callbacks=[StopAfter(stop)], **values))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed, again = trained_weights(streamed(model_dir, sft_file, tmp_path / "cut", **values))
    assert str(again.trainer._resumed_from).endswith(f"checkpoint-{stop}")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert again.dataset["train"].counts == trainer.dataset["train"].counts
    epochs = [[entry["epoch"] for entry in t.trainer.state.log_history if "loss" in entry] for t in (trainer, again)]
    assert epochs[0] == epochs[1]


def test_the_output_may_lie_in_the_data(model_dir, sft_file, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 5)
    (tmp_path / "data").mkdir()
    shutil.copy(sft_file, tmp_path / "data")
    config = streamed(model_dir, tmp_path / "data", tmp_path / "data" / "run", max_steps=8)
    with pytest.raises(KeyboardInterrupt):
        BaseTrainer(config.model_copy(update={"callbacks": [StopAfter(4)]})).train()
    BaseTrainer(config).train()


def test_kto_goes_on_in_a_window_with_one_prompt(model_dir, tmp_path, monkeypatch):
    """It needs answers of the window before, which is not read again."""
    monkeypatch.setattr(stream, "WINDOW", 4)
    rows = [{"prompt": f"س{i}", "completion": f"ج{i}", "label": i % 2 == 0} for i in range(9)]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, rows[-1] | {"completion": "ج"}])  # the last two alike
    values = dict(streaming=True, max_steps=7, per_device_train_batch_size=2, lora_dropout=0.1, save_steps=1)
    whole, _ = run(preference_config("kto", model_dir, data, tmp_path / "whole", **values))
    config = preference_config("kto", model_dir, data, tmp_path / "cut", **values)
    with pytest.raises(KeyboardInterrupt):
        run(config.model_copy(update={"callbacks": [StopAfter(5)]}))
    resumed, again = run(config)
    assert str(again.trainer._resumed_from).endswith("checkpoint-5")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_equal_one(model_dir, sft_file, tmp_path):
    values = dict(max_steps=7, save_steps=100, eval_steps=100)  # 12 rows are 6 steps; the seventh is of the next pass
    one, _ = trained_weights(streamed(model_dir, sft_file, tmp_path / "one", **values))
    config = streamed(
        model_dir, sft_file, tmp_path / "two", per_device_train_batch_size=1, ddp_backend="gloo", **values
    )
    two = train_on_two_processes(config)
    assert relative_difference(two, one, initial_adapter(config)) < 1e-4


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_every_preference_method(model_dir, tmp_path, method, monkeypatch):
    data = write_data(method, tmp_path)
    memory, _ = run(preference_config(method, model_dir, data, tmp_path / "memory"))
    stream_, _ = run(preference_config(method, model_dir, data, tmp_path / "stream", streaming=True))
    assert all(torch.equal(memory[name], stream_[name]) for name in memory)
    monkeypatch.setattr(stream, "WINDOW", 8)
    windows, trainer = run(preference_config(method, model_dir, data, tmp_path / "windows", streaming=True))
    assert any(not torch.equal(memory[name], windows[name]) for name in memory)
    assert trainer.trainer.state.global_step == 3


class TestBadRows:
    @pytest.fixture
    def data(self, tmp_path):
        rows = [{"instruction": f"س{i}", "response": "" if i in (2, 7) else "ج"} for i in range(10)]
        return write_rows(tmp_path / "rows.jsonl", rows)

    def test_the_run_stops_when_it_meets_one(self, model_dir, data, tmp_path, monkeypatch):
        monkeypatch.setattr(stream, "WINDOW", 5)
        config = streamed(model_dir, data, tmp_path / "run", max_bad_rows=1, eval_dataset_path=None)
        with pytest.raises(DatasetError, match=rf"{data}:3, {data}:8: response: is empty\n2 bad rows"):
            BaseTrainer(config).train()
        assert (tmp_path / "run" / "checkpoint-2").is_dir()  # the first window was trained on
        assert len((tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()) == 2
        data.write_text(
            data.read_text().replace('{"instruction": "س7", "response": ""}', '{"instruction": "س", "response": "ج"}')
        )
        with pytest.raises(ConfigurationError, match=r"the train data is not what it was .* set resume_changed"):
            BaseTrainer(config).train()
        trainer = BaseTrainer(config.model_copy(update={"resume_changed": True}))
        trainer.train()  # with the row corrected, it goes on
        assert str(trainer.trainer._resumed_from).endswith("checkpoint-2")
        assert len((tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()) == 1

    def test_it_goes_on_when_more_are_allowed(self, model_dir, data, tmp_path, monkeypatch):
        monkeypatch.setattr(stream, "WINDOW", 5)
        config = streamed(model_dir, data, tmp_path / "run", max_bad_rows=1, eval_dataset_path=None)
        with pytest.raises(DatasetError):
            BaseTrainer(config).train()
        trainer = BaseTrainer(config.model_copy(update={"max_bad_rows": 2}))
        trainer.train()
        assert str(trainer.trainer._resumed_from).endswith("checkpoint-2")
        assert trainer.data_loader.bad_rows.places == [f"{data}:3", f"{data}:8"]

    def test_each_counts_once_over_passes_and_resumes(self, model_dir, data, tmp_path, monkeypatch):
        monkeypatch.setattr(stream, "WINDOW", 5)
        values = dict(max_bad_rows=2, max_steps=9, eval_dataset_path=None)
        interrupted = BaseTrainer(streamed(model_dir, data, tmp_path / "run", callbacks=[StopAfter(6)], **values))
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()
        BaseTrainer(streamed(model_dir, data, tmp_path / "run", **values)).train()
        places = [json.loads(line)["where"] for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
        assert places == [f"{data}:3", f"{data}:8"]
        assert "- bad rows: 2 left out, listed in bad_rows.jsonl" in (tmp_path / "run" / "README.md").read_text()


def test_weights(model_dir, sft_file, tmp_path):
    config = streamed(model_dir, sft_file, tmp_path, dataset_path=[{"path": str(sft_file), "weight": 1.5}])
    _, window = next(BaseTrainer(config).load_and_validate_dataset()["train"].windows({}))
    assert len(window) == 18


def test_validation_split_is_resolved_to_none(model_dir, sft_file, tmp_path, caplog):
    trainer = BaseTrainer(streamed(model_dir, sft_file, tmp_path, eval_dataset_path=None, validation_split=0.1))
    trainer.get_training_arguments()
    assert caplog.text.count("no validation_split while streaming; eval_dataset_path can name validation data") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "streaming does not know how many rows there are; set max_steps"),
        ({"max_steps": 1, "max_samples": 5}, "max_samples needs all rows at once"),
    ],
)
def test_settings_that_need_all_rows(values, message):
    with pytest.raises(ConfigurationError, match=message):
        SFTConfig(streaming=True, **values)


def test_precomputed_reference_needs_all_rows():
    with pytest.raises(ConfigurationError, match="precompute_reference needs all rows at once"):
        CONFIGS["dpo"](streaming=True, max_steps=1, precompute_reference=True)


MEMORY = """
import resource, sys, torch
from arabic_qwen.config import SFTConfig
from arabic_qwen.training.base_trainer import BaseTrainer

torch.set_num_threads(1)
config = SFTConfig(model_name="arabic-qwen-tiny", dataset_path=sys.argv[1], streaming=True, max_steps=1, torch_dtype="float32")
stream = BaseTrainer(config).load_and_validate_dataset()["train"]
for place, window in stream.windows({}):
    if place["pass"]:
        break
print(stream.counts["rows"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_two_gigabytes_stream_within_one(tmp_path):
    answer = "القراءة توسّع المدارك وتنمّي الخيال. " * 30
    line = json.dumps({"instruction": "اكتب عن القراءة.", "response": answer}, ensure_ascii=False) + "\n"
    rows = 2 * 2**30 // len(line.encode())
    with (tmp_path / "big.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(line)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "big.jsonl")], check=True, capture_output=True, text=True
    )
    read, kilobytes = map(int, result.stdout.split())
    assert read >= rows
    assert kilobytes < 2**20
