"""The verbs of `arabic-qwen data`."""

import json
import sys

import pytest

from arabic_qwen.commands.cli import main
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


def test_names_with_brackets(run, tmp_path, model_dir):
    """They are no markup of the terminal's."""
    folder = tmp_path / "x[" / "parts]"
    folder.parent.mkdir()
    code, text = run("split", "sample:sft", str(folder))
    assert code == 0 and "x[/parts]" in "".join(text.split())
    texts = {"EGY": "إزيك عامل إيه النهارده يا باشا", "MSA": "ما هي عاصمة المملكة الأردنية الهاشمية"}
    rows = [{"text": f"{text} {n}", "dialect": name} for name, text in texts.items() for n in range(10)]
    file = write(tmp_path / "labelled.jsonl", *rows)
    code, text = run("fit-dialects", file, str(folder / "own[b].safetensors"))
    assert code == 0 and "own[b].safetensors" in "".join(text.split())
    link = folder / "[red]"
    link.symlink_to(model_dir)
    code, text = run("tokens", "sample:sft", "--sample", "10", "--tokenizer", str(link))
    assert code == 0 and "[red]" in "".join(text.split())


def test_tokens_of_no_tokenizer(run, tmp_path):
    assert run("tokens", "sample:sft", "--tokenizer", str(tmp_path / "none"))[0] == 1


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


GOOD = {"instruction": "ما عاصمة الأردن؟", "response": "عمّان"}
STRETCHED = {"instruction": "ما عاصمة مصر؟", "response": "القـــاهرة"}
EMPTY = {"instruction": "ما عاصمة تونس؟", "response": ""}


def test_check_of_clean_data(run):
    assert run("check", "sample:sft") == (0, "240 rows: 0 errors, 0 warnings; score 100 of 100\n")
    assert run("check", "sample:sft", "--json") == (0, "[]\n")


def test_check_as_json(run, tmp_path):
    code, text = run("check", write(tmp_path / "a.jsonl", GOOD, EMPTY, STRETCHED), "--json")
    assert code == 1
    empty, stretched = json.loads(text)
    assert list(empty) == ["code", "level", "file", "line", "message", "example"]
    assert (empty["code"], empty["level"], empty["line"]) == ("empty_answer", "error", 2)
    assert (stretched["code"], stretched["level"], stretched["line"]) == ("tatweel", "warning", 3)
    assert stretched["file"] == str(tmp_path / "a.jsonl") and stretched["example"] == "القـــاهرة"


def test_check_in_the_terminal(run, tmp_path):
    files = write(tmp_path / "a.jsonl", *[{**EMPTY, "instruction": f"سؤال {i}"} for i in range(5)], STRETCHED)
    code, text = run("check", files, write(tmp_path / "b.jsonl", STRETCHED), "--max-examples", "3")
    assert code == 1
    lines = text.splitlines()
    assert lines[0].split() == ["level", "code", "count", "what", "to", "do"]
    assert lines[1].split()[:3] == ["error", "empty_answer", "5"]
    assert [line.split()[0] for line in lines[2:8:2]] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert any(line.split() == ["b.jsonl:1", "is", "the", "same", "as", "a.jsonl:6"] for line in lines)
    assert lines[-1].startswith("7 rows: 5 errors, 3 warnings; score ")
    assert lines[-1].endswith("; `arabic-qwen data fix FILE OUT` repairs 2 of them")


def test_warnings_alone_exit_0(run, tmp_path):
    assert run("check", write(tmp_path / "a.jsonl", GOOD, STRETCHED))[0] == 0


@pytest.mark.parametrize(
    ("name", "content"), [("missing.jsonl", None), ("empty.jsonl", b""), ("broken.json", b"[{"), ("a.parquet", b"PAR")]
)
def test_files_that_cannot_be_read(run, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("check", str(tmp_path / name)) == (2, "")
    assert run("fix", str(tmp_path / name), str(tmp_path / "out.jsonl")) == (2, "")
    assert not (tmp_path / "out.jsonl").exists()


def test_unknown_method(run):
    assert run("check", "sample:sft", "--method", "ppo") == (2, "")


def test_check_writes_a_page(run, tmp_path):
    code, _ = run("check", write(tmp_path / "a.jsonl", GOOD, EMPTY), "--html", str(tmp_path / "page.html"))
    assert code == 1
    assert 'dir="rtl"' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_fix(run, tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, STRETCHED, EMPTY)
    before = (tmp_path / "a.jsonl").read_bytes()
    code, text = run("fix", file, str(tmp_path / "b.jsonl"))
    assert code == 0
    assert [line.strip() for line in text.splitlines()] == [
        "1  tatweel",
        "1  left out: empty answer",
        "2 of 3 rows written",
        str(tmp_path / "b.jsonl"),
        str(tmp_path / "b.changes.jsonl"),
        str(tmp_path / "b.dropped.jsonl"),
    ]
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert run("check", str(tmp_path / "b.jsonl"))[0] == 0
    assert run("fix", file, str(tmp_path / "b.jsonl"))[0] == 2
