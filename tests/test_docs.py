"""Every Python block and every command of README and docs runs, with the embedded model in place of the 7B."""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ASSETS = Path(str(files("arabic_qwen") / "assets"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder where `Qwen/Qwen2.5-7B` and the data files that the pages name exist."""
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2.5-7B").symlink_to(ASSETS / "arabic-qwen-tiny")
    (tmp_path / "data").mkdir()
    for names, sample in (
        (("training", "sft_arabic"), "sft"),
        (("dpo_preferences", "ipo_preferences", "cpo_preferences"), "dpo"),
        (("kto_feedback",), "kto"),
    ):
        rows = (ASSETS / f"{sample}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:24]
        for name in names:
            (tmp_path / "data" / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "data" / "questions.csv").write_text(
        "question,answer\n" + "ما عاصمة مصر؟,القاهرة\n" * 12, encoding="utf-8"
    )
    (tmp_path / "data" / "labelled.csv").write_text(
        "text,dialect\n" + "".join(f"انا مش عايز كده {n},EGY\nوش تبي تسوي الحين {n},GLF\n" for n in range(9)),
        encoding="utf-8",
    )
    good, bad = {"instruction": "س", "response": "ج"}, {"instruction": "س", "response": ""}
    lines = [json.dumps(row) + "\n" for row in [*[good] * 12, bad]]
    (tmp_path / "data" / "with_bad_rows.jsonl").write_text("".join(lines), encoding="utf-8")
    template = re.search(r"^```\n(\{%.*?)^```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "data" / "my_format.jinja").write_text(template[1], encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'src'}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


# Each command is a process of its own, forked from one that has imported the libraries: that takes longer than most do.
# What these read of the environment as they are imported is what it was before the first command.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["arabic_qwen.training.base_trainer", "transformers.generation.utils", "matplotlib.figure"]
)


def run(command, folder):
    """What a command, `arabic-qwen …` or a Python script, writes to its standard output."""
    process = FORKS.Process(target=_run, args=(command, folder, dict(os.environ)))
    process.start()
    process.join(540)
    process.kill()
    written = [(folder / name).read_text(encoding="utf-8") for name in ("stdout.txt", "stderr.txt")]
    assert process.exitcode == 0, "".join(written)
    return written[0]


def _run(command, folder, environment):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = command
    if command[0] == "arabic-qwen":
        from arabic_qwen.commands import cli

        cli.main()
    else:
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page, workplace):
    code = blocks(page, "python")
    if not code:
        pytest.skip("no Python on this page")
    script = workplace / "page.py"
    # the page as one program; its top-level names carry over from block to block, as a reader would have it
    script.write_text('if __name__ == "__main__":\n    pass\n' + "\n".join(code), encoding="utf-8")
    run([str(script)], workplace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, workplace):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in lines:
        if line.startswith("make "):
            assert line.removeprefix("make ") in targets
        else:
            line = re.sub(r"^python (benchmarks|scripts)/", rf"{ROOT}/\1/", line)
            if line.startswith("arabic-qwen train") and "max_steps" not in line:
                line += " max_steps=4"  # the command as it is, the training shorter
            if line.startswith(("echo ", "export ", "cat ")):
                subprocess.run(["bash", "-e", "-o", "pipefail", "-c", line], cwd=workplace, check=True, timeout=540)
                continue
            command, _, target = line.partition(" > ")
            output = run(shlex.split(command, comments=True), workplace)
            if target:
                (workplace / target).write_text(output, encoding="utf-8")


def test_json_blocks_are_rows_that_training_reads(workplace):
    from arabic_qwen.data.conversations import to_conversation
    from arabic_qwen.data.preferences import to_contrast, to_feedback

    for page in PAGES:
        for block in blocks(page, "json"):
            for row in map(json.loads, block.splitlines()):
                read = to_contrast if "chosen" in row else to_feedback if "label" in row else to_conversation
                assert read(row)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("script", "arguments", "shown"),
    [
        ("sft_training", ["arabic-qwen-tiny", "data/sft_arabic.jsonl"], ["eval_loss", "ما عاصمة الأردن؟"]),
        ("dpo_training", [], ["eval_rewards/margins", "trained_model_response"]),
        ("preference_training", [], ["kto", "ipo", "cpo", "eval_rewards/accuracies"]),
        (
            "multi_method_comparison",
            ["arabic-qwen-tiny", "data/dpo_preferences.jsonl"],
            ["untouched", "SimPO", "comparison.png"],
        ),
    ],
)
def test_example_scripts(workplace, script, arguments, shown):
    output = run([str(ROOT / "examples" / f"{script}.py"), *arguments], workplace)
    assert all(part in output for part in shown)


def test_configuration_page_is_up_to_date():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from build_configuration_docs import PAGE, page
    finally:
        sys.path.pop(0)
    assert PAGE.read_text(encoding="utf-8") == page(), "run python scripts/build_configuration_docs.py"


def test_deepspeed_configuration_is_json():
    assert json.loads((ROOT / "configs" / "deepspeed_zero2.json").read_text())["zero_optimization"]["stage"] == 2
