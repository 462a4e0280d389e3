"""An fp8 base on a processor, where it is only slow; tests/engine/test_gpu.py has the same on CUDA."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models import loading, precision
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.kernels import fp8
from arabic_qwen.models.kernels.fp8 import FP8Linear, convert_to_fp8, quantize_rows, second_copies
from arabic_qwen.training.base_trainer import BaseTrainer


@pytest.fixture(autouse=True)
def product(monkeypatch):
    """torch's own product where this processor has it, else the same in float32."""
    a, scale = quantize_rows(torch.ones(16, 16))
    try:
        fp8._matmul_fp8(a, a, scale, scale)
    except (RuntimeError, NotImplementedError):

        def emulated(a, b, scale_a, scale_b, bias=None):
            y = (a.float() * scale_a) @ (b.float() * scale_b).t()
            return (y if bias is None else y + bias.float()).bfloat16()

        monkeypatch.setattr(fp8, "_matmul_fp8", emulated)


def layers(bias=True, trainable=True):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=bias).bfloat16().requires_grad_(False)
    return linear, FP8Linear(linear, trainable)


def relative(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


class TestQuantizeRows:
    @pytest.mark.parametrize("magnitude", [1e-30, 1.0, 3e38])
    def test_rounds_each_element_to_a_sixteenth(self, magnitude):
        torch.manual_seed(0)
        x = (torch.rand(5, 32) * 0.9 + 0.1).to(torch.bfloat16) * magnitude
        values, scale = quantize_rows(x)
        assert values.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
        assert torch.allclose(values.double() * scale.double(), x.double(), rtol=1 / 16, atol=0)
        assert values.double().amax() == 448

    def test_rows_of_zeros(self):
        values, scale = quantize_rows(torch.zeros(2, 16))
        assert not values.float().any() and scale.isfinite().all()

    def test_what_is_not_finite_stays_so(self):
        x = torch.ones(3, 16)
        x[0, 3], x[1, 5] = float("inf"), float("nan")
        values, scale = quantize_rows(x)
        assert (values.float() * scale).isnan().any(1).tolist() == [True, True, False]


class TestFP8Linear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("rows", [1, 7, 33])
    @pytest.mark.parametrize("trainable", [True, False])
    def test_output_and_gradient(self, bias, rows, trainable):
        linear, ours = layers(bias, trainable)
        x = torch.randn(1, rows, 64).bfloat16().requires_grad_()
        upstream = torch.randn(1, rows, 48).bfloat16()
        y = ours(x)
        y.backward(upstream)
        assert y.shape == (1, rows, 48) and y.dtype == x.grad.dtype == torch.bfloat16
        assert relative(y, torch.nn.functional.linear(x.double(), *[p.double() for p in linear.parameters()])) < 0.05
        assert relative(x.grad, upstream.double() @ linear.weight.double()) < 0.05
        assert not any(parameter.requires_grad for parameter in ours.parameters())

    def test_no_rows(self):
        _, ours = layers()
        x = torch.zeros(1, 0, 64).bfloat16().requires_grad_()
        y = ours(x)
        y.sum().backward()
        assert y.shape == (1, 0, 48) and y.dtype == torch.bfloat16 and x.grad.shape == x.shape

    def test_the_gradient_is_of_the_rounded_weight(self):
        linear, ours = layers(bias=False)
        x = torch.zeros(48, 64).bfloat16().requires_grad_()
        ours(x).backward(torch.eye(48).bfloat16())  # each row has one element, which e4m3 keeps
        weight, scale = quantize_rows(linear.weight)
        assert torch.allclose(x.grad.float(), weight.float() * scale, rtol=2**-8)

    def test_outliers_of_a_row_and_rows_of_zeros_leave_the_others_alone(self):
        _, ours = layers()
        x = torch.randn(4, 64).bfloat16()
        before = ours(x)
        x[1, 7], x[2] = 1e30, 0.0
        after = ours(x)
        assert after.isfinite().all()
        assert torch.equal(after[[0, 3]], before[[0, 3]])
        assert torch.equal(after[2], ours.bias)

    def test_same_without_gradients_checkpointed_and_compiled(self):
        _, ours = layers()
        _, other = layers(bias=False)

        def both(x):
            return ours(x) + other(x)

        compiled = torch.compile(both, backend="aot_eager", dynamic=True, fullgraph=True)
        for rows in (5, 9):
            x = torch.randn(rows, 64).bfloat16()
            with torch.no_grad():
                expected = both(x)

            def gradient(layer, x=x):
                leaf = x.clone().requires_grad_()
                y = layer(leaf)
                y.float().square().sum().backward()
                return y.detach(), leaf.grad

            plain = gradient(both)
            assert torch.equal(plain[0], expected)
            for way in (lambda leaf: checkpoint(both, leaf, use_reentrant=False), compiled):
                assert all(torch.equal(a, b) for a, b in zip(gradient(way), plain, strict=True))

    def test_under_autocast_a_float32_input_is_taken(self):
        _, ours = layers()
        x = torch.randn(3, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


class TestConversion:
    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
    def test_all_linear_layers_of_the_blocks_and_nothing_else(self, tiny_model, targets):
        model = add_lora(tiny_model(tied=False).bfloat16(), SFTConfig(lora_target_modules=targets))
        plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        convert_to_fp8(model, trainable=True)
        left = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        assert {name.split(".")[-2] for name in left if "layers" in name} == {"lora_A", "lora_B"}
        assert [name for name in left if "layers" not in name] == ["base_model.model.lm_head"]
        assert len(plain - left) == 2 * 7
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        convert_to_fp8(model, trainable=True)  # again: nothing is left to convert
        weights = [module.weight.numel() for module in model.modules() if isinstance(module, FP8Linear)]
        assert second_copies(model) == sum(weights) > 0

    def test_sizes_that_do_not_suit_it_are_named(self, tiny_model):
        with pytest.raises(ConfigurationError, match=r"layer 0\.mlp\.gate_proj has 64 × 88; set it to null"):
            convert_to_fp8(tiny_model(intermediate_size=88).bfloat16(), trainable=True)


@pytest.fixture
def here(monkeypatch):
    """Train with fp8 on this machine although it has no GPU for it."""
    if not precision._processor_has_bf16():
        pytest.skip("this processor has no bfloat16")
    for module in (precision, loading):
        monkeypatch.setattr(module, "check_fp8", lambda config: None)


def trained(config_class, model, data, output, **values):
    config = config_class(
        **{
            "model_name": str(model),
            "dataset_path": str(data),
            "output_dir": str(output),
            "instruction_template": "chatml",
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.0,
            "base_precision": "fp8",
            "learning_rate": 5e-3,
            "max_steps": 6,
            "logging_steps": 1,
            **values,
        }
    )
    trainer = BaseTrainer(config)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.trainer.state.log_history if "loss" in entry]


def converted(model):
    return sum(isinstance(module, FP8Linear) for module in model.modules())


def test_trains_and_is_loaded_as_it_was_trained(here, model_dir, sft_file, tmp_path, monkeypatch, caplog):
    trainer, losses = trained(SFTConfig, model_dir, sft_file, tmp_path / "run")
    plain, plain_losses = trained(SFTConfig, model_dir, sft_file, tmp_path / "plain", base_precision=None)
    assert (converted(trainer.model), converted(plain.model)) == (14, 0)
    assert losses == pytest.approx(plain_losses, rel=0.03)
    assert losses[-1] < 0.9 * losses[0] and losses != plain_losses
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert saved.keys() == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    assert set(trainer.generate_comparison("مرحبا", max_length=3)) >= {"trained_model_response"}

    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(str(tmp_path / "run"))
    assert converted(loaded.model) == 14 and not any(name.endswith("weight_t") for name in loaded.model.state_dict())
    assert loaded.evaluate(str(sft_file)) == trainer.evaluate(str(sft_file))
    given = BaseTrainer(SFTConfig(torch_dtype="float32"))
    monkeypatch.undo()
    for lacking in (BaseTrainer(SFTConfig()), given):
        with caplog.at_level(logging.WARNING):
            lacking.load_model(str(tmp_path / "run"))
        assert "not loaded as it was trained (base_precision: fp8 needs a CUDA device" in caplog.text
        assert lacking.config.base_precision is None and not converted(lacking.model)
        caplog.clear()


def test_preferences_in_two_stages(here, model_dir, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"سؤال رقم {i}؟", "chosen": f"جواب {i}.", "rejected": "لا أدري."} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"learning_rate": 2e-3, "max_steps": 4}
    trainer, losses = trained(DPOConfig, model_dir, data, tmp_path / "one", **values)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)  # the reference is on the same base
    assert losses[-1] < losses[0] - 0.01
    # its reference is a second copy of the adapters
    trainer, losses = trained(DPOConfig, tmp_path / "one", data, tmp_path / "two", precompute_reference=True, **values)
    assert set(trainer.model.peft_config) == {"default", "reference"} and converted(trainer.model) == 14
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    # PiSSA changes the base before it is converted
    _, losses = trained(DPOConfig, model_dir, data, tmp_path / "pissa", init_lora_weights="pissa", **values)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)


def test_resumed_with_its_best_loaded_and_merged_into_the_base_as_it_was(here, model_dir, sft_file, tmp_path):
    values = {"merge_and_save": True, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "eval_samples": 0}
    trained(SFTConfig, model_dir, sft_file, tmp_path / "run", **values)
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    for name in ("training_config.yaml", "metrics.jsonl"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "again")
    trainer, _ = trained(SFTConfig, model_dir, sft_file, tmp_path / "again", **values)
    assert trainer.trainer._resumed_from and trainer.trainer.args.load_best_model_at_end
    weights, again = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(str(tmp_path / "run"))
    assert loaded.config.base_precision is None and not converted(loaded.model)
