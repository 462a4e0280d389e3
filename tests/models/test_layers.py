"""What the layers compute, and recomputing their activations: the same gradients, and fewer tensors kept."""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from arabic_qwen.config import SFTConfig
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.layers import decoder_layers, recompute_first
from arabic_qwen.models.scoring import enable_packed_forward
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.group import Completion, Group


def batch():
    rng = np.random.default_rng(0)

    def tokens(length):
        return rng.integers(0, 300, length, dtype=np.int32)

    completions = tuple(Completion(tokens(n), np.ones(n, dtype=bool)) for n in (5, 3))
    return pack([Group(tokens(7), completions), Group(tokens(4), completions[:1])])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("use_lora", [True, False])
def test_gradients_do_not_depend_on_it(tiny_model, kind, use_lora):
    model = tiny_model(kind, num_hidden_layers=3)
    enable_packed_forward(model)
    if use_lora:
        model = add_lora(model, SFTConfig(lora_target_modules="all-linear", lora_dropout=0.3))
    model.train()

    def run(count):
        recompute_first(model, count)
        assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [i < count for i in range(3)]
        kept = []
        torch.manual_seed(0)
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            logps = model(packed=batch())
        model.zero_grad()
        logps.sum().backward()
        return sum(kept), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    sizes, gradients = zip(*(run(count) for count in (0, 1, 3)), strict=True)
    assert sizes[0] > sizes[1] > sizes[2]
    for others in gradients[1:]:
        assert others.keys() == gradients[0].keys()
        assert all(torch.equal(others[name], gradients[0][name]) for name in others)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_last_mlp_sees_what_predicts_a_target_only(tiny_model, kind):
    """tests/models/test_scoring.py has the values."""
    model = tiny_model(kind)
    enable_packed_forward(model)
    rows = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda mlp, inputs: rows.append(inputs[0].shape[1]))
    given = batch()
    model(packed=given)
    assert rows == [len(given.input_ids), len(given.target_ids)] and rows[1] < rows[0]
    model(given.input_ids[None])
    assert rows[2:] == rows[:1] * 2
