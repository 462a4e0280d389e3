"""The verbs of `arabic-qwen data`."""

import json
import sys

import pytest

from arabic_qwen.cli import main
from arabic_qwen.data.layouts import LAYOUTS


@pytest.fixture
def run(monkeypatch, capsys):
    """Arguments of `arabic-qwen data` -> (exit code, standard output)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["arabic-qwen", "data", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr().out

    return run


def test_layouts(run):
    code, text = run("layouts")
    assert code == 0
    examples = [line.removeprefix("  example  ") for line in text.splitlines() if line.startswith("  example  ")]
    assert [json.loads(example) for example in examples] == [layout.example for layout in LAYOUTS]
    assert all(name in text for layout in LAYOUTS for name in layout.sets)


def test_layouts_as_json(run):
    code, text = run("layouts", "--json")
    assert code == 0
    assert [row["columns"] for row in json.loads(text)] == [list(layout.columns) for layout in LAYOUTS]


def test_stats(run, tmp_path):
    code, text = run("stats", "sample:sft", "--html", str(tmp_path / "stats.html"))
    assert code == 0
    assert "240 rows" in text and "Arabic" in text
    assert "<html dir=" in (tmp_path / "stats.html").read_text(encoding="utf-8")


def test_stats_as_json(run):
    code, text = run("stats", "sample:dpo", "--json", "--method", "dpo")
    found = json.loads(text)
    assert code == 0
    assert set(found) == {
        "rows", "bad_rows", "turns", "duplicate_share", "prompts", "answers", "rejected", "drift", "drift_share"
    }  # fmt: skip
    assert (found["rows"], found["rejected"]["texts"]) == (80, 80)
    for side in ("prompts", "answers", "rejected"):
        assert set(found[side]) == {"texts", "characters", "words", "scripts", "dialects", "diacritics"}


def test_pages_are_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "mine.html").write_text("<p>", encoding="utf-8")
    for verb in ("check", "stats"):
        assert run(verb, "no-such-file.jsonl", "--html", str(tmp_path / "mine.html"))[0] == 2
        assert run(verb, "no-such-file.jsonl")[0] == 2


def test_check_writes_a_page_of_all_of_it(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "ما عاصمة مصر؟", "response": "القاهرة"}, {"instruction": "من هو؟", "response": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _ = run("check", str(path), "--html", str(tmp_path / "check.html"))
    page = (tmp_path / "check.html").read_text(encoding="utf-8")
    assert code == 1
    assert "empty answer" in page and "rows.jsonl:2" in page and "<strong>50</strong>" in page


def test_tokens(run, model_dir):
    code, text = run("tokens", "sample:sft")
    assert code == 0 and "arabic-qwen-tiny" in text and "240 rows" in text
    names = ["arabic-qwen-tiny", str(model_dir)]
    arguments = [argument for name in names for argument in ("--tokenizer", name)]
    code, text = run("tokens", "sample:sft", "--sample", "10", "--json", *arguments)
    found = json.loads(text)
    assert code == 0
    assert (found["rows"], found["sampled_rows"], list(found["tokenizers"])) == (240, 10, names)
    for cost in found["tokenizers"].values():
        assert cost["per_word"] > 1
        assert set(cost["savings"]["train"]) == {"texts", "tokens", "share"}


def test_tokens_of_no_tokenizer(run, tmp_path):
    assert run("tokens", "sample:sft", "--tokenizer", str(tmp_path / "none"))[0] == 1
