"""Answers to held-out prompts at each evaluation: what is kept and measured, and that training does not notice."""

import json

import pytest
import torch

from arabic_qwen.config import SFTConfig
from arabic_qwen.data.conversations import Message
from arabic_qwen.data.templates import last_question, render_prompt, set_template
from arabic_qwen.runs.report import model_card
from arabic_qwen.text.dialects import UNKNOWN, Prediction
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import StopAfter, sft_config, trained_weights
from tests.preference_runs import CONFIGS, preference_config, write_data, write_rows

STEPS = dict(save_steps=1, eval_steps=1, max_steps=3)


def written(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_does_not_notice(model_dir, sft_file, tmp_path, checkpointing):
    values = dict(lora_dropout=0.1, gradient_checkpointing=checkpointing, **STEPS)
    without, plain = trained_weights(sft_config(model_dir, sft_file, tmp_path / "without", **values))
    with_, sampled = trained_weights(sft_config(model_dir, sft_file, tmp_path / "with", eval_samples=2, **values))
    assert all(torch.equal(without[name], with_[name]) for name in without)
    assert {name: sampled.metrics[name] for name in plain.metrics} == plain.metrics
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_what_is_kept(model_dir, sft_file, tmp_path):
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path, eval_samples=2, **STEPS))
    trainer.train()
    samples = written(tmp_path)
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3]
    assert all(list(s) == ["step", "prompt", "answer", "reference", "script", "dialect"] for s in samples)
    rows = [tuple(row.values.values()) for row in trainer.get_data_loader().split()["validation"]]
    assert {(s["prompt"], s["reference"]) for s in samples} <= set(rows)
    for sample in samples[-2:]:
        assert trainer.predict(sample["prompt"], max_length=64, do_sample=False) == sample["answer"]
    assert trainer.samples == samples[-2:]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("eval_script_leak" in entry for entry in metrics if "eval_loss" in entry)
    assert "eval_script_leak" in trainer.metrics
    trainer.evaluate()
    assert written(tmp_path) == samples  # a finished run does not change


def test_answers_of_the_best_checkpoint(model_dir, sft_file, tmp_path):
    """It is the one that is kept; what it answered at its step is not asked again."""
    values = dict(STEPS, eval_samples=2, load_best_model_at_end=True, max_steps=2)
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path, learning_rate=0.3, **values))
    trainer.train()
    assert trainer.trainer.state.best_global_step == 1
    samples = written(tmp_path)
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2]
    assert trainer.samples == samples[:2]
    for sample in trainer.samples:
        assert trainer.predict(sample["prompt"], max_length=64, do_sample=False) == sample["answer"]
    assert "eval_script_leak" in trainer.metrics


def test_steps_after_the_last_evaluation(model_dir, sft_file, tmp_path):
    values = dict(STEPS, eval_samples=1, eval_steps=2, save_steps=2, load_best_model_at_end=False)
    BaseTrainer(sft_config(model_dir, sft_file, tmp_path, **values)).train()
    assert [sample["step"] for sample in written(tmp_path)] == [2, 3]


def test_an_evaluation_without_a_run_writes_nothing(model_dir, sft_file, tmp_path):
    BaseTrainer(sft_config(model_dir, sft_file, tmp_path / "run", eval_samples=2)).evaluate()
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_no_validation_rows(model_dir, sft_file, tmp_path):
    BaseTrainer(sft_config(model_dir, sft_file, tmp_path, eval_samples=2, validation_split=0, max_steps=1)).train()
    assert not (tmp_path / "samples.jsonl").exists()


def test_after_a_resume_steps_are_there_once(model_dir, sft_file, tmp_path, monkeypatch):
    values = dict(STEPS, eval_samples=1)
    interrupted = BaseTrainer(sft_config(model_dir, sft_file, tmp_path, callbacks=[StopAfter(2)], **values))
    with monkeypatch.context() as patch:
        patch.setattr(interrupted, "evaluate", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()
    with (tmp_path / "samples.jsonl").open("ab") as file:  # killed on the way to the checkpoint of the third step
        file.write('{"step": 3, "prompt": "س"}\n{"step": 3, "prompt": "س'.encode()[:-1])
    BaseTrainer(sft_config(model_dir, sft_file, tmp_path, **values)).train()
    samples = written(tmp_path)
    assert [sample["step"] for sample in samples] == [1, 2, 3]
    assert all("answer" in sample for sample in samples)


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_every_preference_method(model_dir, tmp_path, method):
    data = write_data(method, tmp_path)
    values = dict(validation_split=0.3, eval_samples=50, max_steps=1, per_device_eval_batch_size=3)
    trainer = BaseTrainer(preference_config(method, model_dir, data, tmp_path / "run", **values))
    trainer.train()
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    good = {(row["prompt"], row.get("chosen") or row["completion"]) for row in rows if row.get("label", True)}
    samples = trainer.samples
    assert {(sample["prompt"], sample["reference"]) for sample in samples} <= good
    assert len({sample["prompt"] for sample in samples}) == len(samples) >= 2


@pytest.mark.parametrize(("reference", "drift"), [("ايه", 0.5), ("مرحبا", None)])
def test_rates(model_dir, sft_file, tmp_path, monkeypatch, reference, drift):
    """Of answers that are put into the model's mouth."""

    class Classifier:
        def predict(self, texts):
            return [Prediction({"شو": "LEV", "ايه": "EGY"}.get(text, UNKNOWN), 1.0) for text in texts]

    monkeypatch.setattr("arabic_qwen.generation.samples.load_classifier", lambda path: Classifier())
    answers = ["شو", "ايه", "你好", "hello there"]
    monkeypatch.setattr("arabic_qwen.generation.samples.Samples._answer", lambda self, model: answers)
    data = write_rows(tmp_path / "held_out.jsonl", [{"instruction": f"س {n}", "response": reference} for n in range(9)])
    values = dict(eval_samples=4, max_steps=1, eval_dataset_path=str(data))
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path / "run", **values))
    trainer.train()
    assert trainer.metrics.get("eval_dialect_drift") == drift
    assert trainer.metrics["eval_script_leak"] == 0.5
    assert [sample["script"] for sample in trainer.samples] == ["Arabic", "Arabic", "Han", "Latin"]
    assert [sample["dialect"] for sample in trainer.samples] == ["LEV", "EGY", UNKNOWN, UNKNOWN]


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
@pytest.mark.parametrize("system", [[], [turn("system", "أجب بإيجاز.")]], ids=["no system", "system"])
@pytest.mark.parametrize("before", [[], [turn("user", "من؟"), turn("assistant", "أنا")]], ids=["one turn", "two turns"])
def test_last_question(tokenizer, template, system, before):
    set_template(tokenizer, template, "### Response:\n")
    question = "ما هذا؟\n\nسطر ثانٍ: user"
    prompt = render_prompt(tokenizer, [*system, *before, turn("user", question)])
    assert last_question(tokenizer, prompt) == question


def test_card_shows_them_right_to_left():
    sample = {"prompt": "سؤال <b>", "answer": "سطر\nوآخر", "reference": "جواب"}
    card = model_card(SFTConfig(), {}, {}, [sample], adapter=True)
    assert '<div dir="rtl">' in card
    assert "سؤال &lt;b&gt;" in card and "سطر<br>وآخر" in card
    assert "## Answers" not in model_card(SFTConfig(), {}, {}, [], adapter=True)
