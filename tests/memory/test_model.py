"""The model of memory: against tensors that are really kept, and against peaks measured on an H100."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2Config

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.memory.model import model_shape, moment_bytes, step_memory
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.layers import decoder_layers, last_layer, set_packed_forward

SEVEN = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
HALF = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def lora(**values):
    return SFTConfig(**({"lora_target_modules": "all-linear", "lora_dropout": 0.0} | values))


def peak(config, model_config=SEVEN, dtype=torch.bfloat16, tokens=8192, **values):
    shape = model_shape(model_config, config, dtype)
    return step_memory(shape, config, dtype, **({"tokens": tokens, "targets": tokens // 2, "recomputed": 0} | values))


def test_peaks_that_were_measured():
    """7B shape, LoRA of rank 16 on all linear layers, micro-batches of 8,192 tokens; GB. The last: all weights of others."""
    assert peak(lora()).total / 1e9 == pytest.approx(73, rel=0.1)
    assert peak(lora(), compiled=True).total / 1e9 == pytest.approx(56, rel=0.1)
    assert peak(lora(), compiled=True, recomputed=28).total / 1e9 == pytest.approx(20, rel=0.1)
    assert peak(lora(base_precision="fp8"), compiled=True).total / 1e9 == pytest.approx(54.8, rel=0.1)
    assert peak(lora(lora_dropout=0.1), recomputed=1).total / 1e9 == pytest.approx(75.6, rel=0.1)
    small = {"tokens": 7168, "recomputed": 28}
    assert peak(lora(lora_dropout=0.1, load_in_4bit=True), **small).total / 1e9 == pytest.approx(9.95, rel=0.1)
    assert peak(SFTConfig(use_lora=False), HALF, tokens=6152).total / 1e9 == pytest.approx(19.88, rel=0.1)
    widths = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    wider = Qwen2Config(**HALF.to_dict() | widths | {"layer_types": None})
    for optim, measured in (("adamw", 49.85), ("adamw_8bit", 42.01)):
        config = SFTConfig(use_lora=False, optim=optim)
        assert peak(config, wider, tokens=6152).total / 1e9 == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("values", "compiled", "recomputed", "kept"),
    [
        ({}, False, 4.49, 7.75),
        ({}, True, 3.99, 6.74),
        ({"load_in_4bit": True}, False, 3.51, 6.63),
        ({"load_in_4bit": True}, True, 3.25, 6.47),
        ({"load_in_8bit": True}, False, 4.18, 7.11),
        ({"base_precision": "fp8"}, False, 5.17, 7.96),
        ({"use_dora": True}, False, 9.79, 15.6),
        ({"use_lora": False}, False, 15.5, 19.6),
        ({"use_lora": False, "optim": "adamw_8bit"}, False, 11.2, 15.2),
    ],
    ids=str,
)
def test_peaks_of_three_layers(values, compiled, recomputed, kept):
    """Three layers of the 7B shape on an H100, all recomputed or none; GB of SFT, where compiled on NF4 of DPO."""
    three = Qwen2Config(**SEVEN.to_dict() | {"num_hidden_layers": 3, "layer_types": None, "vocab_size": 8192})
    config = lora(lora_dropout=0.1, **values)
    for count, measured in ((3, recomputed), (0, kept)):
        found = peak(config, three, tokens=7967, compiled=compiled, recomputed=count)
        assert found.total / 1e9 == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("use_lora", [True, False])
def test_shape_is_that_of_the_model(tiny_model, kind, use_lora):
    model = tiny_model(kind, num_hidden_layers=3)
    config = lora(use_lora=use_lora)
    shape = model_shape(model.config, config, torch.float32)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    if use_lora:
        model = add_lora(model, config)
        assert shape.adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.train()
    layers = decoder_layers(model)

    def kept_by_second_layer(tokens, **given):
        storages, own = {}, {p.untyped_storage()._cdata for p in model.parameters()}
        hidden = torch.randn(1, tokens, 64, requires_grad=True)
        rotary = (torch.randn(1, tokens, 16),) * 2
        storages[hidden.untyped_storage()._cdata] = hidden.untyped_storage()

        def keep(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layers[1](hidden, position_embeddings=rotary, attention_mask=None, **given)
        del output
        return sum(storage.nbytes() for key, storage in storages.items() if key not in own)

    assert shape.kept == pytest.approx((kept_by_second_layer(90) - kept_by_second_layer(50)) / 40, rel=0.02)
    set_packed_forward(layers[1], last_layer)

    def kept_as_last(tokens):
        return kept_by_second_layer(tokens, packed=SimpleNamespace(target_index=torch.arange(10)))

    assert shape.kept_attention == pytest.approx((kept_as_last(90) - kept_as_last(50)) / 40, rel=0.02)
    assert shape.kept_always == 0


def test_dora_keeps_its_weights_in_the_precision_of_computation():
    """With dropout it multiplies by each weight a second time: of 2 bytes, where the layers are of 0.233 billion."""
    shape = model_shape(SEVEN, lora(lora_dropout=0.1, use_dora=True), torch.bfloat16)
    assert shape.kept_always == pytest.approx(2 * shape.linear / 28, rel=0.02)
    assert model_shape(SEVEN, lora(use_dora=True), torch.bfloat16).kept_always < 0.01 * shape.kept_always


def test_dora_takes_as_much_as_the_widest_layer_that_it_adapts():
    values = {"tokens": 1024, "recomputed": 28}
    everywhere, attention, none = (
        peak(lora(use_dora=True, **update), **values).head
        for update in ({}, {"lora_target_modules": ["q_proj"]}, {"use_lora": False})
    )
    assert everywhere > 6 * 18944**2 > 6 * 3584**2
    assert attention < 1.2e9
    assert none == peak(lora(use_lora=False), **values).head


def test_each_saving_saves():
    frozen = peak(lora())
    assert peak(lora(load_in_4bit=True)).weights == pytest.approx(5.6e9 + 4 * 40.4e6, rel=0.02)
    assert peak(lora(load_in_8bit=True)).weights < frozen.weights
    assert peak(lora(lora_r=8)).optimizer == pytest.approx(frozen.optimizer / 2)
    totals = [peak(lora(), recomputed=count).total for count in (0, 10, 28)]
    assert totals == sorted(totals, reverse=True)
    assert peak(lora(), tokens=4096).activations < 0.6 * frozen.activations
    whole = peak(SFTConfig(use_lora=False), recomputed=28)
    assert whole.weights + whole.optimizer == pytest.approx(16 * 7.616e9, rel=0.01)
    gathered = peak(lora(), gathered=8192).activations - frozen.activations
    assert gathered == 28 * 8192 * 2 * 512 * 2  # layers × keys × (key and value) × 4 heads of 128 × bytes
    few = {"tokens": 512, "targets": 512}
    assert peak(lora(), on_gpu=False, **few).head < peak(lora(), **few).head


@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_the_optimizer(tiny_model, tied):
    """Against what bitsandbytes' AdamW holds after a step, set up as transformers does: float32 for embeddings."""
    model = tiny_model("qwen2", num_hidden_layers=2, vocab_size=600, tie_word_embeddings=tied)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    embedding = model.get_input_embeddings()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    optimizer.check_overrides()
    for number, parameter in enumerate(model.parameters()):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
    kept = ("state1", "state2", "absmax1", "absmax2")
    held = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key in kept)
    assert moment_bytes(model, eight_bit=True) == pytest.approx(held, rel=1e-3)
    assert moment_bytes(model, eight_bit=False) == 8 * model.num_parameters()
    config = SFTConfig(use_lora=False, optim="adamw_8bit")
    assert model_shape(model.config, config, torch.float32).moments == moment_bytes(model, eight_bit=True)


def test_8bit_moments_of_7b():
    whole = peak(SFTConfig(use_lora=False, optim="adamw_8bit"))
    embedding = 152064 * 3584
    assert whole.optimizer == pytest.approx(6.03 * (7.616e9 - embedding) + 12 * embedding, rel=0.001)
    model = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    assert moment_bytes(model, eight_bit=True) == 0


def test_layers_that_the_model_lacks():
    with pytest.raises(ConfigurationError, match="no linear layer query"):
        model_shape(SEVEN, SFTConfig(lora_target_modules=["query"]), torch.bfloat16)
