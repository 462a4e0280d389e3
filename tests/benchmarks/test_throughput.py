import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from arabic_qwen.errors import TrainingError
from arabic_qwen.models.precision import device_has_bf16
from tests.benchmarks.conftest import BENCHMARKS

ARGUMENTS = {
    "model": "arabic-qwen-tiny",
    "shape": None,
    "data": None,
    "dtype": "float32",
    "set": [],
    "warmup": 1,
    "steps": 1,
    "batch_size": 2,
    "negatives": 3,
    "equal_lengths": False,
    "seconds": 60.0,
    "only": "",
    "json": None,
}


def specification(method, peer, folder, **run):
    plain = {"micro_batch": 2, "checkpointing": False, "padding_free": False, "liger": False}
    file = str(folder / f"{peer}.npy")
    return plain | run | {
        "method": method, "peer": peer, "folder": str(folder), "update_file": file, "args": ARGUMENTS
    }  # fmt: skip


def run_alone(run):
    import one_run

    return next(one_run.run_all([run]))


@pytest.mark.parametrize("method", ["sft", "dpo", "ipo", "kto", "cpo", "simpo"])
def test_ours_and_trl_make_the_same_update(method, tmp_path):
    import throughput

    variants = [{"micro_batch": 1, "checkpointing": True}] if method in ("dpo", "simpo") else [{}]
    if method == "sft":
        variants.append({"padding_free": True})
    ours = run_alone(specification(method, "ours", tmp_path))
    assert ours["seconds"] > 0 and ours["peak_gb"] > 0 and ours["compiled_while_timed"] == 0
    assert ours["mean_loss"] == pytest.approx(sum(ours["losses"]) / 2, abs=1e-5)
    for variant in variants:
        theirs = run_alone(specification(method, "trl", tmp_path, **variant))
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)
        throughput.compare(theirs, ours, {"ours": f"{tmp_path}/ours.npy", "theirs": f"{tmp_path}/trl.npy"})
        assert theirs["update_difference"] < 1e-2 and theirs["loss_difference"] < 1e-3


def test_a_peer_that_is_not_installed_is_said_to_be_so(monkeypatch, tmp_path):
    import throughput

    file = tmp_path / "report.json"
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["throughput.py", "--method", "dpo", "--peers", "trl,unsloth", "--json", str(file)]
    )
    throughput.main()
    assert {run["peer"]: run["failed"] for run in json.loads(file.read_text())["runs"]} == {
        "trl": "not installed",
        "unsloth": "not installed",
    }


def test_padding_free_that_trl_ignores_is_no_variant(monkeypatch, tmp_path):
    import throughput

    names = {
        method: [throughput.variant("trl", tries[0]) for tries in throughput.attempts("trl", method, 8)]
        for method in ("sft", "dpo")
    }
    assert names == {"sft": ["padded, batch 8", "padding-free, batch 8"], "dpo": ["padded, batch 8"]}
    with pytest.raises(AssertionError, match="TRL pads"):
        run_alone(specification("dpo", "trl", tmp_path, padding_free=True))
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: name == "liger_kernel")
    kinds = [throughput.variant("trl", tries[0]) for tries in throughput.attempts("trl", "dpo", 8)]
    assert kinds == ["padded, batch 8", "padded, batch 8, Liger"]
    (tries,) = throughput.attempts("unsloth", "sft", 8)
    names = [throughput.variant("unsloth", run) for run in tries]
    assert names[:3] == ["batch 8", "batch 4", "batch 8, checkpointing"]
    assert all(run["padding_free"] is None for run in tries)  # it chooses


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        TrainingError("out of memory with an example alone (2,048 tokens); lower max_seq_length"),
    ],
)
def test_memory_that_does_not_suffice_is_a_result(monkeypatch, tmp_path, error):
    import one_run

    def train(*args):
        raise error

    monkeypatch.setattr(one_run, "measure", train)
    assert run_alone(specification("sft", "ours", tmp_path)) == {"failed": "out of memory"}


def test_errors_are_not_taken_for_memory(monkeypatch, tmp_path):
    import one_run

    def train(*args):
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(one_run, "measure", train)
    with pytest.raises(TrainingError, match="not finite"):
        run_alone(specification("sft", "ours", tmp_path))


