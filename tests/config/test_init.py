from pathlib import Path

import pytest

from arabic_qwen.config import METHOD_CONFIGS, SFTConfig, load_config
from arabic_qwen.errors import ConfigurationError


@pytest.fixture
def config_file(tmp_path) -> Path:
    return tmp_path / "run.yaml"


def test_every_method_has_the_configuration_of_its_name():
    assert METHOD_CONFIGS["sft"] is SFTConfig
    assert all(config.method == method for method, config in METHOD_CONFIGS.items())


def test_method_picks_the_class(config_file):
    config_file.write_text("method: sft\nlora_r: 4\n")
    config = load_config(config_file)
    assert type(config) is SFTConfig
    assert config.lora_r == 4


def test_overrides_win(config_file):
    config_file.write_text("method: sft\nlora_r: 4\n")
    assert load_config(config_file, ["lora_r=8"]).lora_r == 8


def test_missing_method(config_file):
    config_file.write_text("lora_r: 4\n")
    with pytest.raises(ConfigurationError, match=f"{config_file}: method: is missing; .* sft"):
        load_config(config_file)


@pytest.mark.parametrize("method", ["ppo", "[sft]", "5", "{a: b}", "true"])
def test_unknown_method(config_file, method):
    config_file.write_text(f"method: {method}\n")
    with pytest.raises(ConfigurationError, match=f"{config_file}:1: method: .* is unknown; choose one of .*sft"):
        load_config(config_file)


def test_errors_name_the_file_on_every_line(config_file):
    config_file.write_text("method: sft\nlora_r: 0\nlearningrate: 1\n")
    with pytest.raises(ConfigurationError) as error:
        load_config(config_file)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert {line.split(": ")[0] for line in lines} == {f"{config_file}:2", f"{config_file}:3"}


def test_errors_name_the_override_that_is_wrong(config_file):
    config_file.write_text("method: sft\nlora_r: 4\nload_in_4bit: true\n")
    with pytest.raises(ConfigurationError) as error:
        load_config(config_file, ["lora_r=0", "seed=1", "lerning_rate=1"])
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        "override lora_r=0",
        "override lerning_rate=1",
    ]
    with pytest.raises(ConfigurationError, match=r"^override method=ppo: method: 'ppo' is unknown"):
        load_config(config_file, ["method=ppo"])
    with pytest.raises(ConfigurationError, match=f"^{config_file} with load_in_8bit=true: load_in_4bit and"):
        load_config(config_file, ["load_in_8bit=true"])


def test_callbacks_cannot_be_named_in_a_file(config_file):
    config_file.write_text("method: sft\ncallbacks: [EarlyStoppingCallback]\n")
    with pytest.raises(ConfigurationError, match="callbacks: are Python objects"):
        load_config(config_file)
