"""Compiled passes against ordinary ones, with a backend that generates no code: what is tested is the traced graph."""

import functools
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models import attention, compilation, scoring
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.compilation import compile_packed, should_compile
from arabic_qwen.models.kernels.fp8 import FP8Linear, convert_to_fp8
from arabic_qwen.models.scoring import enable_packed_forward
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.group import Completion, Group
from tests.models.test_scoring import with_lora


def dense(query, key, value, packed, scaling):
    """What variable-length flash attention computes, of the tensors that it is given only."""
    q_stop, k_stop = packed.cu_seqlens_q[1:], packed.cu_seqlens_k[1:]
    q_at, k_at = torch.arange(len(query)), torch.arange(len(key))
    q_segment, k_segment = torch.searchsorted(q_stop, q_at, right=True), torch.searchsorted(k_stop, k_at, right=True)
    causal = (k_stop[k_segment] - k_at)[None] >= (q_stop[q_segment] - q_at)[:, None]  # from the segment's end
    mask = (q_segment[:, None] == k_segment[None]) & causal
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)[0].transpose(0, 1)


@pytest.fixture
def counter(monkeypatch):
    """Lets a processor take the way of a GPU; counts the graphs that are compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(attention, "_varlen", dense)
    monkeypatch.setattr(scoring, "flash_runs", lambda device, dtype: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    compilation._compiled.cache_clear()
    yield counter
    compilation._compiled.cache_clear()


def batches(count, completions):
    rng = np.random.default_rng(0)

    def completion():
        ids = rng.integers(0, 400, rng.integers(1, 60), dtype=np.int32)
        return Completion(ids, np.ones(len(ids), dtype=bool))

    def group():
        prompt = rng.integers(0, 400, rng.integers(1, 60), dtype=np.int32)
        return Group(prompt, tuple(completion() for _ in range(completions)))

    return [pack([group() for _ in range(rng.integers(2, 5))]) for _ in range(count)]


def skip_without_fp8():
    layer = FP8Linear(torch.nn.Linear(16, 16).bfloat16(), trainable=False)
    try:
        layer(torch.ones(16, 16, dtype=torch.bfloat16))
    except (RuntimeError, NotImplementedError):
        pytest.skip("this processor has no fp8 product")


def results(model, batch):
    model.zero_grad()
    found = model(packed=batch)
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "kind, training",
    [
        ("qwen2", "lora"),
        ("qwen3", "lora, recomputed"),
        ("qwen2", "full"),
        pytest.param("qwen2", "lora, fp8", marks=pytest.mark.slow),  # test_gpu.py has it on CUDA
    ],
)
def test_equal_to_the_ordinary_pass_and_no_shape_is_compiled_again(tiny_model, counter, kind, training):
    model = tiny_model(kind)
    enable_packed_forward(model)
    model = model if training == "full" else with_lora(model)
    if "fp8" in training:
        skip_without_fp8()
        convert_to_fp8(model.bfloat16(), trainable=True)
    if "recomputed" in training:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    given = [*batches(3, completions=2), *batches(3, completions=1)]
    expected = [results(model, batch) for batch in given]
    compile_packed(model)
    graphs = []
    for batch, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(results(model, batch), wanted, rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs[2] == graphs[1] and graphs[5] == graphs[4]  # the first two of a kind may show what varies
    assert graphs[-1] <= 6  # three of the layers, three of the last one


def test_the_reference_and_generation_are_not_touched(tiny_model, counter):
    model = tiny_model("qwen2")
    enable_packed_forward(model)
    model = with_lora(model).eval()
    batch = batches(1, completions=2)[0]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        reference = model(packed=batch)
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    compile_packed(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(packed=batch), reference, rtol=1e-5, atol=1e-5)
    graphs = counter.frame_count
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    "setting, tokens, expected",
    [("auto", 1e20, True), ("auto", 1e3, False), (True, 1e3, True), (False, 1e20, False)],
)
def test_short_runs_do_not_pay(tiny_model, counter, monkeypatch, setting, tokens, expected):
    monkeypatch.setattr(compilation, "flash_runs", lambda device, dtype: True)
    assert should_compile(SFTConfig(torch_compile=setting), tiny_model("qwen2"), tokens) is expected


def test_what_is_compiled_by_the_model(tiny_model, counter, monkeypatch):
    monkeypatch.setattr(compilation, "flash_runs", lambda device, dtype: True)
    adapted = add_lora(tiny_model("qwen2"), SFTConfig(use_dora=True))
    assert not should_compile(SFTConfig(), adapted, 1e20)  # DoRA of an earlier run
    model = add_lora(tiny_model("qwen2"), SFTConfig())
    tokens = 1.5 * compilation._PAYS_FROM / model.num_parameters()
    assert should_compile(SFTConfig(), model, tokens)
    monkeypatch.setattr(compilation, "second_copies", lambda model: model.num_parameters() // 2)
    assert not should_compile(SFTConfig(), model, tokens)


def test_each_model_has_room_for_its_variants(tiny_model, counter):
    """torch.compile counts those of all models of a class together."""
    config = torch._dynamo.config
    limit, in_all = config.recompile_limit, config.accumulated_recompile_limit
    with config.patch(recompile_limit=limit, accumulated_recompile_limit=in_all):  # and back
        for _ in range(3):
            model = tiny_model("qwen2")
            enable_packed_forward(model)
            compile_packed(model)
            compile_packed(model)  # as a second trainer does
        assert config.recompile_limit == limit + 3 * compilation._VARIANTS
        assert config.accumulated_recompile_limit == in_all + 3 * compilation._VARIANTS


def test_what_cannot_be_compiled(tiny_model):
    assert not should_compile(SFTConfig(), tiny_model("qwen2"), 1e20)  # on a processor
    with pytest.raises(ConfigurationError, match=r"torch_compile: needs a GPU .*; set it to auto or false"):
        should_compile(SFTConfig(torch_compile=True), tiny_model("qwen2"), 1e20)
    with pytest.raises(
        ConfigurationError, match=r"torch_compile: does not go with load_in_8bit; set it to auto or false"
    ):
        should_compile(SFTConfig(torch_compile=True, load_in_8bit=True), tiny_model("qwen2"), 1e20)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="its code for processors rounds as it likes")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_policy_and_reference_round_alike(tiny_model, monkeypatch):
    """With real code, for that is where fused operations round or not; new adapters change nothing."""
    torch._dynamo.reset()
    compilation._compiled.cache_clear()
    monkeypatch.setattr(attention, "_varlen", dense)
    monkeypatch.setattr(scoring, "flash_runs", lambda device, dtype: True)
    model = tiny_model("qwen2").bfloat16()
    enable_packed_forward(model)
    model = with_lora(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    compile_packed(model)
    batch = batches(1, completions=2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), model.disable_adapter():
            reference = model(packed=batch)
        policy = model(packed=batch)
    assert policy.requires_grad
    assert torch.equal(policy, reference)
