"""Prompts, ratings and display of `arabic-qwen compare`."""

import json

import pytest

from arabic_qwen.commands import compare as comparison
from arabic_qwen.config import KTOConfig, SFTConfig
from arabic_qwen.errors import DatasetError
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.commands.test_cli import write_rows

TURNS = [
    {"role": "user", "content": "ما عاصمة مصر؟"},
    {"role": "assistant", "content": "القاهرة."},
    {"role": "user", "content": "وتونس؟"},
    {"role": "assistant", "content": "تونس."},
]


def row(prompt, trained, reference):
    return {"prompt": prompt, "trained_model_response": trained, "reference_model_response": reference}


def test_the_prompt_of_a_row_is_the_whole_conversation(tokenizer):
    assert METHODS["sft"].data_loader(SFTConfig(), tokenizer).prompt({"messages": TURNS}) == TURNS[:-1]
    pair = {"prompt": "سؤال؟", "chosen": "نعم.", "rejected": "لا."}
    loader = METHODS["kto"].data_loader(KTOConfig(unpair_preferences=True), tokenizer)
    assert loader.prompt(pair) == [{"role": "user", "content": "سؤال؟"}]


def test_held_out_conversations_are_answered_whole(model_dir, tmp_path):
    rows = [{"messages": [{**turn, "content": f"{turn['content']} {i}"} for turn in TURNS]} for i in range(4)]
    config = SFTConfig(
        model_name=str(model_dir),
        dataset_path=str(write_rows(tmp_path / "talks.jsonl", rows)),
        output_dir=str(tmp_path / "run"),
        instruction_template="chatml",
        torch_dtype="float32",
        max_steps=1,
        validation_split=0.25,
    )
    BaseTrainer(config).train()
    (compared,) = comparison.compare(str(tmp_path / "run"), [], "", 5, 2)
    roles = [line.split(":")[0] for line in compared["prompt"].splitlines()]
    assert roles == ["user", "assistant", "user"]


def test_equal_answers_are_a_tie_that_is_not_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: "a")
    ratings = tmp_path / "ratings.jsonl"
    counts = comparison.rate([row("أولًا", "نعم", "نعم"), row("ثانيًا", "نعم", "لا")], ratings)
    assert counts.total() == 2 and counts["tie"] == 1
    assert "both answers are the same, a tie: نعم" in capsys.readouterr().out
    assert json.loads(ratings.read_text().splitlines()[0])["preferred"] == "tie"


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", "{}\n"])
def test_a_file_that_holds_no_ratings_is_told(tmp_path, content):
    (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(DatasetError, match=r"notes\.txt: does not hold ratings; .*--ratings"):
        comparison.rate([row("أولًا", "نعم", "لا")], tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == content


def test_ratings_that_cannot_be_written_are_told_before_anything_is_asked(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot be written .*--ratings"):
        comparison.rate([row("أولًا", "نعم", "لا")], tmp_path / "none" / "ratings.jsonl")
