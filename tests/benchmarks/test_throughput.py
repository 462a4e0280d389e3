import argparse
import json
import subprocess
import sys

import pytest

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
    "only": None,
    "json": None,
}


def specification(method, peer, folder, **run):
    plain = {"micro_batch": 2, "checkpointing": False, "padding_free": False}
    file = str(folder / f"{peer}.npy")
    return plain | run | {
        "method": method, "peer": peer, "folder": str(folder), "update_file": file, "args": ARGUMENTS
    }  # fmt: skip


@pytest.mark.parametrize("method", ["sft", "dpo", "ipo", "kto", "cpo", "simpo"])
def test_ours_and_trl_make_the_same_update(method, tmp_path):
    import one_run
    import throughput

    variants = [{"micro_batch": 1, "checkpointing": True}] if method in ("dpo", "simpo") else [{}]
    if method in ("sft", "dpo"):
        variants.append({"padding_free": True})
    ours = one_run.run(specification(method, "ours", tmp_path))
    assert ours["seconds"] > 0 and ours["peak_gb"] > 0 and ours["compiled_while_timed"] == 0
    for variant in variants:
        theirs = one_run.run(specification(method, "trl", tmp_path, **variant))
        assert theirs["mean_loss"] == pytest.approx(ours["mean_loss"], rel=1e-3)
        throughput.compare(theirs, {"ours": f"{tmp_path}/ours.npy", "theirs": f"{tmp_path}/trl.npy"})
        assert theirs["update_difference"] < 1e-2


def test_the_smallest_concession_that_fits_is_found(monkeypatch, tmp_path):
    import throughput

    def fits(run, seconds):
        speed = {"mean_loss": 1.0, "peak_gb": 1.0, "seconds": 4 - run["padding_free"]}
        return speed if run["checkpointing"] else {"failed": throughput.DOES_NOT_FIT}

    monkeypatch.setattr(throughput, "in_own_process", fits)
    path = tmp_path / "report.json"
    args = argparse.Namespace(**ARGUMENTS | {"methods": ["sft"], "peers": ["trl"], "micro_batch": 2, "json": str(path)})
    report = {"runs": []}
    throughput.measure_all(report, args, str(tmp_path))
    assert [run["variant"] for run in report["runs"] if "failed" not in run] == [
        "padded, batch 2, checkpointing",
        "padding-free, batch 2, checkpointing",
    ]
    assert len(report["runs"]) == 6
    best = throughput.summary(report["runs"])["sft"]
    assert best["trl_configuration"] == "padding-free, batch 2, checkpointing"
    assert json.loads(path.read_text())["runs"] == report["runs"]  # written as it went
    table = throughput.table(report | {"summary": {"sft": best}})
    assert table.count("out of memory") == 4 and table.count("\n") == 7


def test_what_makes_a_benchmark_worthless(capsys):
    import throughput

    good = {"method": "sft", "peer": "trl", "update_difference": 0.001}
    assert not throughput.problems([good, {"method": "sft", "peer": "unsloth", "failed": "not installed"}], "float32")
    runs = [good | {"update_difference": float("nan")}, {"method": "dpo", "peer": "ours", "failed": "KeyError: 1"}]
    assert throughput.problems(runs, "float32") == [
        "dpo: KeyError: 1",
        "sft: updates differ by nan of those of trl",
    ]


def test_a_run_that_fails_or_takes_too_long_is_a_row(tmp_path):
    import throughput

    assert throughput.in_own_process({"folder": str(tmp_path)}, 60) == {"failed": "KeyError: 'peer'"}
    assert throughput.in_own_process({"folder": str(tmp_path)}, 0.001) == {"failed": "not done after 0 s"}


def test_a_model_of_a_shape_trains(monkeypatch, tmp_path):
    import one_run
    import workload

    monkeypatch.setitem(workload.SHAPES, "0.5b", (16, 32, 2, 2, 1, 7000, True))
    model = workload.write_model("0.5b", str(tmp_path))
    assert workload.model_config(model).vocab_size == 7000  # more than the tokenizer has
    run = specification("sft", "ours", tmp_path)
    assert one_run.run(run | {"args": ARGUMENTS | {"model": model}})["seconds"] > 0


def test_useful_flops_are_those_of_a_count_by_hand():
    import numpy as np
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
    assert workload.useful_flops("dpo", [group], config, rank=4) == training + 2 * (linear + head) + attention


def test_from_the_command_line(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), "--method", "dpo", "--json", "--warmup", "1"]
    command += ["--steps", "1", "--batch-size", "2", "--peers", "ours,unsloth"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    report = json.loads(shown)
    assert report["ours_tokens_per_s"] == report["runs"][0]["tokens_per_s"] > 0
    assert report["device"] and report["versions"]["torch"] and report["runs"][0]["mfu"] is None
