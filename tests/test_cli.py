"""The command as a user runs it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arabic_qwen.config import SFTConfig


def arabic_qwen(*arguments, cwd, stdin="", code=0):
    command = [sys.executable, "-m", "arabic_qwen", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def yaml_file(model_dir, sft_file, tmp_path):
    config = SFTConfig(
        model_name=str(model_dir), dataset_path=str(sft_file), instruction_template="chatml", torch_dtype="float32"
    )
    config.to_yaml(tmp_path / "sft.yaml")
    return tmp_path / "sft.yaml"


def test_train_then_chat(yaml_file, tmp_path):
    result = arabic_qwen("train", yaml_file, "max_steps=2", "learning_rate=1e-3", cwd=tmp_path)
    assert "eval_loss" in result.stdout
    assert "arabic-qwen chat ./checkpoints/sft" in result.stdout
    assert "train: 11 examples" in result.stderr
    saved = SFTConfig.from_yaml(tmp_path / "checkpoints/sft/training_config.yaml")
    assert (saved.max_steps, saved.learning_rate) == (2, 1e-3)

    again = arabic_qwen("train", yaml_file, "max_steps=2", "learning_rate=1e-3", cwd=tmp_path)
    assert "finished" in again.stderr

    turns = "ما عاصمة الأردن؟\n/reset\nمرحبا\n/exit\nnever said\n"
    arabic_qwen("chat", "checkpoints/sft", "--max-length", 3, "--system", "أجب بإيجاز.", cwd=tmp_path, stdin=turns)
    arabic_qwen("chat", "checkpoints/sft", "--max-length", 3, "--temperature", 0.7, cwd=tmp_path, stdin="مرحبا\n")


def test_init_prints_what_train_reads(tmp_path):
    text = arabic_qwen("init", "sft", cwd=tmp_path).stdout
    (tmp_path / "sft.yaml").write_text(text)
    assert (
        SFTConfig.from_yaml(tmp_path / "sft.yaml").model_dump()
        == SFTConfig(output_dir="./checkpoints/sft").model_dump()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["train", "missing.yaml"], 2, ["missing.yaml", "cannot be read"]),
        (["train", "sft.yaml", "lerning_rate=1"], 2, ["sft.yaml", "lerning_rate", "learning_rate"]),
        (["train", "sft.yaml", "learning_rate"], 2, ["learning_rate", "key=value"]),
        (["train", "sft.yaml", "dataset_path=none.jsonl"], 2, ["none.jsonl", "cannot be read"]),
        (["train", "sft.yaml", "dataset_path=bad.jsonl"], 2, ["bad.jsonl:2", "question", "bad.jsonl:3", "2 bad rows"]),
        (["train", "sft.yaml", "model_name=no/model"], 1, ["no/model", "cannot be loaded"]),
        (["train", "sft.yaml", "max_seq_length=8"], 2, ["sft.jsonl:1", "max_seq_length=8"]),
        (["train", "sft.yaml", "lora_target_modules=[q_porj]"], 2, ["q_porj", "q_proj"]),
        (["train", "sft.yaml", "method=sfft"], 2, ["sfft", "sft"]),
        (["init", "ppo"], 2, ["ppo", "sft"]),
        (["chat", "no/model"], 1, ["no/model", "cannot be loaded"]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) and value[0] in ("train", "init", "chat") else "",
)
def test_mistakes_get_one_clear_error(yaml_file, tmp_path, arguments, code, parts):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"question": "?"}\n{"prompt": ""}\n')
    result = arabic_qwen(*arguments, cwd=tmp_path, code=code)
    for part in ["error: ", *parts]:
        assert part in result.stderr
    assert not list(tmp_path.rglob("run_summary.json"))


@pytest.mark.slow
def test_quickstart(tmp_path):
    result = arabic_qwen("quickstart", cwd=tmp_path)
    before, after = result.stdout.split("Held-out loss ")[1].split(" nats")[0].split(" → ")
    assert float(after) < 0.7 * float(before)
    assert "arabic-qwen quickstart --model" in result.stdout
    folder = Path(tmp_path, "quickstart")
    assert json.loads((folder / "run_summary.json").read_text())["metrics"]["eval_loss"] == pytest.approx(
        float(after), abs=1e-3
    )
    assert (folder / "loss_curve.png").is_file()
