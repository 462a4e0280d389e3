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
