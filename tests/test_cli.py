"""The command as a user runs it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arabic_qwen.config import DPOConfig, SFTConfig


def arabic_qwen(*arguments, cwd, stdin="", code=0):
    command = [sys.executable, "-m", "arabic_qwen", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def write_rows(path, rows):
    """A JSON Lines file of `rows`."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


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


@pytest.fixture
def dpo_run(model_dir, tmp_path):
    """A finished DPO run in `dpo`."""
    rows = [{"prompt": f"سؤال {i}؟", "chosen": f"جواب {i}.", "rejected": "لا أدري."} for i in range(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    config = DPOConfig(
        model_name=str(model_dir),
        dataset_path="pairs.jsonl",
        output_dir="dpo",
        instruction_template="chatml",
        torch_dtype="float32",
        max_steps=1,
        validation_split=0.25,
    )
    config.to_yaml(tmp_path / "dpo.yaml")
    arabic_qwen("train", "dpo.yaml", cwd=tmp_path)
    return tmp_path


def test_compare(dpo_run):
    shown = arabic_qwen("compare", "dpo", "--max-length", 2, "--json", cwd=dpo_run).stdout
    rows = json.loads(shown)
    assert [set(row) for row in rows] == [{"prompt", "trained_model_response", "reference_model_response"}] * 2
    (dpo_run / "prompts.txt").write_text("سؤال آخر؟\n\nوهذا؟\n", encoding="utf-8")
    shown = arabic_qwen("compare", "dpo", "--prompts", "prompts.txt", "--max-length", 2, cwd=dpo_run).stdout
    assert "سؤال آخر؟" in shown and "وهذا؟" in shown


def test_blind_ratings_are_kept_and_gone_on_with(dpo_run):
    command = ["compare", "dpo", "--blind", "--max-length", 2, "--prompt", "أولًا", "--prompt", "ثانيًا"]
    first = arabic_qwen(*command, cwd=dpo_run, stdin="?\nt\nq\n").stdout
    assert "trained 0 · before 0 · ties 1" in first
    assert "trained_model" not in first and "reference" not in first
    second = arabic_qwen(*command, cwd=dpo_run, stdin="a\n").stdout
    assert "أولًا" not in second.replace("[1/2]", "") and "ties 1" in second
    ratings = [json.loads(line) for line in (dpo_run / "dpo" / "ratings.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in ratings] == ["أولًا", "ثانيًا"]
    assert ratings[1]["preferred"] == ratings[1]["a"]


@pytest.mark.slow
def test_quickstart(tmp_path):
    result = arabic_qwen("quickstart", cwd=tmp_path)
    before, after = result.stdout.split("Held-out loss ")[1].split(" nats")[0].split(" → ")
    assert float(after) < 0.7 * float(before)
    assert "arabic-qwen quickstart --model" in result.stdout
    assert "Held-out pairs: margin 0.00 → 0." in result.stdout
    folder = Path(tmp_path, "quickstart", "sft")
    assert json.loads((folder / "run_summary.json").read_text())["metrics"]["eval_loss"] == pytest.approx(
        float(after), abs=1e-3
    )
    assert (folder / "loss_curve.png").is_file()
