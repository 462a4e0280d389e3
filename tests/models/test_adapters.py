import pytest
import torch

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.loading import load_model


class TestAddLora:
    def test_adapters_are_float32_over_a_bfloat16_base(self, machine, model_dir):
        machine(False, True)
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
