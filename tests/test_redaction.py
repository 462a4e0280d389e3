"""Secrets reach no file, no log and no message."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arabic_qwen.commands import cli
from arabic_qwen.config import DPOConfig, SFTConfig, load_config
from arabic_qwen.engine.arguments import resolve_schedule, training_arguments
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.redaction import RedactedStream, is_secret, redact
from arabic_qwen.runs.report import model_card
from arabic_qwen.runs.run_folder import find_run
from tests.commands.test_cli import write_rows

CANARIES = {
    name: f"canary{number}Kq7vXw2Rz9"
    for number, name in enumerate(
        (
            *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "HF_TOKEN"),
            *("HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"),
        )
    )
}
BY_FORM = {
    "hub token": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "W&B key": "wandb_v1_AbCdEfGhIjKlMnOpQrSt",
    "AWS key": "AKIAABCDEFGHIJKLMNOP",
    "URL": "https://someone:passw0rd@example.com/set.jsonl",
    "URL with a token only": "https://glpat-0123456789@example.com/x",
}


@pytest.fixture
def canaries(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", sorted(CANARIES))
def test_values_of_secret_variables(canaries, name):
    assert is_secret(name)
    assert redact(f"token={CANARIES[name]}!") == "token=***!"


@pytest.mark.parametrize("name", ["HF_HOME", "HF_TOKEN_PATH", "HOME", "MODEL_NAME", "TOKENIZERS_PARALLELISM"])
def test_other_variables(name):
    assert not is_secret(name)


@pytest.mark.parametrize("text", BY_FORM.values(), ids=BY_FORM)
def test_secrets_by_their_form(text):
    redacted = redact(f"'{text}'")
    assert "***" in redacted
    assert not any(part in redacted for part in ("AbCd", "ABCD", "passw0rd", "glpat"))


@pytest.mark.parametrize(
    "text",
    [
        "hf_dataset",
        "https://huggingface.co/Qwen/Qwen2.5-7B",
        "https://example.com/?mail=a@b.com",
        '{"a":"https://example.com","b":"a@b.com"}',
        "اكتب إلى someone@example.com",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


def test_a_secret_that_is_a_part_of_another(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "longersecret")
    monkeypatch.setenv("B_TOKEN", "longersecretstill")
    assert redact("longersecretstill") == "***"


@settings(max_examples=50)
@given(st.text())
def test_streams_write_text_as_it_is(text):
    buffer = io.StringIO(newline="")
    stream = RedactedStream(buffer)
    assert stream.write(text) == len(text)
    stream.writelines([text])
    assert buffer.getvalue() == redact(text) + redact(text)
    assert not stream.isatty()


def test_errors(canaries):
    assert str(DatasetError(f"{CANARIES['HF_TOKEN']}: is missing")) == "***: is missing"
    with pytest.raises(ConfigurationError) as error:
        SFTConfig(learning_rate=CANARIES["HF_TOKEN"])
    assert CANARIES["HF_TOKEN"] not in str(error.value)


def test_secrets_are_not_put_into_settings(canaries, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: sft\nlora_target_modules: ['${HF_TOKEN}']\n")
    with pytest.raises(ConfigurationError, match=r"run\.yaml:2: lora_target_modules: HF_TOKEN is a secret, which no"):
        load_config(path)


@pytest.mark.parametrize("secret", ["env", *sorted(BY_FORM)])
def test_what_is_written_can_be_read_and_is_the_same_run(canaries, tmp_path, secret):
    text = BY_FORM.get(secret, CANARIES["HF_TOKEN"])
    config = SFTConfig(system_prompt=text, run_name=text, dataset_path=[text, {"path": text}], output_dir=str(tmp_path))
    config.to_yaml(tmp_path / "training_config.yaml")
    written = (tmp_path / "training_config.yaml").read_text()
    assert "***" in written and redact(written) == written
    assert load_config(tmp_path / "training_config.yaml").learning_rate == config.learning_rate
    (tmp_path / "run_summary.json").write_text("{}")
    assert find_run(config).finished


def test_model_card(canaries):
    config = DPOConfig(model_name=CANARIES["HF_TOKEN"], dataset_path=BY_FORM["URL"])
    card = model_card(config, {}, {"train": CANARIES["WANDB_API_KEY"]}, [], adapter=True)
    assert "***" in card and "canary" not in card and "passw0rd" not in card


SITE = """
import logging, sys
from arabic_qwen.engine import callbacks
before = callbacks.ProgressDisplay.on_log
def on_log(self, args, *rest, logs=None, **kwargs):
    logging.getLogger("other").warning("%s", sorted(__import__("os").environ.items()))
    before(self, args, *rest, logs=logs, **kwargs)
callbacks.ProgressDisplay.on_log = on_log
from arabic_qwen.commands.cli import main
main()
"""


def test_no_file_and_no_output_of_a_run_has_a_secret(canaries, model_dir, tmp_path, monkeypatch, capsys):
    """Where settings, rows and another library's log have them all."""
    secrets = " ".join(CANARIES.values()) + " " + BY_FORM["hub token"]
    good = [{"instruction": f"س {i}", "response": f"ج {i}"} for i in range(8)]
    rows = [*good, {"instruction": secrets, "response": ""}, {secrets: secrets}]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = SFTConfig(
        model_name=str(model_dir),
        dataset_path="rows.jsonl",
        output_dir="run",
        instruction_template="chatml",
        torch_dtype="float32",
        max_steps=2,
        logging_steps=1,
        max_bad_rows=2,
        run_name=secrets,
        system_prompt=secrets,
        response_template=secrets,
    )
    text = json.dumps(config.model_dump(), ensure_ascii=False)  # as a user would write it: JSON is YAML
    (tmp_path / "run.yaml").write_text(text[:-1] + ', "method": "sft"}', encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-c", SITE, "train", "run.yaml"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    output = run.stdout + run.stderr
    monkeypatch.chdir(tmp_path)
    for name, value in (("learning_rate", secrets), ("model_name", f"https://x:{secrets.split()[0]}@a.b/c")):
        monkeypatch.setattr(sys, "argv", ["arabic-qwen", "train", "run.yaml", f"{name}={value}"])
        with pytest.raises(SystemExit):
            cli.main()
        output += "".join(capsys.readouterr())
    assert output.count("***") > 9
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"training_config.yaml", "README.md", "bad_rows.jsonl", "metrics.jsonl"} <= {path.name for path in written}
    for secret in secrets.split():
        assert secret not in output
        assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_trackers_get_no_secret(canaries):
    config = SFTConfig(run_name=CANARIES["WANDB_API_KEY"], torch_dtype="float32")
    assert training_arguments(config, resolve_schedule(config, has_validation=False)).run_name == "***"
