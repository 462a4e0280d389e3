"""Training on an NF4-quantised base, on a processor; tests/engine/test_gpu.py has the same on CUDA."""

import importlib.util
import json
import logging

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.models import precision
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.loading import load_model
from arabic_qwen.models.scoring import score_completions
from arabic_qwen.training.base_trainer import BaseTrainer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

GROUPS = [([3, 4, 5], [[6, 7, 8], [9]])]


def config_for(model_dir, data, output, config_class=SFTConfig, **values):
    return config_class(
        **{
            "model_name": str(model_dir),
            "dataset_path": str(data),
            "output_dir": str(output),
            "instruction_template": "chatml",
            "torch_dtype": "float32",
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.0,
            "load_in_4bit": True,
            "learning_rate": 5e-3,
            "max_steps": 6,
            "logging_steps": 1,
            **values,
        }
    )


def trained(config):
    trainer = BaseTrainer(config)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"torch_dtype": "bfloat16"}], ids=str)
def test_trains_and_is_loaded_as_it_was_trained(model_dir, sft_file, tmp_path, variant):
    if variant.get("torch_dtype") == "bfloat16" and not precision._processor_has_bf16():
        pytest.skip("this processor has no bfloat16")
    trainer, losses = trained(config_for(model_dir, sft_file, tmp_path / "run", **variant))
    assert trainer.model.is_loaded_in_4bit
    assert losses[-1] < 0.9 * losses[0]
    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(str(tmp_path / "run"))
    assert loaded.config.load_in_4bit and loaded.model.is_loaded_in_4bit
    rows = str(sft_file)
    assert loaded.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-5)
    plain = BaseTrainer(SFTConfig(load_in_4bit=False))
    plain.load_model(str(tmp_path / "run"))
    assert not getattr(plain.model, "is_loaded_in_4bit", False)


def test_is_loaded_plain_where_the_machine_cannot_quantise(model_dir, sft_file, tmp_path, monkeypatch, caplog):
    trained(config_for(model_dir, sft_file, tmp_path / "run", max_steps=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loaded = BaseTrainer(SFTConfig())
    with caplog.at_level(logging.WARNING):
        loaded.load_model(str(tmp_path / "run"))
    assert "not loaded as it was trained (load_in_4bit: needs bitsandbytes" in caplog.text
    assert not loaded.config.load_in_4bit


def test_gradients_after_an_evaluation(model_dir):
    """bitsandbytes would repack the weights in a pass without gradients, and could not train on them afterwards."""
    config = SFTConfig(torch_dtype="float32", load_in_4bit=True, lora_dropout=0.0, lora_target_modules="all-linear")
    model = add_lora(load_model(str(model_dir), config, trainable=True), config)

    def gradients():
        model.train().zero_grad()
        torch.cat([part for parts in score_completions(model, GROUPS) for part in parts]).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        score_completions(model.eval(), GROUPS)
    after = gradients()
    assert len(before) > 20
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_preferences(model_dir, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"سؤال رقم {i}؟", "chosen": f"جواب {i}.", "rejected": "لا أدري."} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer, losses = trained(config_for(model_dir, data, tmp_path / "run", DPOConfig))
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] < losses[0] - 0.01
    assert trainer.metrics["eval_rewards/margins"] > 0


def test_is_merged_into_the_unquantised_base(model_dir, sft_file, tmp_path):
    trained(config_for(model_dir, sft_file, tmp_path / "adapter"))
    trained(config_for(model_dir, sft_file, tmp_path / "merged", merge_and_save=True))
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(str(tmp_path / "merged"))
    assert not loaded.config.load_in_4bit
    assert all(torch.allclose(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
