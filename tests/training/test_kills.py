"""kill -9 at random moments and inside every kind of write: each run goes on and ends as if it had not been."""

import json
import subprocess
import sys

import pytest

from tests.training.kill_trials import SYSTEM_CALLS
from tests.training.preference_runs import CONFIGS, write_data

METHODS = ["sft", *sorted(CONFIGS)]


def run_trials(methods, model_dir, sft_file, folder, random, writes):
    data = {method: str(write_data(method, folder)) for method in CONFIGS} | {"sft": str(sft_file)}
    spec = dict(methods=methods, model=str(model_dir), data=data, folder=str(folder), random=random, writes=writes)
    command = [sys.executable, "-m", "tests.training.kill_trials", json.dumps(spec)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_few_of_each_method_and_one_of_each_kind_of_write(model_dir, sft_file, tmp_path):
    reports = run_trials(METHODS, model_dir, sft_file, tmp_path, random=1, writes=1)
    (tmp_path / "kinds").mkdir()
    reports += run_trials(["sft"], model_dir, sft_file, tmp_path / "kinds", random=0, writes=len(SYSTEM_CALLS) + 2)
    assert [report["wrong"] for report in reports] == [[]] * (len(METHODS) + 1)
    assert reports[-1]["kinds"] == sorted([*SYSTEM_CALLS, "tensors", "write"])


@pytest.mark.slow
def test_forty_of_each_method(model_dir, sft_file, tmp_path):
    reports = run_trials(METHODS, model_dir, sft_file, tmp_path, random=20, writes=20)
    for report in reports:
        print(report)
    assert [(report["trials"], report["exact"]) for report in reports] == [(40, 40)] * len(METHODS), reports
