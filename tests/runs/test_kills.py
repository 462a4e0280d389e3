"""kill -9 at random moments and inside every kind of write: each run goes on and ends as if it had not been."""

import json
import subprocess
import sys

import pytest

from tests.preference_runs import CONFIGS, write_data
from tests.runs.kill_trials import SYSTEM_CALLS

METHODS = ["sft", *sorted(CONFIGS)]


def run_trials(kills, model_dir, sft_file, folder):
    """`kills`: of each method, how many at random moments and how many in writes."""
    data = {method: str(write_data(method, folder)) for method in CONFIGS} | {"sft": str(sft_file)}
    spec = dict(kills=kills, model=str(model_dir), data=data, folder=str(folder))
    command = [sys.executable, "-m", "tests.runs.kill_trials", json.dumps(spec)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_one_of_each_method_and_one_in_each_kind_of_write(model_dir, sft_file, tmp_path):
    kinds = sorted([*SYSTEM_CALLS, "tensors", "write"])
    kills = {"sft": (1, len(kinds))} | {method: (i % 2, 1 - i % 2) for i, method in enumerate(sorted(CONFIGS))}
    reports = run_trials(kills, model_dir, sft_file, tmp_path)
    assert [report["wrong"] for report in reports] == [[]] * len(METHODS)
    assert reports[0]["kinds"] == sorted([*kinds, "time"])


@pytest.mark.slow
def test_forty_of_each_method(model_dir, sft_file, tmp_path):
    reports = run_trials(dict.fromkeys(METHODS, (20, 20)), model_dir, sft_file, tmp_path)
    for report in reports:
        print(report)
    assert [(report["trials"], report["exact"]) for report in reports] == [(40, 40)] * len(METHODS), reports
