"""Methods that are not of the package: from a file, and from packages that pip has installed in another folder."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arabic_qwen.config import METHOD_CONFIGS, load_config
from arabic_qwen.config.schema import any_schema
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.methods import registry
from arabic_qwen.methods.registry import METHODS, load_plugins
from tests.commands.test_cli import in_process
from tests.preference_runs import logp, mean, ready, reference_logp, write_data

EXAMPLES = Path(__file__).parents[2] / "examples" / "methods"
ROWS = {"dpop": "dpo", "unlikelihood": "dpo", "offset": "kto"}  # each with a method that reads the same rows

PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "methods-of-others"
version = "1.0"

[project.entry-points."arabic_qwen.methods"]
dpop = "of_others.dpop:METHOD"
unlikelihood = "of_others.unlikelihood:METHOD"
offset = "of_others.offset:METHOD"

[tool.setuptools]
packages = ["of_others"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed a package with three methods."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "of_others").mkdir()
    (source / "of_others" / "__init__.py").touch()
    for file in EXAMPLES.glob("*.py"):
        (source / "of_others" / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    (source / "pyproject.toml").write_text(PACKAGE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*pip, str(target), str(source)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def unregistered(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(METHODS, "_registered", dict(METHODS._registered))
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


@pytest.fixture
def installed(site, unregistered, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith("of_others")]:
        del sys.modules[name]


@pytest.fixture
def yaml_file(model_dir, tmp_path):
    def write(method):
        settings = {
            "method": method,
            "model_name": str(model_dir),
            "dataset_path": str(write_data(ROWS[method], tmp_path)),
            "output_dir": str(tmp_path / "run"),
            "torch_dtype": "float32",
            "instruction_template": "chatml",
            "learning_rate": 1e-3,
            "max_steps": 2,
            "logging_steps": 1,
            "lora_dropout": 0.0,
            "validation_split": 0.25,
        }
        path = tmp_path / f"{method}.yaml"
        path.write_text(json.dumps(settings))
        return path

    return write


def test_a_paper_takes_at_most_sixty_lines():
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("method", ROWS)
def test_an_installed_method_is_known_to_every_verb(method, installed, yaml_file, monkeypatch, capsys, tmp_path):
    config = yaml_file(method)
    code, out, err = in_process(monkeypatch, capsys, "train", config)
    assert code == 0, err
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]
    assert "eval_rewards/accuracies" in out
    assert f"trained with {method.upper()}" in (tmp_path / "run/README.md").read_text()

    data = load_config(config).dataset_path
    code, out, err = in_process(monkeypatch, capsys, "data", "check", data, "--method", method)
    assert code == 0, out + err
    code, out, err = in_process(monkeypatch, capsys, "plan", config, "--gpu", "RTX 3060", "--json")
    assert code == 0 and json.loads(out), err
    code, out, err = in_process(monkeypatch, capsys, "init", method)
    assert out.startswith(f"method: {method}\n")
    code, out, err = in_process(monkeypatch, capsys, "data", "layouts")
    assert any(method in line for line in out.splitlines() if line.startswith("  methods"))
    assert method in METHOD_CONFIGS and method in any_schema()["$defs"]


def test_help_names_installed_methods(site, tmp_path):
    command = [sys.executable, "-m", "arabic_qwen", "init", "--help"]
    environment = {"PYTHONPATH": str(site), "PATH": "", "COLUMNS": "200"}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert all(method in shown.stdout for method in ROWS), shown.stdout + shown.stderr


def test_a_file_of_the_users(unregistered, yaml_file, monkeypatch, capsys, tmp_path):
    config = yaml_file("dpop")
    code, _, err = in_process(monkeypatch, capsys, "train", config)
    assert code == 2
    assert f"{config}:1: method: 'dpop' is unknown; choose one of sft, dpo" in err
    assert "--plugin" in err
    plugin = EXAMPLES / "dpop.py"
    code, out, err = in_process(monkeypatch, capsys, "train", config, "--plugin", plugin)
    assert code == 0, err
    assert f"arabic-qwen chat {tmp_path / 'run'} --plugin {plugin}" in out
    code, out, _ = in_process(
        monkeypatch, capsys, "compare", tmp_path / "run", "--plugin", plugin, "--count", 1, "--json"
    )
    assert code == 0 and json.loads(out)


def naive(method, config, model, groups):
    """Loss and rewards by single sequences."""
    policy = [[logp(model, g, c) for c in g.completions] for g in groups]
    sizes = [[int(c.targets.sum()) for c in g.completions] for g in groups]
    if method == "unlikelihood":
        terms = []
        for group, sums, size in zip(groups, policy, sizes, strict=True):
            completion = group.completions[1]
            tokens = [
                completion._replace(targets=completion.targets & (torch.arange(len(completion.ids)).numpy() == i))
                for i in completion.targets.nonzero()[0]
            ]
            unlikely = [-torch.log(1 - torch.exp(logp(model, group, token))) for token in tokens]
            terms.append(-sums[0] / size[0] + config.beta * sum(unlikely) / size[1])
        return mean(terms), [[p / s for p, s in zip(*row, strict=True)] for row in zip(policy, sizes, strict=True)]
    before = [[reference_logp(model, g, c) for c in g.completions] for g in groups]
    rewards = [[config.beta * (p - r) for p, r in zip(*row, strict=True)] for row in zip(policy, before, strict=True)]
    if method == "dpop":
        lost = [max(0.0, -float(r[0]) / config.beta) for r in rewards]
        margins = [r[0] - r[1] - config.beta * config.penalty * x for r, x in zip(rewards, lost, strict=True)]
        return mean(-torch.nn.functional.logsigmoid(m) for m in margins), rewards
    gained = [logp(model, g, g.auxiliary[0]) - reference_logp(model, g, g.auxiliary[0]) for g in groups]
    threshold = config.beta * mean(gained)
    signs = [1 if g.desirable else -1 for g in groups]
    terms = [-torch.nn.functional.logsigmoid(s * (r[0] - threshold)) for s, r in zip(signs, rewards, strict=True)]
    return mean(terms), rewards


@pytest.mark.parametrize("method", ROWS)
def test_loss_and_rewards_are_those_of_single_sequences(method, installed, yaml_file):
    trainer = ready(load_config(yaml_file(method)))
    groups = trainer.dataset["train"].groups[:4]
    engine = trainer.trainer
    loss = engine.training_step(trainer.model, engine._collate([[group] for group in groups])).item()
    sums = {name: float(value) for name, value in engine._sums.items()}
    metrics = engine.objective.metrics.derive(sums, loss)
    model = trainer.model.eval()
    with torch.no_grad():
        expected, rewards = naive(method, trainer.config, model, groups)
    assert loss == pytest.approx(float(expected), abs=2e-5)
    good = [
        r
        for row, g in zip(rewards, groups, strict=True)
        for r, c in zip(row, g.completions, strict=True)
        if c.desirable
    ]
    bad = [
        r
        for row, g in zip(rewards, groups, strict=True)
        for r, c in zip(row, g.completions, strict=True)
        if not c.desirable
    ]
    assert metrics["rewards/chosen"] == pytest.approx(float(mean(good)), abs=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(float(mean(bad)), abs=1e-4)
    assert math.isfinite(metrics["rewards/margins"])


WRONG = {
    "does not exist": (None, "does not exist; give a Python file"),
    "is no Python": ("def (", "line 1: SyntaxError"),
    "fails": ("x = 1\nraise KeyError('beta')", "line 2: KeyError: 'beta'"),
    "registers nothing": ("x = 1", "registers no method; call"),
    "takes a name": (
        "from typing import ClassVar\n"
        "from arabic_qwen.config import DPOConfig\n"
        "from arabic_qwen.methods.registry import Method, register\n"
        "class Mine(DPOConfig):\n    pass\n"
        "register(Method(Mine, rows=('pair',), objective='mine:objective'))\n",
        "line 6: ConfigurationError: method 'dpo' is one of this package; give yours another name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plugins_are_one_error(case, unregistered, tmp_path):
    text, problem = WRONG[case]
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        load_plugins([path])
    assert str(error.value).startswith(f"--plugin: {path}")
    assert problem in str(error.value)


def test_a_broken_package_is_said_only_where_its_method_is_asked_for(site, installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_others.dpop", None)
    assert METHODS["sft"].name == "sft"
    with pytest.raises(ConfigurationError, match="'dpop' of the package methods-of-others cannot be loaded"):
        METHODS["dpop"]
