"""Which precision and quantisation a machine gets."""

import importlib.util

import pytest
import torch

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models import precision
from arabic_qwen.models.precision import check_fp8, compute_dtype, explained_dtype, inherit, quantization, restorable

CUDA, CPU = True, False


@pytest.mark.parametrize(
    ("cuda", "bf16", "values", "expected"),
    [
        (CUDA, True, {}, torch.bfloat16),
        (CUDA, True, {"torch_dtype": "float16"}, torch.float16),
        (CUDA, True, {"torch_dtype": "float32"}, torch.float32),
        (CUDA, True, {"torch_dtype": "float32", "bf16": True}, torch.bfloat16),
        (CUDA, True, {"torch_dtype": "bfloat16", "fp16": True}, torch.float16),
        (CUDA, False, {"fp16": True}, torch.float16),
        (CPU, True, {}, torch.bfloat16),
        (CPU, True, {"torch_dtype": "float32", "bf16": True}, torch.bfloat16),
        (CPU, True, {"torch_dtype": "float32"}, torch.float32),
        (CPU, False, {}, torch.float32),
        (CPU, False, {"torch_dtype": "float32"}, torch.float32),
    ],
)
def test_compute_dtype(machine, cuda, bf16, values, expected):
    machine(cuda, bf16)
    assert compute_dtype(SFTConfig(**values)) is expected


@pytest.mark.parametrize(
    ("cuda", "bf16", "values", "message"),
    [
        (CUDA, False, {"bf16": True}, "^bf16: this GPU has no bfloat16; set fp16"),
        (CPU, False, {"bf16": True}, "^bf16: this processor has no bfloat16; set bf16 to false"),
        (CPU, True, {"fp16": True}, "^fp16: float16 needs a CUDA device"),
        (CPU, True, {"torch_dtype": "float16"}, "^fp16: float16 needs a CUDA device"),
    ],
)
def test_precision_that_the_machine_lacks(machine, cuda, bf16, values, message):
    machine(cuda, bf16)
    with pytest.raises(ConfigurationError, match=message):
        compute_dtype(SFTConfig(**values))


@pytest.mark.parametrize(
    ("cuda", "bf16", "dtype", "reason"),
    [
        (CUDA, True, torch.bfloat16, "torch_dtype auto: bfloat16, for this GPU computes bfloat16 natively"),
        (CUDA, False, torch.float16, "torch_dtype auto: float16, for this GPU does not compute bfloat16 natively"),
        (CPU, True, torch.bfloat16, "torch_dtype auto: bfloat16, for this processor computes bfloat16 natively"),
        (CPU, False, torch.float32, "torch_dtype auto: float32, for this processor does not compute bfloat16 natively"),
    ],
)
def test_auto(machine, cuda, bf16, dtype, reason):
    machine(cuda, bf16)
    assert explained_dtype(SFTConfig(torch_dtype="auto")) == (dtype, reason)


def test_falling_back_to_float32_is_said(machine):
    machine(CPU, False)
    assert explained_dtype(SFTConfig())[1] == "torch_dtype: this processor has no bfloat16; computing in float32"


@pytest.fixture
def bitsandbytes(monkeypatch):
    """Pretend that a version of bitsandbytes is installed, or none."""

    def pretend(version: str | None) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: version)
        monkeypatch.setattr(precision, "version", lambda name: version)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "bf16", "installed", "key", "message"),
    [
        (CPU, True, "0.50.2", "load_in_8bit", "^load_in_8bit: needs a CUDA device; set load_in_4bit instead"),
        (CUDA, False, "0.50.2", "load_in_8bit", "^load_in_8bit: needs a GPU of compute capability 7.5 or newer, this"),
        (CUDA, True, None, "load_in_8bit", r"^load_in_8bit: needs bitsandbytes; pip install 'arabic-qwen\[quantiz"),
        (CPU, True, None, "load_in_4bit", r"^load_in_4bit: needs bitsandbytes; pip install 'arabic-qwen\[quantiz"),
        (CPU, True, "0.41.3", "load_in_4bit", "^load_in_4bit: bitsandbytes 0.41.3 is too old; pip install -U"),
    ],
)
def test_quantisation_that_the_machine_lacks(machine, bitsandbytes, cuda, bf16, installed, key, message):
    machine(cuda, bf16)
    bitsandbytes(installed)
    with pytest.raises(ConfigurationError, match=message):
        quantization(SFTConfig(**{key: True}))


