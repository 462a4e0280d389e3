"""Payloads that would run code or fill memory, through the command: none fires, each is one clear error."""

import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch

from arabic_qwen.commands import cli
from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.runs.run_folder import begin_run, find_run
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.commands.test_cli import write_rows

ROWS = [{"instruction": f"ما عاصمة البلد {i}؟", "response": f"المدينة {i}."} for i in range(6)]
PAIRS = [{"prompt": f"ما عاصمة البلد {i}؟", "chosen": f"المدينة {i}.", "rejected": "لا."} for i in range(6)]


class Payload:
    """Makes the file `marker` when it is unpickled."""

    def __reduce__(self):
        return open, ("marker", "w")


CODE = "open('marker', 'w')\n"


def edit(file: Path, **values):
    there = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**there, **values}))


@pytest.fixture
def folder(model_dir, tmp_path, monkeypatch):
    """A working folder with a model, data and settings, in which no payload may have run at the end."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "model")
    shutil.copytree(model_dir, "other")
    Path("model", "own.py").write_text(CODE)
    write_rows(Path("sft.jsonl"), ROWS)
    write_rows(Path("dpo.jsonl"), PAIRS)
    for config in (SFTConfig, DPOConfig):
        values = {"dataset_path": f"{config.method}.jsonl", "output_dir": "run", "max_steps": 2, "save_steps": 1}
        chatml = {"instruction_template": "chatml", "torch_dtype": "float32", "eval_steps": 1}
        config(model_name="./model", **values, **chatml).to_yaml(f"{config.method}.yaml")
    yield tmp_path
    assert not Path("marker").exists(), "a payload was run"


def train(monkeypatch, capsys, *arguments):
    """Exit code of `arabic-qwen train` in this process, and what it says on standard error."""
    monkeypatch.setattr(sys, "argv", ["arabic-qwen", "train", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    return code, " ".join(capsys.readouterr().err.split())


def pickled_model(name="model"):
    Path(name, "model.safetensors").unlink()
    torch.save({"a": Payload()}, Path(name, "pytorch_model.bin"))


def pickled_adapter():
    Path("other", "model.safetensors").unlink()
    Path("other", "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "./model"}')
    torch.save({"a": Payload()}, Path("other", "adapter_model.bin"))


def template(text):
    def plant():
        Path("model", "chat_template.jinja").write_text(text)
        Path("own.jinja").write_text(text)

    return plant


def own_code(file, **values):
    return lambda: edit(Path("model", file), **values)


def settings(text):
    return lambda: Path("sft.yaml").write_text(text)


def loading_script():
    Path("set").mkdir()
    Path("set", "set.py").write_text(CODE)


def saved_elsewhere():
    datasets.Dataset.from_list(ROWS).save_to_disk("set")
    edit(Path("set", "state.json"), _data_files=[{"filename": "../elsewhere.arrow"}])


ESCAPE = "{{ raise_exception.__globals__['__builtins__']['open']('marker', 'w') }}"
BOMB = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}a" + "{% endfor %}" * 3
SFT, DPO, OWN = ("sft.yaml",), ("dpo.yaml", "ref_model_name=./other"), ("sft.yaml", "instruction_template=own.jinja")
TEMPLATE, SET = ("sft.yaml", "instruction_template=tokenizer"), ("sft.yaml", "dataset_path=set")
PLANTED = {
    "adapter": (pickled_adapter, ("sft.yaml", "model_name=./other"), 1, "pickled (adapter_model.bin)"),
    "attention": (own_code("config.json", _attn_implementation="a/kernel"), SFT, 1, "config.json: _attn_implementation"),
    "configuration": (own_code("config.json", auto_map={"AutoConfig": "own.Own"}), SFT, 1, "config.json: auto_map"),
    "generation": (own_code("generation_config.json", custom_generate="."), SFT, 1, "generation_config.json: custom"),
    "loading script": (loading_script, SET, 2, "set: holds no data files"),
    "reference": (lambda: pickled_model("other"), DPO, 1, "other: its weights are pickled (pytorch_model.bin)"),
    "saved set": (saved_elsewhere, SET, 2, "state.json names '../elsewhere.arrow'"),
    "template": (template(ESCAPE), TEMPLATE, 1, "the chat template does what no prompt format needs"),
    "template bomb": (template(BOMB), TEMPLATE, 1, "it makes more than 16,777,216 characters"),
    "template of one's own": (template(ESCAPE), OWN, 2, "instruction_template: own.jinja: the chat template does"),
    "template bomb of one's own": (template(BOMB), OWN, 2, "own.jinja: the chat template does what no prompt format"),
    "tokenizer": (own_code("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}), SFT, 1, "auto_map"),
    "tokenizer class": (own_code("tokenizer_config.json", tokenizer_class="own.Own"), SFT, 1, "tokenizer_class"),
    "weights": (pickled_model, SFT, 1, "its weights are pickled (pytorch_model.bin)"),
    "yaml": (settings("a: !!python/object/apply:os.system ['touch marker']"), SFT, 2, "sft.yaml:1: not valid YAML"),
    "yaml bomb": (settings("a: &a [1]\nb: [*a, *a]"), SFT, 2, "sft.yaml:2: not valid YAML (aliases are not read)"),
}  # fmt: skip


@pytest.mark.parametrize(("plant", "arguments", "expected", "reason"), PLANTED.values(), ids=PLANTED)
def test_no_payload_is_run(folder, monkeypatch, capsys, plant, arguments, expected, reason):
    plant()
    code, said = train(monkeypatch, capsys, *arguments)
    assert code == expected, said
    assert "error: " in said and reason in said
    assert "Traceback" not in said
    assert not Path("run").exists()


def test_payloads_in_a_checkpoint(folder, monkeypatch, capsys):
    """Pickles take the place of every state that a checkpoint may have."""
    assert train(monkeypatch, capsys, "sft.yaml")[0] == 0
    Path("run", "run_summary.json").unlink()  # as if it had been stopped
    for checkpoint in Path("run").glob("checkpoint-*"):
        kinds = {"optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"}
        for name in kinds | {path.name for path in checkpoint.glob("*") if path.suffix in (".pt", ".pth", ".bin")}:
            (checkpoint / name).write_bytes(pickle.dumps(Payload()))
        (checkpoint / "adapter_model.safetensors").unlink()
    with contextlib.suppress(Exception):
        train(monkeypatch, capsys, "sft.yaml")


def test_a_payload_in_a_folder_that_is_loaded_to_generate(folder):
    pickled_model()
    with pytest.raises(Exception, match="its weights are pickled"):
        BaseTrainer(SFTConfig(model_name="./other")).load_model("./model")


def test_discarding_a_run_deletes_nothing_outside_it(folder):
    outside = Path("outside")
    outside.mkdir()
    for path in (
        outside / "kept.txt",
        Path("run", "checkpoint-2", "state"),
        Path("run", "checkpoint-notes", "kept.txt"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    Path("run", "checkpoint-1").symlink_to(outside.absolute())
    Path("run", "metrics.jsonl").symlink_to((outside / "kept.txt").absolute())
    config = SFTConfig(model_name="./model", output_dir="run", overwrite_output_dir=True)
    with begin_run(find_run(config), config, {}):
        pass
    assert (outside / "kept.txt").read_text() == "a"
    left = {path.name for path in Path("run").iterdir() if not path.name.startswith(".")}
    assert left == {"checkpoint-1", "checkpoint-notes", "training_config.yaml"}  # a link is no checkpoint
