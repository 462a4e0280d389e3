"""Optimizer and scheduler state without pickle."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.runs.state import load_state, save_state

pytestmark = pytest.mark.engine

OPTIMIZERS = {
    name: cls
    for name, cls in sorted(vars(torch.optim).items())
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


def step(model, optimizer):
    loss = model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(lambda: loss) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"SparseAdam"}))
def test_every_optimizer_goes_on_exactly(name, tmp_path):
    def new():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, bias=name != "Muon")
        return model, OPTIMIZERS[name](model.parameters(), lr=0.1)

    model, optimizer = new()
    for _ in range(3):
        step(model, optimizer)
    save_state(optimizer.state_dict(), tmp_path / "optimizer")
    again, other = new()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(load_state(tmp_path / "optimizer"))
    for _ in range(3):
        step(model, optimizer)
        step(again, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("size", [16, 128])  # below 4,096 elements its moments are float32
def test_the_8_bit_optimizer_goes_on_exactly(size, tmp_path, monkeypatch):
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    monkeypatch.setattr(GlobalOptimManager, "_instance", None)  # it keeps what other tests trained in 32 bits, by place

    gradients = torch.randn(6, size, 64, generator=torch.manual_seed(0))

    def stepped(optimizer, gradients):
        (weight,) = optimizer.param_groups[0]["params"]
        for weight.grad in gradients:
            optimizer.step()
        return weight

    def new(weight):
        return AdamW([torch.nn.Parameter(weight.detach().clone())], lr=0.1, optim_bits=8)

    optimizer = new(torch.ones(size, 64))
    half = stepped(optimizer, gradients[:3]).detach().clone()
    save_state(optimizer.state_dict(), tmp_path / "optimizer")
    other = new(half)
    other.load_state_dict(load_state(tmp_path / "optimizer"))
    assert torch.equal(stepped(optimizer, gradients[3:]), stepped(other, gradients[3:]))
    (state,) = other.state.values()
    assert state["state1"].dtype == (torch.uint8 if size == 128 else torch.float32)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
keys = st.text(st.characters(codec="utf-8"), max_size=5) | st.integers()
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
)


@given(states)
def test_what_is_read_is_what_was_written(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state") / "state"
    save_state(state, path)
    assert load_state(path) == state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_tensors(tmp_path, dtype):
    tensors = {"whole": torch.arange(6).to(dtype), "part": torch.arange(12).reshape(3, 4).to(dtype).T[1:]}
    tensors["number"] = torch.tensor(1).to(dtype)
    save_state({"state": {7: tensors}}, tmp_path / "state")
    read = load_state(tmp_path / "state")["state"][7]
    assert all(torch.equal(read[name], value) and read[name].dtype == dtype for name, value in tensors.items())


def test_other_objects_are_no_state(tmp_path):
    with pytest.raises(TypeError):
        save_state({"rule": len}, tmp_path / "state")
