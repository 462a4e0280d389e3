"""What `arabic-qwen doctor` finds, on this machine and on others."""

import json
import urllib.error

import pytest
import torch
from huggingface_hub import constants

from arabic_qwen.commands import doctor
from arabic_qwen.models import precision
from tests.commands.test_cli import in_process


def find(name):
    return next(finding for finding in doctor.examine() if finding.name == name)


@pytest.fixture
def gpu(monkeypatch):
    """An Ampere GPU of 80 GB with 70 GB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A100")


def test_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "_processor_has_bf16", lambda: False)
    assert "cores, bfloat16 only emulated" in find("processor").text
    assert find("precision").text.endswith("float32")
    assert find("8 bit") == ("missing", "8 bit", "not possible: needs a CUDA device")
    assert "SDPA" in find("attention").text
    assert "takes very long" in doctor.examine()[-1].text


def test_gpu(gpu):
    assert find("gpu 0").text == "A100, 70.0 of 80.0 GB free, compute capability 8.0"
    assert find("precision").text.endswith("bfloat16")
    assert "flash attention" in find("attention").text
    assert doctor.examine()[-1].text.startswith("LoRA up to Qwen2.5-14B, full training up to Qwen2.5-3B")


@pytest.mark.parametrize(
    ("answer", "level", "part"),
    [
        (None, "ok", "can be reached"),
        (urllib.error.HTTPError("", 403, "", None, None), "ok", "can be reached"),
        (urllib.error.URLError("no route"), "missing", "cannot be reached (no route); only"),
        (TimeoutError("timed out"), "missing", "timed out"),
    ],
)
def test_hub(monkeypatch, answer, level, part):
    def urlopen(request, timeout):
        assert timeout < 10
        if answer:
            raise answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    finding = find("model hub")
    assert finding.level == level and part in finding.text


def test_versions_are_those_that_the_package_asks_for(monkeypatch):
    wanted = ["torch>=2.11,<2.14", "transformers>=99", "no-such-package>=1", 'wandb; extra == "wandb"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    assert find("torch").level == "ok"
    assert "is not supported (needs >=99); pip install 'transformers>=99'" in find("transformers").text
    assert find("no-such-package").level == "impossible"
    assert doctor.examine()[-1].level == "impossible"
    assert "arabic-qwen[wandb]" in find("wandb").text or find("wandb").level == "ok"


def test_command(monkeypatch, capsys):
    code, shown, _ = in_process(monkeypatch, capsys, "doctor")
    assert code == 0 and "✓ torch " in shown and shown.splitlines()[-1].startswith("✓ training")
    code, shown, _ = in_process(monkeypatch, capsys, "doctor", "--json")
    assert set(json.loads(shown)[0]) == {"level", "name", "text"}
    broken = [doctor.Finding("impossible", "torch", "not installed")]
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    assert in_process(monkeypatch, capsys, "doctor")[0] == 1