def test_the_peak_is_that_of_the_timed_steps(monkeypatch, tmp_path):
    import one_run

    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(one_run.torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(one_run.torch.cuda, "is_available", lambda: True)
    clock = one_run.Clock(warmup=2)
    clock.on_train_begin(None, None, None)
    for step in range(1, 5):
        clock.on_step_end(None, argparse.Namespace(global_step=step, max_steps=4), None)
    assert calls == ["synchronize", "reset_peak_memory_stats", "synchronize"]


def test_only_some_variants(monkeypatch, tmp_path):
    import throughput

    monkeypatch.setattr(throughput, "in_own_process", lambda runs, seconds: [{"failed": throughput.OUT_OF_MEMORY}])
    only = {"peers": ["trl"], "methods": ["sft"], "micro_batch": 2, "only": "^padded, batch [12]$"}
    report = throughput.Report({}, argparse.Namespace(**ARGUMENTS | only), str(tmp_path))
    throughput.measure_all(report)
    assert [run["variant"] for run in report.runs] == ["padded, batch 2", "padded, batch 1"]


def test_the_smallest_concession_that_fits_is_found(monkeypatch, tmp_path):
    import throughput

    def fits(runs, seconds):
        speed = {"losses": [1.0], "mean_loss": 1.0, "peak_gb": 1.0, "seconds": 4 - runs[0]["padding_free"]}
        return [speed if runs[0]["checkpointing"] else {"failed": throughput.OUT_OF_MEMORY}]

    monkeypatch.setattr(throughput, "in_own_process", fits)
    path = tmp_path / "report.json"
    args = argparse.Namespace(**ARGUMENTS | {"methods": ["sft"], "peers": ["trl"], "micro_batch": 2, "json": str(path)})
    report = throughput.Report({}, args, str(tmp_path))
    throughput.measure_all(report)
    assert [run["variant"] for run in report.runs if "failed" not in run] == [
        "padded, batch 2, checkpointing",
        "padding-free, batch 2, checkpointing",
    ]
    assert len(report.runs) == 6
    best = report.whole()["summary"]["sft"]
    assert best["trl_configuration"] == "padding-free, batch 2, checkpointing"
    assert json.loads(path.read_text()) == report.whole()
    table = throughput.table(report.whole())
    assert table.count("out of memory") == 4 and table.count("\n") == 7


def test_what_makes_a_benchmark_worthless(capsys):
    import throughput

    good = {"method": "sft", "peer": "trl", "update_difference": 0.001}
    assert not throughput.problems([good, {"method": "sft", "peer": "unsloth", "failed": "not installed"}], "float32")
    runs = [good | {"update_difference": float("nan")}, {"method": "dpo", "peer": "ours", "failed": "KeyError: 1"}]
    assert throughput.problems(runs, "float32") == [
        "dpo: KeyError: 1",
        "sft: update of trl differs from ours by nan",
    ]
    fp8 = {"method": "dpo", "peer": "ours-fp8", "loss_difference": 0.25}
    peer = {"method": "dpo", "peer": "trl", "loss_difference": 0.015, "update_difference": 0.3}
    assert throughput.problems([fp8, peer], "bfloat16") == ["dpo: loss of ours-fp8 differs from ours by 0.25"]
    compiled = {"method": "dpo", "peer": "ours", "compiled_while_timed": 2}
    assert throughput.problems([compiled], "bfloat16") == [
        "dpo: ours compiled 2 graphs while it was timed; raise --warmup"
    ]


def test_runs_are_compared_with_ours(monkeypatch, tmp_path):
    import throughput

    given = []

    def measured(runs, seconds):
        peer = runs[0]["peer"]
        given.append((peer, [run["method"] for run in runs], runs[0]["args"]["set"], seconds))
        for run in runs:
            np.save(run["update_file"], np.array([1.0, 0.0]) if peer == "ours" else np.array([1.0, 0.1]))
        losses = [1.1, 5.0] if peer == "ours-fp8" else [1.0, 1.0]
        return [{"losses": losses, "peak_gb": 1.0, "seconds": 1.0} for _ in runs]

    monkeypatch.setattr(throughput, "in_own_process", measured)
    options = {"methods": ["kto", "dpo"], "peers": ["ours", "ours-fp8", "trl"], "micro_batch": 1}
    options["set"] = ["lora_r=8", "use_flash_attention=false"]
    report = throughput.Report({}, argparse.Namespace(**ARGUMENTS | options), str(tmp_path))
    throughput.measure_all(report)
    assert given == [
        ("ours", ["kto", "dpo"], options["set"], 120.0),
        ("ours-fp8", ["kto", "dpo"], [*options["set"], "base_precision=fp8"], 120.0),
        ("trl", ["kto"], ["lora_r=8"], 60.0),
        ("trl", ["dpo"], ["lora_r=8"], 60.0),
    ]
    assert [run["peer"] for run in report.runs] == [*options["peers"], *options["peers"]]
    found = [(run.get("loss_difference"), run.get("update_difference")) for run in report.runs]
    # TRL's KTO is another in micro-batches
    assert found == [(None, None), (0.1, None), (None, None), (None, None), (0.1, None), (0.0, 0.0995)]
    best = report.whole()["summary"]["dpo"]
    assert best["ours_fp8_configuration"] == "packed" and not [key for key in best if "-" in key]


def test_runs_that_fail_or_take_too_long_are_rows(tmp_path, monkeypatch):
    import throughput

    good = specification("dpo", "ours", tmp_path)
    bad = good | {"method": "sft", "args": ARGUMENTS | {"set": ["lora_r=zero"]}}
    done, failed, not_begun = throughput.in_own_process([good, bad, good], 100)
    assert done["seconds"] > 0
    assert "lora_r" in failed["failed"] and failed == not_begun
    assert throughput.in_own_process([good, good], 0.001) == [{"failed": "not done after 0 s"}] * 2
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert throughput.in_own_process([good], 100) == [{"failed": "out of memory"}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_methods_in_one_process_are_as_alone(tmp_path, dtype):
    import one_run

    if dtype == "bfloat16" and not device_has_bf16():
        pytest.skip("needs a device with bfloat16")
    runs = [specification(method, "ours", tmp_path) for method in ("dpo", "sft", "dpo")]
    runs = [run | {"args": ARGUMENTS | {"dtype": dtype}} for run in runs]
    first, other, again = one_run.run_all(runs)
    assert first["losses"] == again["losses"] != other["losses"]
    assert other["losses"] == run_alone(runs[1])["losses"]


def test_all_weights(tmp_path, monkeypatch, capsys):
    import one_run
    import throughput

    whole = {"args": ARGUMENTS | {"set": ["use_lora=false"]}, "update_file": str(tmp_path / "update.npy")}
    run_alone(specification("sft", "ours", tmp_path) | whole)
    loaded = one_run.load(one_run.configured(specification("sft", "ours", tmp_path) | whole)[0])
    assert len(np.load(tmp_path / "update.npy")) == loaded.model.num_parameters()
    for others in (["--methods", "sft", "--peers", "ours,trl"], ["--methods", "sft,dpo", "--peers", "ours"]):
        monkeypatch.setattr(sys, "argv", ["throughput.py", *others, "--set", "use_lora=false"])
        with pytest.raises(SystemExit):
            throughput.arguments()
        assert "--set use_lora=false is for --peers ours and one method" in capsys.readouterr().err


def test_a_model_of_a_shape_trains(monkeypatch, tmp_path):
    import workload

    monkeypatch.setitem(workload.SHAPES, "0.5b", (16, 32, 2, 2, 1, 7000, True))
    model = workload.write_model("0.5b", str(tmp_path))
    assert workload.model_config(model).vocab_size == 7000  # more than the tokenizer has
    run = specification("sft", "ours", tmp_path)
    assert run_alone(run | {"args": ARGUMENTS | {"model": model}})["seconds"] > 0


def test_useful_flops_are_those_of_a_count_by_hand():
    import workload
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )
    group = workload.Group(np.arange(3), (workload.whole(np.arange(5)),))
    # each layer: q, o 8×8; k, v 8×4; gate, up, down 8×16
    weights, adapters = 2 * (2 * 64 + 2 * 32 + 3 * 128), 2 * 4 * (2 * 16 + 2 * 12 + 3 * 24)
    linear, head, attention = weights * 8, 8 * 10 * 5, 2 * 2 * 64 * 8
    training = 4 * (linear + head) + 3 * attention + 6 * adapters * 8
    assert workload.useful_flops("sft", [group], config, rank=4) == training
    assert workload.useful_flops("sft", [group], config, rank=None) == 6 * (linear + head) + 3 * attention
    assert workload.useful_flops("dpo", [group], config, rank=4) == training + 2 * (linear + head) + attention


def test_from_the_command_line(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), "--method", "dpo", "--json", "--warmup", "1"]
    command += ["--steps", "1", "--batch-size", "2", "--peers", "ours,unsloth"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    report = json.loads(shown)
    assert report["ours_tokens_per_s"] == report["runs"][0]["tokens_per_s"] > 0
    assert report["device"] and report["versions"]["torch"] and report["runs"][0]["mfu"] is None
