"""What a user gets wrong, and what the command says: one clear error, the right exit code, nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arabic_qwen.commands import cli
from arabic_qwen.config import METHOD_CONFIGS
from tests.commands.test_cli import write_rows

SFT = {"instruction": "ما عاصمة الأردن؟", "response": "عمّان."}
PAIR = {"prompt": "ما عاصمة الأردن؟", "chosen": "عمّان.", "rejected": "لا أدري."}
FEEDBACK = {"prompt": "ما عاصمة الأردن؟", "completion": "عمّان.", "label": True}
#: For commands that are run as processes of their own: this package, wherever they run.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
ROWS = {"sft": SFT, "kto": FEEDBACK}  # the other methods learn from pairs


def row_for(method):
    return ROWS.get(method, PAIR)


def numbered(row, count=6):
    key, text = next(iter(row.items()))
    return [{**row, key: f"{text} {i}"} for i in range(count)]


@pytest.fixture
def folder(model_dir, tmp_path, monkeypatch):
    """A working folder with a configuration and good data of each method."""
    monkeypatch.chdir(tmp_path)
    for method, config in METHOD_CONFIGS.items():
        write_rows(tmp_path / f"{method}.jsonl", numbered(row_for(method)))
        values = {
            "model_name": str(model_dir),
            "dataset_path": f"{method}.jsonl",
            "output_dir": "run",
            "instruction_template": "chatml",
            "torch_dtype": "float32",
            "max_steps": 1,
        }
        config(**values).to_yaml(tmp_path / f"{method}.yaml")
    return tmp_path


def command(arguments, monkeypatch, capsys):
    """Exit code and standard error of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["arabic-qwen", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, " ".join(capsys.readouterr().err.split())


def check(code, said, expected_code, parts, folder):
    assert code == expected_code, said
    assert "Traceback" not in said
    for part in parts:
        assert part in said
    assert not [path for path in folder.rglob("*") if path.name in ("run_summary.json", "training_config.yaml")]


# ---------------------------------------------------------------- the command itself, and overrides

USAGE = {
    "no such verb": ("trian sft.yaml", 2, ["trian", "train"]),
    "no such option": ("train sft.yaml --fast", 2, ["--fast"]),
    "no configuration given": ("train", 2, ["Missing argument 'config'"]),
    "init of an unknown method": ("init ppo", 2, ["ppo", "choose one of sft", "dpo"]),
    "no such file": ("train missing.yaml", 2, ["missing.yaml", "cannot be read", "give the path"]),
    "a folder for a file": ("train .", 2, [".: cannot be read", "give the path"]),
    "data for a configuration": ("train sft.jsonl", 2, ["sft.jsonl", "not valid YAML"]),
    "override without =": ("train sft.yaml learning_rate", 2, ["learning_rate: ", "key=value"]),
    "override of an unknown key": (
        "train sft.yaml lerning_rate=1",
        2,
        ["override lerning_rate=1", "did you mean 'learning_rate'?"],
    ),
    "override with a bad value": (
        "train sft.yaml learning_rate=fast",
        2,
        ["override learning_rate=fast: learning_rate: ", "number"],
    ),
    "override that is no YAML": ("train sft.yaml system_prompt=[a", 2, ["override system_prompt=[a", "not valid YAML"]),
    "a flag for an override": ("train sft.yaml --learning_rate=1", 2, ["--learning_rate"]),
    "chat with nothing there": ("chat no/model", 1, ["no/model", "HF_HUB_OFFLINE is set", "hf download"]),
    "chat with a missing folder": ("chat ./none", 1, ["./none", "does not exist"]),
    "compare no run": ("compare no/model", 2, ["no/model", "output folder"]),
    "compare blind and json": ("compare run --blind --json", 2, ["--json", "--blind"]),
    "a length of nothing": ("chat run --max-length 0", 2, ["--max-length"]),
}


@pytest.mark.parametrize(("arguments", "code", "parts"), USAGE.values(), ids=USAGE)
def test_usage(folder, monkeypatch, capsys, arguments, code, parts):
    check(*command(arguments.split(), monkeypatch, capsys), code, parts, folder)


# ---------------------------------------------------------------- the configuration file

FILES = {
    "binary": (b"\xff\xfe\x00", ["sft.yaml", "is not UTF-8"]),
    "tabs": ("method: sft\n\tlora_r: 4\n", ["sft.yaml:2", "not valid YAML", "indentation"]),
    "a list": ("- method: sft\n", ["sft.yaml", "must hold `key: value` lines", "list"]),
    "no method": ("lora_r: 4\n", ["sft.yaml", "method: is missing", "one of sft"]),
    "unknown method": ("# mine\nmethod: ppo\n", ["sft.yaml:2: method: 'ppo' is unknown", "choose one of sft"]),
    "a key twice": ("method: sft\nseed: 1\nseed: 2\n", ["sft.yaml:3", "seed: is there twice"]),
    "unknown key": ("method: sft\nlora_rank: 4\n", ["sft.yaml:2: lora_rank: unknown key", "lora_r"]),
    "key of another method": ("method: sft\nbeta: 0.1\n", ["sft.yaml:2: beta: unknown key of SFTConfig"]),
    "text for a number": ("method: sft\nlora_r: many\n", ["sft.yaml:2: lora_r: ", "integer", "'many'"]),
    "out of range": ("method: sft\nvalidation_split: 1.5\n", ["sft.yaml:2: validation_split: ", "less than 1", "1.5"]),
    "not one of the choices": (
        "method: sft\ntorch_dtype: fp8\n",
        ["sft.yaml:2: torch_dtype: ", "'bfloat16'", "'fp8'"],
    ),
    "unknown schedule": (
        "method: sft\nlr_scheduler_type: sideways\n",
        ["sft.yaml:2: lr_scheduler_type: ", "'cosine'", "'sideways'"],
    ),
    "4 and 8 bit": ("method: sft\nload_in_4bit: true\nload_in_8bit: true\n", ["sft.yaml: load_in_4bit and", "set one"]),
    "unset variable": ("method: sft\nmodel_name: ${AQ_NO_SUCH}\n", ["sft.yaml:2: model_name: ", "AQ_NO_SUCH", ":-"]),
    "callbacks": ("method: sft\ncallbacks: [Mine]\n", ["sft.yaml:2: callbacks: ", "in Python"]),
}


@pytest.mark.parametrize(("content", "parts"), FILES.values(), ids=FILES)
def test_configuration_file(folder, monkeypatch, capsys, content, parts):
    (folder / "sft.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    check(*command(["train", "sft.yaml"], monkeypatch, capsys), 2, parts, folder)


# ---------------------------------------------------------------- values that model, tokenizer or machine refuse

VALUES = {
    "exo_pair without smoothing": ("dpo loss_type=exo_pair", 2, ["loss_type 'exo_pair'", "label_smoothing", "above 0"]),
    "smoothing of sppo": ("dpo loss_type=sppo_hard label_smoothing=0.1", 2, ["sppo_hard", "set label_smoothing to 0"]),
    "softmax with simpo": ("cpo negatives=softmax loss_type=simpo", 2, ["negatives 'softmax'", "set negatives"]),
    "no such model": ("sft model_name=no/model", 1, ["no/model", "was not downloaded", "unset it"]),
    "model in a missing folder": ("sft model_name=./none", 1, ["./none", "does not exist"]),
    "data for a model": ("sft model_name=sft.jsonl", 1, ["sft.jsonl", "is a file", "give the folder"]),
    "no such reference model": ("dpo ref_model_name=no/model", 1, ["no/model", "was not downloaded"]),
    "no such layer": ("sft lora_target_modules=[q_porj]", 2, ["lora_target_modules", "q_porj", "q_proj"]),
    "template that the tokenizer lacks": (
        "sft instruction_template=tokenizer",
        2,
        ["instruction_template: 'tokenizer'", "use chatml or alpaca"],
    ),
    "no room for the answer": ("sft max_seq_length=8", 2, ["sft.jsonl:1", "max_seq_length=8", "6 bad rows"]),
    "no room for the prompt": ("dpo max_prompt_length=1", 2, ["dpo.jsonl:1", "max_prompt_length=1"]),
    "a model without name": ("sft model_name=''", 2, ["override model_name=''", "must not be empty"]),
    "a path that is none": ('sft output_dir="a\\0b"', 2, ["output_dir: holds a NUL character"]),
    "a name that is too long": (f"sft output_dir={'x' * 300}", 2, ["output_dir: ", "cannot be written", "choose"]),
    "no layers": ("sft lora_target_modules=[]", 2, ["lora_target_modules: ", "at least 1 item"]),
    "a seed beyond numpy's": ("sft seed=4294967296", 2, ["seed: ", "less than or equal to 4294967295"]),
    "a backend for one process": ("sft ddp_backend=nccl", 2, ["ddp_backend: 'nccl'", "torchrun", "set it to null"]),
    "unmeasured metric": ("sft metric_for_best_model=bleu", 2, ["metric_for_best_model: 'bleu'", "eval_loss"]),
    "unknown report": ("sft report_to=nowhere", 2, ["report_to: 'nowhere' is unknown", "choose from none"]),
    "no deepspeed file": ("sft deepspeed=none.json", 2, ["deepspeed: none.json", "give a DeepSpeed JSON"]),
    "no such checkpoint": (
        "sft resume_from_checkpoint=run/checkpoint-9",
        2,
        ["run/checkpoint-9 does not exist", "auto"],
    ),
    "output is a file": ("sft output_dir=sft.yaml", 2, ["output_dir: sft.yaml", "is a file", "choose another"]),
    "unknown profile": ("sft normalize=compare", 2, ["normalize: must be train or false", "'compare'"]),
    "unknown setting of diacritics": ("sft diacritics=remove", 2, ["diacritics: must be keep, strip or partial"]),
    "unknown setting of a column": (
        'sft diacritics={"response":"no"}',
        2,
        ["diacritics: must be keep, strip or partial"],
    ),
    "a column that no row has": (
        'sft diacritics={"output":"strip"}',
        2,
        ["diacritics: no row has output; the columns that training reads of them are instruction, response"],
    ),
    "negative samples": ("sft eval_samples=-1", 2, ["eval_samples: ", "greater than or equal to 0"]),
    "no such classifier, before the model is loaded": (
        "sft dialect_model=none.safetensors model_name=nowhere",
        2,
        ["dialect_model: none.safetensors: cannot be read", "fit-dialects"],
    ),
    "everything held out": ("sft validation_split=0.99", 2, ["validation_split", "leaves none to train on"]),
}


@pytest.mark.parametrize(("changes", "code", "parts"), VALUES.values(), ids=VALUES)
def test_values(folder, monkeypatch, capsys, changes, code, parts):
    method, *overrides = changes.split()
    check(*command(["train", f"{method}.yaml", *overrides], monkeypatch, capsys), code, parts, folder)


NO_GPU = {
    "8 bit": ("load_in_8bit=true", ["load_in_8bit", "CUDA", "set load_in_4bit instead, or neither"]),
    "float16": ("fp16=true", ["fp16", "CUDA", "torch_dtype to float32"]),
    "fp8": ("base_precision=fp8", ["base_precision", "CUDA", "set it to null"]),
    "8-bit optimizer": ("optim=adamw_8bit", ["optim", "CUDA", "set it to adamw"]),
    "compiled": ("torch_compile=true", ["torch_compile", "needs a GPU", "set it to auto or false"]),
}


@pytest.mark.parametrize(("override", "parts"), NO_GPU.values(), ids=NO_GPU)
def test_machine_without_gpu(folder, monkeypatch, capsys, override, parts):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    unread = "model_name=nowhere"  # it is refused before anything is loaded
    check(*command(["train", "sft.yaml", override, unread], monkeypatch, capsys), 2, parts, folder)


# ---------------------------------------------------------------- data

DATA = {
    "no such file": (None, ["none.jsonl", "cannot be read", "check its name"]),
    "empty": (b"", ["data.jsonl", "holds no rows"]),
    "only blank lines": (b"\n \n", ["data.jsonl", "holds no rows"]),
    "not JSON": (b'{"instruction": "a", "response": "b"}\nhello\n', ["data.jsonl:2", "not valid JSON", "1 bad row"]),
    "not UTF-8": ('{"instruction": "مرحبا"}'.encode("cp1256"), ["data.jsonl:1", "is not UTF-8"]),
    "a list": (b"[1, 2]\n", ["data.jsonl:1", "must be a JSON object", "list"]),
    "JSON in several lines": (b'{\n"instruction": "a"\n}\n', ["data.jsonl:1", "one JSON object a line"]),
}


@pytest.mark.parametrize(("content", "parts"), DATA.values(), ids=DATA)
def test_data_file(folder, monkeypatch, capsys, content, parts):
    if content is not None:
        (folder / "data.jsonl").write_bytes(content)
    name = "none.jsonl" if content is None else "data.jsonl"
    check(*command(["train", "sft.yaml", f"dataset_path={name}"], monkeypatch, capsys), 2, parts, folder)


TURN = {"role": "user", "content": "سؤال"}
BAD_ROWS = {
    "sft: columns of another layout": (
        "sft",
        {"question": "a"},
        ["has the columns question", "instruction + response"],
    ),
    "sft: empty answer": ("sft", {**SFT, "response": " "}, ["response: is empty"]),
    "sft: a number for text": ("sft", {**SFT, "response": 5}, ["response: must be text, found int"]),
    "sft: no answer at the end": ("sft", {"messages": [TURN]}, ["does not end with an answer"]),
    "sft: two users": ("sft", {"messages": [TURN, TURN, {"role": "assistant", "content": "ج"}]}, ["must alternate"]),
    "sft: unknown role": ("sft", {"messages": [{"role": "teacher", "content": "a"}]}, ["'teacher' is no role", "use"]),
    "sft: control token": ("sft", {**SFT, "response": "a<|im_end|>b"}, ["control token <|im_end|>", "remove it"]),
    "sft: a placeholder": (
        "sft",
        {**SFT, "response": "[إجابة]"},
        ["response: is a placeholder ([إجابة])", "write the answer"],
    ),
    "sft: swapped roles": (
        "sft",
        {"messages": [{"role": "assistant", "content": "ج"}, TURN]},
        ["the roles are swapped"],
    ),
    "sft: broken list in a text": (
        "sft",
        {"messages": "[{'role': 'user', 'content': 'it's"},
        ["messages: is a list of messages stored as text, which is broken", "store a list"],
    ),
    "sft: half a letter": ("sft", {**SFT, "response": "\ud800"}, ["response: ", "surrogate"]),
    "dpo: rows of sft": ("dpo", SFT, ["such a row is a conversation, for method sft"]),
    "dpo: rows of kto": (
        "dpo",
        {"prompt": "a", "completion": "b", "label": True},
        ["such a row is a labelled answer, for method kto"],
    ),
    "sft: rows of dpo": ("sft", PAIR, ["such a row is a preference, for method dpo"]),
    "sft: other names": ("sft", {"q": "a", "a": "b"}, ["has the columns q, a", "name yours in column_map"]),
    "dpo: no rejected": ("dpo", {"prompt": "a", "chosen": "b"}, ["has the columns prompt, chosen", "rejected"]),
    "dpo: equal answers": ("dpo", {**PAIR, "rejected": PAIR["chosen"]}, ["chosen and rejected are the same"]),
    "dpo: several rejected": ("dpo", {**PAIR, "rejected": ["a", "b"]}, ["rejected: only CPO", "method cpo"]),
    "dpo: no prompt": ("dpo", {"chosen": "a", "rejected": "b"}, ["prompt: is missing"]),
    "ipo: one length": ("ipo", {**PAIR, "chosen_length": 4}, ["rejected_length: None", "give both lengths"]),
    "ipo: negative length": ("ipo", {**PAIR, "chosen_length": -1, "rejected_length": 2}, ["chosen_length: -1"]),
    "kto: no label": ("kto", {"prompt": "a", "completion": "b"}, ["has the columns", "label"]),
    "kto: unknown label": ("kto", {**FEEDBACK, "label": "good"}, ["label: 'good' is no label", "true or false"]),
    "kto: pairs": ("kto", PAIR, ["is a pair", "set unpair_preferences to true"]),
    "cpo: negatives that are no list": (
        "cpo",
        {**PAIR, "hard_negatives": 3},
        ["hard_negatives: must be a text or a list"],
    ),
    "cpo: an empty negative": ("cpo", {**PAIR, "rejected": ["", "x"]}, ["negative 1: is empty"]),
    "simpo: no chosen": ("simpo", {"prompt": "a", "rejected": "b"}, ["has the columns prompt, rejected", "chosen"]),
    "orpo: rejected is a number": ("orpo", {**PAIR, "rejected": 3}, ["rejected: must be text, found int"]),
}


@pytest.mark.parametrize(("method", "row", "parts"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows(folder, monkeypatch, capsys, method, row, parts):
    text = "".join(json.dumps(values) + "\n" for values in [*numbered(row_for(method)), row])
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    arguments = ["train", f"{method}.yaml", "dataset_path=data.jsonl"]
    check(*command(arguments, monkeypatch, capsys), 2, ["data.jsonl:7: ", *parts, "1 bad row"], folder)


def test_kto_needs_two_prompts(folder, monkeypatch, capsys):
    write_rows(folder / "kto.jsonl", [FEEDBACK] * 4)
    check(
        *command(["train", "kto.yaml", "validation_split=0"], monkeypatch, capsys),
        2,
        ["kto.jsonl", "have the same prompt", "add rows"],
        folder,
    )


# ---------------------------------------------------------------- broken model folders

BROKEN_MODELS = {
    "empty folder": (
        lambda path: [file.unlink() for file in path.iterdir()],
        ["broken", "has no config.json", "give the folder"],
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        ["broken", "model.safetensors is missing", "again"],
    ),
    "half the weights": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:500]),
        ["broken", "is cut short or damaged", "again"],
    ),
    "no tokenizer": (
        lambda path: [(path / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ["broken: has no tokenizer", "tokenizer.json"],
    ),
    "configuration that is no JSON": (lambda path: (path / "config.json").write_text("{"), ["broken", "cannot be"]),
    "another architecture": (
        lambda path: (path / "config.json").write_text('{"model_type": "nothing"}'),
        ["broken", "model_type 'nothing'", "choose a dense"],
    ),
}


@pytest.mark.parametrize(("break_it", "parts"), BROKEN_MODELS.values(), ids=BROKEN_MODELS)
def test_broken_model_folder(folder, model_dir, monkeypatch, capsys, break_it, parts):
    (folder / "broken").mkdir()
    for file in model_dir.iterdir():
        (folder / "broken" / file.name).write_bytes(file.read_bytes())
    break_it(folder / "broken")
    check(*command(["train", "sft.yaml", "model_name=./broken"], monkeypatch, capsys), 1, parts, folder)


def test_missing_package(folder):
    program = "import sys; sys.modules['peft'] = None; from arabic_qwen.commands.cli import main; main()"
    run = [sys.executable, "-c", program, "train", "sft.yaml"]
    result = subprocess.run(run, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    check(result.returncode, result.stderr, 1, ["error: the package peft is missing; pip install"], folder)


# ---------------------------------------------------------------- as a process of its own

PROCESSES = {
    "usage": (["train"], 2, ["Missing argument 'config'"]),
    "configuration": (["train", "sft.yaml", "learning_rate=fast"], 2, ["error: override learning_rate=fast"]),
    "data": (["train", "sft.yaml", "dataset_path=none.jsonl"], 2, ["error: none.jsonl: cannot be read"]),
    "model": (["train", "sft.yaml", "model_name=./none"], 1, ["error: ./none: the folder does not exist"]),
}


@pytest.mark.parametrize(("arguments", "code", "parts"), PROCESSES.values(), ids=PROCESSES)
def test_process(folder, arguments, code, parts):
    run = [sys.executable, "-m", "arabic_qwen", *arguments]
    result = subprocess.run(run, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    check(result.returncode, result.stderr, code, parts, folder)
