"""The command as a user runs it, in a process of its own."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arabic_qwen.commands import cli
from arabic_qwen.config import METHOD_CONFIGS, DPOConfig, SFTConfig, load_config
from arabic_qwen.config.schema import any_schema, method_schema


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

    turns = "ما عاصمة الأردن؟\n/reset\nمرحبا\n/exit\nnever said\n"
    options = ["--max-length", 3, "--system", "أجب بإيجاز.", "--temperature", 0.7]
    arabic_qwen("chat", "checkpoints/sft", *options, cwd=tmp_path, stdin=turns)


def in_process(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["arabic-qwen", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_what_init_prints_trains_as_it_is(model_dir, tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    _, text, _ = in_process(monkeypatch, capsys, "init", method)
    Path("run.yaml").write_text(text, encoding="utf-8")
    config, defaults = load_config("run.yaml"), METHOD_CONFIGS[method](output_dir=f"./checkpoints/{method}")
    assert config.model_dump() == defaults.model_dump()
    sample = {"sft": "sft", "kto": "kto"}.get(method, "dpo")
    overrides = [f"model_name={model_dir}", f"dataset_path=sample:{sample}", "max_steps=1", "validation_split=0.02"]
    code, _, said = in_process(monkeypatch, capsys, "train", "run.yaml", *overrides)
    assert code == 0, said
    assert Path("checkpoints", method, "run_summary.json").is_file()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["init", "dpo"], ["schema"], ["init", "ppo"], ["data", "layouts"]]
)
def test_light_verbs_do_not_load_torch(tmp_path, arguments):
    program = (
        f"import sys; sys.argv = ['arabic-qwen', *{arguments!r}]\n"
        "from arabic_qwen.commands.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stderr.rstrip().endswith("[]")


def test_help_teaches(monkeypatch, capsys):
    _, text, _ = in_process(monkeypatch, capsys, "--help")
    verbs = re.findall(r"^ +arabic-qwen (\w+)", text, re.M)
    assert verbs == ["doctor", "quickstart", "data", "init", "plan", "train", "train", "chat", "compare"]
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        _, text, _ = in_process(monkeypatch, capsys, name, "--help")
        assert f"Example: arabic-qwen {name}" in text


def test_schema_is_of_one_method_or_of_all(monkeypatch, capsys):
    _, text, _ = in_process(monkeypatch, capsys, "schema", "dpo")
    assert json.loads(text) == method_schema("dpo")
    _, text, _ = in_process(monkeypatch, capsys, "schema")
    assert json.loads(text) == any_schema()
    assert in_process(monkeypatch, capsys, "schema", "ppo")[0] == 2


@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_run_that_goes_on(yaml_file, dpo_yaml, tmp_path, monkeypatch, capsys, method):
    command = ["train", f"{method}.yaml", "max_steps=100", "logging_steps=1", "output_dir=run"]
    run = [sys.executable, "-m", "arabic_qwen", *command]
    with subprocess.Popen(run, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while "step 3/" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (step,) = [int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert step >= 3 and f"will go on from run/checkpoint-{step}" in said
    assert not (tmp_path / "run" / "run_summary.json").exists()

    monkeypatch.chdir(tmp_path)
    code, _, said = in_process(monkeypatch, capsys, *command)
    assert code == 0, said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(range(1, 101)) <= set(steps)


def test_ctrl_c_before_a_checkpoint_starts_again(yaml_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupt(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)  # unlike os.kill, it waits until the handler has run
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("arabic_qwen.engine.callbacks.RunLog.on_step_begin", interrupt)
        code, _, said = in_process(monkeypatch, capsys, "train", yaml_file, "max_steps=2")
    assert code == 130 and "will start again" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert in_process(monkeypatch, capsys, "train", yaml_file, "max_steps=2")[0] == 0


@pytest.fixture
def dpo_yaml(model_dir, tmp_path):
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


@pytest.fixture
def dpo_run(dpo_yaml, tmp_path, monkeypatch, capsys):
    """A finished DPO run in `dpo`."""
    monkeypatch.chdir(tmp_path)
    assert in_process(monkeypatch, capsys, "train", "dpo.yaml")[0] == 0
    return tmp_path


def test_compare(dpo_run, monkeypatch, capsys):
    _, shown, _ = in_process(monkeypatch, capsys, "compare", "dpo", "--max-length", 2, "--json")
    rows = json.loads(shown)
    assert [set(row) for row in rows] == [{"prompt", "trained_model_response", "reference_model_response"}] * 2
    (dpo_run / "prompts.txt").write_text("سؤال آخر؟\n\nوهذا؟\n", encoding="utf-8")
    _, shown, _ = in_process(monkeypatch, capsys, "compare", "dpo", "--prompts", "prompts.txt", "--max-length", 2)
    assert "prompt   سؤال آخر؟" in shown and "وهذا؟" in shown


def test_blind_ratings_are_kept_and_gone_on_with(dpo_run, monkeypatch, capsys):
    prompts = ("أولًا", "ثانيًا")
    monkeypatch.setattr(
        "arabic_qwen.commands.compare.compare",
        lambda *_: [{"prompt": p, "trained_model_response": "نعم", "reference_model_response": "لا"} for p in prompts],
    )

    def rate(*answers):
        monkeypatch.setattr("builtins.input", lambda _: given.pop(0))
        given = list(answers)
        return in_process(monkeypatch, capsys, "compare", "dpo", "--blind")[1]

    first = rate("?", "t", "q")
    assert "trained 0 · before 0 · ties 1" in first
    assert "trained_model" not in first and "reference" not in first
    second = rate("a")
    assert "أولًا" not in second and "ties 1" in second
    ratings = [json.loads(line) for line in (dpo_run / "dpo" / "ratings.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in ratings] == list(prompts)
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
