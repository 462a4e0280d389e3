import pytest

from arabic_qwen.config import BaseConfig, SFTConfig
from arabic_qwen.errors import ConfigurationError


def test_documented_defaults():
    config = SFTConfig()
    assert config.packing is True
    assert config.instruction_template == "alpaca"
    assert config.response_template == "### Response:\n"
    assert config.system_prompt is None


def test_documented_example():
    config = SFTConfig(
        model_name="Qwen/Qwen2.5-7B",
        dataset_path="data/sft_arabic.jsonl",
        output_dir="./checkpoints/sft",
        max_seq_length=512,
        packing=True,
        instruction_template="alpaca",
        learning_rate=2e-4,
        num_train_epochs=3,
        per_device_train_batch_size=4,
    )
    assert config.dataset_path == "data/sft_arabic.jsonl"
    assert config.resolved_output_dir == "./checkpoints/sft"


def test_adds_only_packing():
    assert set(SFTConfig.model_fields) - set(BaseConfig.model_fields) == {"packing"}
    assert SFTConfig.method == "sft"


@pytest.mark.parametrize("template", ["alpaca", "chatml", "tokenizer"])
def test_templates(template):
    assert SFTConfig(instruction_template=template).instruction_template == template


def test_unknown_template_lists_those_that_exist():
    with pytest.raises(
        ConfigurationError, match=r"alpaca, chatml, tokenizer, or a path that ends in \.jinja or \.j2, got 'vicuna'"
    ):
        SFTConfig(instruction_template="vicuna")
