"""The JSON Schema agrees with what the configuration classes accept."""

import pytest
import yaml
from jsonschema import Draft202012Validator

from arabic_qwen.config import METHOD_CONFIGS
from arabic_qwen.config.schema import any_schema, method_schema

METHODS = sorted(METHOD_CONFIGS)


@pytest.mark.parametrize("method", METHODS)
def test_what_init_prints_is_valid(method):
    written = yaml.safe_load(METHOD_CONFIGS[method].commented_yaml().replace("_strategy: no", "_strategy: 'no'"))
    for schema in (method_schema(method), any_schema()):
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(written)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_rank": 4},
        {"lora_r": 0},
        {"num_train_epochs": 0},
        {"torch_dtype": "fp8"},
        {"callbacks": []},
        {"method": "ppo"},
        {"method": None},
    ],
    ids=str,
)
def test_what_is_wrong_is_not(wrong):
    values = {name: value for name, value in ({"method": "sft"} | wrong).items() if value is not None}
    for schema in (method_schema("sft"), any_schema()):
        assert not Draft202012Validator(schema).is_valid(values)


def test_keys_belong_to_their_method():
    schema = Draft202012Validator(any_schema())
    assert schema.is_valid({"method": "simpo", "gamma_beta_ratio": 0.5})
    assert not schema.is_valid({"method": "dpo", "gamma_beta_ratio": 0.5})


@pytest.mark.parametrize("method", METHODS)
def test_every_key_is_described(method):
    schema = method_schema(method)
    assert schema["additionalProperties"] is False
    assert all(field.get("description") for field in schema["properties"].values())
    assert all("default" in field for name, field in schema["properties"].items() if name != "method")