def test_quantisation(machine, bitsandbytes):
    bitsandbytes("0.50.2")
    machine(CUDA, True)
    assert quantization(SFTConfig()) is None
    assert quantization(SFTConfig(load_in_8bit=True)).load_in_8bit
    nf4 = quantization(SFTConfig(load_in_4bit=True))
    assert (nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == ("nf4", True)
    assert nf4.bnb_4bit_compute_dtype is torch.bfloat16
    machine(CPU, False)
    assert quantization(SFTConfig(load_in_4bit=True)).bnb_4bit_compute_dtype is torch.float32


@pytest.mark.parametrize(
    ("capability", "values", "message"),
    [
        (None, {}, "^base_precision: fp8 needs a CUDA device; set it to null"),
        (
            (8, 0),
            {},
            r"^base_precision: fp8 needs a GPU of compute capability 8.9 or newer .*, this one has 8.0; set it",
        ),
        ((9, 0), {"torch_dtype": "float32"}, "^base_precision: fp8 layers give bfloat16; set torch_dtype to bfloat16"),
        ((9, 0), {"fp16": True}, "^base_precision: fp8 layers give bfloat16; set torch_dtype to bfloat16 and fp16 to"),
        ((8, 9), {}, None),
        ((9, 0), {"torch_dtype": "auto"}, None),
        ((10, 0), {"torch_dtype": "float16", "bf16": True}, None),
    ],
)
def test_fp8(machine, monkeypatch, capability, values, message):
    machine(capability is not None, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = SFTConfig(base_precision="fp8", **values)
    if message:
        with pytest.raises(ConfigurationError, match=message):
            check_fp8(config)
    else:
        check_fp8(config)
    config.base_precision = None
    check_fp8(config)


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        ((9, 0), {}, {"torch_dtype": "bfloat16", "base_precision": "fp8"}),
        ((8, 0), {}, {"torch_dtype": "bfloat16"}),
        ((9, 0), {"base_precision": None}, {"torch_dtype": "bfloat16"}),
        ((9, 0), {"torch_dtype": "float32"}, {"torch_dtype": "float32"}),
    ],
)
def test_a_run_in_fp8_is_loaded_in_what_the_machine_has(machine, monkeypatch, capability, given, expected):
    machine(CUDA, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = SFTConfig(**given)
    said = inherit(config, config.model_fields_set, SFTConfig(base_precision="fp8"), quantized=True)
    assert {"torch_dtype": config.torch_dtype, "base_precision": config.base_precision} == {
        "base_precision": None,
        **expected,
    }
    assert bool(said) == (capability < (8, 9) or "torch_dtype" in given)


RUN_IN_4BIT = {"torch_dtype": "auto", "load_in_4bit": True}
RUN_IN_8BIT = {"torch_dtype": "float16", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("cuda", "bf16", "run", "quantized", "expected", "problem"),
    [
        (CPU, True, RUN_IN_4BIT, True, RUN_IN_4BIT, ""),
        (CPU, True, RUN_IN_4BIT, False, {"torch_dtype": "auto"}, ""),
        (CPU, True, RUN_IN_8BIT, True, {"torch_dtype": "auto"}, "fp16: float16 needs a CUDA device"),
        (CUDA, False, RUN_IN_8BIT, True, {"torch_dtype": "float16"}, "load_in_8bit: needs a GPU of compute capability"),
        (CUDA, True, RUN_IN_8BIT, True, RUN_IN_8BIT, ""),
        (CPU, False, {"bf16": True}, True, {"torch_dtype": "auto"}, "bf16: this processor has no bfloat16"),
    ],
)
def test_restoring_what_a_run_computed_in(machine, bitsandbytes, cuda, bf16, run, quantized, expected, problem):
    machine(cuda, bf16)
    bitsandbytes("0.50.2")
    values, said = restorable(SFTConfig(**run), quantized)
    assert {name: value for name, value in values.items() if value} == expected
    assert said.startswith(problem) and bool(said) == bool(problem)


def test_two_precisions_at_once():
    """Refused where it is used, for the documents set one after the other on one configuration."""
    with pytest.raises(ConfigurationError, match="bf16 and fp16 are both true"):
        compute_dtype(SFTConfig(bf16=True, fp16=True))
