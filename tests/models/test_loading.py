import json
import logging

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError, ModelLoadError
from arabic_qwen.models import loading
from arabic_qwen.models.loading import add_lora, compute_dtype, load_model, load_tokenizer
from arabic_qwen.models.scoring import score_completions

FLOAT32 = SFTConfig(torch_dtype="float32")
GROUPS = [([3, 4, 5], [[6, 7, 8], [9]])]


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a machine with or without CUDA, and with or without bfloat16."""

    def pretend(cuda: bool, bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(loading, "_processor_has_bf16", lambda: bf16)

    return pretend


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([part for parts in score_completions(model.eval(), GROUPS) for part in parts])


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


def test_falling_back_to_float32_is_said(machine, caplog):
    machine(CPU, False)
    with caplog.at_level(logging.WARNING):
        compute_dtype(SFTConfig())
    assert "torch_dtype: this processor has no bfloat16; computing in float32" in caplog.text


def test_loading_in_a_precision_that_the_machine_lacks(machine, model_dir):
    machine(CPU, False)
    with pytest.raises(ConfigurationError, match="float16 needs a CUDA device"):
        load_model(str(model_dir), SFTConfig(fp16=True), trainable=True)


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_quantisation_without_cuda(machine, model_dir, key):
    machine(CPU, True)
    with pytest.raises(ConfigurationError, match=f"^{key}: quantised training needs a CUDA device"):
        load_model(str(model_dir), SFTConfig(**{key: True}), trainable=True)


def missing_weights(path):
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))


def broken_config(path):
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("prepare", [lambda path: None, missing_weights, broken_config])
def test_unreadable_model_is_one_line(tmp_path, prepare):
    prepare(tmp_path)
    with pytest.raises(ModelLoadError) as error:
        load_model(str(tmp_path), FLOAT32, trainable=True)
    assert str(error.value).startswith(f"{tmp_path}: the model cannot be loaded (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such-model", "./no/such/folder", "no such name"])
def test_missing_model_is_one_line(name):
    for load in (lambda: load_model(name, FLOAT32, trainable=True), lambda: load_tokenizer(name)):
        with pytest.raises(ModelLoadError) as error:
            load()
        assert str(error.value).startswith(f"{name}: the ")
        assert "\n" not in str(error.value)


def test_frozen_weights_are_in_the_computations_precision(machine, model_dir):
    machine(CPU, True)
    model = load_model(str(model_dir), SFTConfig(), trainable=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_trained_weights_are_float32_masters(machine, model_dir):
    machine(CPU, True)
    model = load_model(str(model_dir), SFTConfig(use_lora=False), trainable=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    model = load_model(str(model_dir), SFTConfig(use_lora=False), trainable=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_loaded_model_is_ready_for_packed_passes(model_dir):
    model = load_model(str(model_dir), FLOAT32, trainable=False)
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    prompt, (completion, _) = GROUPS[0]
    logits = plain(torch.tensor([prompt + completion])).logits[0, 2:5].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(scores(model)[:3], expected)


def test_tokenizer(model_dir, tokenizer):
    loaded = load_tokenizer(str(model_dir))
    assert loaded("ما عاصمة الأردن؟").input_ids == tokenizer("ما عاصمة الأردن؟").input_ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


class TestAddLora:
    def test_adapters_are_float32_over_a_bfloat16_base(self, machine, model_dir):
        machine(CPU, True)
        config = SFTConfig()
        model = add_lora(load_model(str(model_dir), config, trainable=True), config)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
            assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name

    def test_follows_the_configuration(self, tiny_model):
        config = SFTConfig(
            lora_r=3, lora_alpha=12, lora_dropout=0.25, lora_bias="lora_only", lora_target_modules=["k_proj", "up_proj"]
        )
        lora = add_lora(tiny_model(), config).peft_config["default"]
        assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (3, 12, 0.25, "lora_only")
        assert set(lora.target_modules) == {"k_proj", "up_proj"}
        assert lora.task_type == "CAUSAL_LM"

    def test_all_linear_leaves_the_head_out(self, tiny_model):
        model = add_lora(tiny_model(tied=False), SFTConfig(lora_target_modules="all-linear"))
        adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def test_layers_may_be_named_by_path(self, tiny_model):
        model = add_lora(tiny_model(), SFTConfig(lora_target_modules=["layers.1.self_attn.q_proj"]))
        adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
        assert len(adapted) == 1
        assert ".layers.1.self_attn.q_proj." in adapted[0]

    def test_unknown_layers_are_all_named(self, tiny_model):
        config = SFTConfig(lora_target_modules=["q_proj", "query", "c_attn"])
        with pytest.raises(ConfigurationError, match=r"no linear layer query, c_attn .* choose from .*q_proj") as error:
            add_lora(tiny_model(), config)
        assert "lora_target_modules" in str(error.value)

    @pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "layers.9.self_attn.q_proj"])
    def test_layers_that_take_no_adapters(self, tiny_model, name):
        with pytest.raises(ConfigurationError, match="lora_target_modules"):
            add_lora(tiny_model(), SFTConfig(lora_target_modules=[name]))

    def test_initialisation_follows_the_seed(self, tiny_model):
        def adapters(seed: int) -> torch.Tensor:
            model = add_lora(tiny_model(), SFTConfig(seed=seed))
            return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_A" in name])

        assert torch.equal(adapters(1), adapters(1))
        assert not torch.equal(adapters(1), adapters(2))


class TestAdapterFolder:
    @pytest.fixture
    def adapter_dir(self, model_dir, tmp_path):
        model = add_lora(load_model(str(model_dir), FLOAT32, trainable=True), FLOAT32)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(tmp_path / "adapter")
        self.expected = scores(model)
        return str(tmp_path / "adapter")

    def test_is_loaded_on_its_base(self, adapter_dir):
        model = load_model(adapter_dir, FLOAT32, trainable=False)
        assert isinstance(model, PeftModel)
        torch.testing.assert_close(scores(model), self.expected)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_goes_on_being_trained(self, adapter_dir):
        model = load_model(adapter_dir, FLOAT32, trainable=True)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)

    def test_is_float32_over_a_bfloat16_base(self, adapter_dir, machine):
        machine(CPU, True)
        model = load_model(adapter_dir, SFTConfig(), trainable=True)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name

    def test_is_merged_for_full_training(self, adapter_dir):
        model = load_model(adapter_dir, SFTConfig(torch_dtype="float32", use_lora=False), trainable=True)
        assert not isinstance(model, PeftModel)
        torch.testing.assert_close(scores(model), self.expected, rtol=1e-4, atol=1e-4)
        assert not any("lora_" in name for name, _ in model.named_parameters())

    def test_merged_model_is_trained_in_full(self, adapter_dir):
        model = load_model(adapter_dir, SFTConfig(torch_dtype="float32", use_lora=False), trainable=True)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_merged_copy(self, adapter_dir, model_dir):
        adapted = load_model(adapter_dir, FLOAT32, trainable=True)
        merged = loading.merged_copy(adapted, FLOAT32, adapter_dir)
        prompt, (completion, _) = GROUPS[0]
        logits = merged(torch.tensor([prompt + completion])).logits[0, 2:5].log_softmax(-1)
        found = logits.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(found, self.expected[:3], rtol=1e-4, atol=1e-4)

    def test_uses_the_tokenizer_of_its_base(self, adapter_dir, model_dir):
        assert load_tokenizer(adapter_dir)("مرحبا").input_ids == load_tokenizer(str(model_dir))("مرحبا").input_ids

    def test_without_its_base(self, adapter_dir, tmp_path):
        path = tmp_path / "adapter" / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": "/no/such/base"}
        path.write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match="/no/such/base: the model cannot be loaded") as error:
            load_model(adapter_dir, FLOAT32, trainable=True)
        assert "\n" not in str(error.value)


def test_two_precisions_at_once():
    """Refused where it is used, for the documents set one after the other on one configuration."""
    with pytest.raises(ConfigurationError, match="bf16 and fp16 are both true"):
        compute_dtype(SFTConfig(bf16=True, fp16=True))
