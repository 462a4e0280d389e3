import gc
import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError, ModelLoadError
from arabic_qwen.models import loading
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.layers import decoder_layers, recompute_first
from arabic_qwen.models.loading import load_model, load_tokenizer
from arabic_qwen.models.scoring import score_completions

FLOAT32 = SFTConfig(torch_dtype="float32")
GROUPS = [([3, 4, 5], [[6, 7, 8], [9]])]


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([part for parts in score_completions(model.eval(), GROUPS) for part in parts])


def test_loading_in_a_precision_that_the_machine_lacks(machine, model_dir):
    machine(False, False)
    with pytest.raises(ConfigurationError, match="float16 needs a CUDA device"):
        load_model(str(model_dir), SFTConfig(fp16=True), trainable=True)


def test_frozen_weights_are_in_the_computations_precision(machine, model_dir):
    machine(False, True)
    model = load_model(str(model_dir), SFTConfig(), trainable=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_trained_weights_are_float32_masters(machine, model_dir):
    machine(False, True)
    model = load_model(str(model_dir), SFTConfig(use_lora=False), trainable=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    model = load_model(str(model_dir), SFTConfig(use_lora=False), trainable=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def kept_after_a_pass(model) -> int:
    """Bytes of the tensors that wait for the backward pass, where every layer recomputes."""

    def alive():
        gc.collect()
        storages = [item.untyped_storage() for item in gc.get_objects() if type(item) is torch.Tensor]
        return {storage._cdata: storage.nbytes() for storage in storages}

    before = alive()
    scores = score_completions(model, [([3] * 40, [[4] * 60])])
    found = sum(size for storage, size in alive().items() if storage not in before)
    scores[0][0].sum().backward()
    return found


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_int8_layers_keep_nothing_that_recomputing_drops(model_dir, monkeypatch):
    import bitsandbytes
    from bitsandbytes.autograd._functions import MatMul8bitLt

    def product_on_cuda(a, b, out=None, state=None, threshold=0.0, bias=None):
        return MatMul8bitLt.apply(a, b, out, bias, state)

    def adapted():
        model = add_lora(load_model(str(model_dir), FLOAT32, trainable=True), FLOAT32).train()
        recompute_first(model, len(decoder_layers(model)))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    def gradients(model):
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = kept_after_a_pass(adapted())
    monkeypatch.setattr(bitsandbytes, "matmul", product_on_cuda)
    monkeypatch.setattr(loading, "quantization", lambda config: BitsAndBytesConfig(load_in_8bit=True))
    mended = adapted()
    assert kept_after_a_pass(mended) < 1.1 * plain
    monkeypatch.setattr(loading, "mend_quantized_layers", lambda model: None)
    as_it_was = adapted()
    assert kept_after_a_pass(as_it_was) > 2 * plain
    found, expected = gradients(mended), gradients(as_it_was)
    assert all(torch.equal(one, other) and one.any() for one, other in zip(found, expected, strict=True))


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
        machine(False, True)
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
        merged = loading.merged_copy(FLOAT32, adapter_dir)
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
        with pytest.raises(
            ModelLoadError, match="the adapter's base model, /no/such/base: the folder does not exist"
        ) as error:
            load_model(adapter_dir, FLOAT32, trainable=True)
        assert "\n" not in str(error.value)
