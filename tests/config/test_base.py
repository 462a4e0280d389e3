import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from arabic_qwen.config import BaseConfig, SFTConfig
from arabic_qwen.errors import ConfigurationError

# Name and default, as the documentation's "Common Configuration Parameters" and "LoRA Configuration" have them.
DOCUMENTED_DEFAULTS = {
    "model_name": "Qwen/Qwen2.5-7B",
    "dataset_path": "data/training.jsonl",
    "output_dir": "./checkpoints",
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 512,
    "torch_dtype": "bfloat16",
    "load_in_4bit": False,
    "load_in_8bit": False,
    "use_lora": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_bias": "none",
    "lora_task_type": "CAUSAL_LM",
    "gradient_checkpointing": True,
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "evaluation_strategy": "steps",
    "eval_steps": 500,
    "save_strategy": "steps",
    "save_steps": 1000,
    "save_total_limit": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}

# Every assignment of the documentation's examples.
DOCUMENTED_ASSIGNMENTS = [
    ("load_in_4bit", True),
    ("load_in_8bit", False),
    ("gradient_checkpointing", True),
    ("per_device_train_batch_size", 1),
    ("per_device_train_batch_size", 2),
    ("per_device_train_batch_size", 8),
    ("gradient_accumulation_steps", 16),
    ("use_lora", True),
    ("lora_r", 8),
    ("lora_r", 32),
    ("lora_alpha", 64),
    ("lora_target_modules", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("packing", True),
    ("dataloader_num_workers", 4),
    ("dataloader_pin_memory", True),
    ("fp16", True),
    ("bf16", True),
    ("use_flash_attention", True),
    ("evaluation_strategy", "no"),
    ("evaluation_strategy", "steps"),
    ("deepspeed", "configs/deepspeed_zero2.json"),
    ("ddp_backend", "nccl"),
    ("ddp_find_unused_parameters", False),
    ("learning_rate", 1e-5),
    ("max_grad_norm", 0.5),
    ("warmup_ratio", 0.1),
    ("num_train_epochs", 5),
    ("early_stopping_patience", 3),
    ("early_stopping_threshold", 0.001),
    ("logging_steps", 10),
    ("eval_steps", 100),
    ("save_steps", 500),
    ("report_to", "wandb"),
    ("run_name", "arabic_qwen_sft"),
    ("model_name", "Qwen/Qwen2.5-0.5B"),
    ("output_dir", "./elsewhere"),
    ("seed", 42),
    ("data_seed", 42),
    ("load_best_model_at_end", True),
    ("merge_and_save", True),
    ("group_by_length", True),
    ("length_column_name", "tokens"),
    ("callbacks", [EarlyStoppingCallback(early_stopping_patience=3)]),
]


@pytest.mark.parametrize("name", DOCUMENTED_DEFAULTS)
def test_documented_default(name):
    value = getattr(SFTConfig(), name)
    assert value == DOCUMENTED_DEFAULTS[name]
    assert type(value) is type(DOCUMENTED_DEFAULTS[name])


@pytest.mark.parametrize(("name", "value"), DOCUMENTED_ASSIGNMENTS)
def test_documented_assignment(name, value):
    config = SFTConfig()
    setattr(config, name, value)
    assert getattr(config, name) == value
    assert getattr(SFTConfig(**{name: value}), name) == value


def test_defaults_are_not_shared_between_configurations():
    SFTConfig().lora_target_modules.append("k_proj")
    SFTConfig().callbacks.append(TrainerCallback())
    assert SFTConfig().lora_target_modules == ["q_proj", "v_proj"]
    assert SFTConfig().callbacks == []


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("learningrate", "learning_rate"), ("lora_rank", "lora_r"), ("max_seq_lenght", "max_seq_length")],
)
def test_unknown_key_is_refused_with_the_key_that_is_meant(wrong, meant):
    with pytest.raises(ConfigurationError, match=f"{wrong}: unknown key of SFTConfig; did you mean '{meant}'"):
        SFTConfig(**{wrong: 1})
    with pytest.raises(ConfigurationError, match=f"{wrong}: unknown key of SFTConfig; did you mean '{meant}'"):
        setattr(SFTConfig(), wrong, 1)


def test_unknown_key_that_is_like_no_other_points_to_the_list():
    with pytest.raises(ConfigurationError, match="zzz: unknown key of SFTConfig; `arabic-qwen init sft`"):
        SFTConfig(zzz=1)


def test_unknown_key_called_self():
    with pytest.raises(ConfigurationError, match="self: unknown key"):
        SFTConfig(**{"self": 1})


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigurationError) as error:
        SFTConfig(lora_r="many", max_seq_length=0, save_strategy="sometimes", learningrate=1e-5, seed=-1)
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    for name in ("lora_r", "max_seq_length", "save_strategy", "learningrate", "seed"):
        assert any(line.startswith(f"{name}: ") for line in lines)


def test_message_holds_the_refused_value():
    with pytest.raises(ConfigurationError, match=r"^lora_dropout: .* less than 1, got 1.5$"):
        SFTConfig(lora_dropout=1.5)


def test_a_value_that_no_type_of_its_field_takes_is_one_problem():
    with pytest.raises(ConfigurationError) as error:
        SFTConfig(gradient_checkpointing="maybe", unknown=1)
    refused, unknown = str(error.value).splitlines()
    assert refused == "gradient_checkpointing: input should be a valid boolean or 'auto', got 'maybe'"
    assert unknown.startswith("unknown: unknown key")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", math.inf),
        ("num_train_epochs", 0),
        ("max_steps", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 1.5),
        ("max_seq_length", 7),
        ("validation_split", 1.0),
        ("validation_split", -0.1),
        ("lora_dropout", 1.0),
        ("warmup_ratio", 1),
        ("torch_dtype", "float64"),
        ("torch_dtype", "int8"),
        ("evaluation_strategy", "always"),
        ("evaluation_strategy", None),
        ("lora_bias", "some"),
        ("lora_target_modules", "all"),
        ("lora_target_modules", [1]),
        ("instruction_template", "llama"),
        ("model_name", None),
        ("model_name", 7),
        ("use_lora", "perhaps"),
        ("callbacks", "early stopping"),
        ("callbacks", ["early stopping"]),
        ("ddp_backend", "smoke signals"),
        ("seed", -1),
    ],
)
def test_bad_value_is_refused_and_the_old_one_kept(name, value):
    config = SFTConfig()
    before = config.model_dump() | {"callbacks": config.callbacks}
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        setattr(config, name, value)
    assert config.model_dump() | {"callbacks": config.callbacks} == before
    assert config.model_fields_set == set()
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        SFTConfig(**{name: value})


CONTRADICTIONS = [
    ({"load_in_4bit": True}, "load_in_8bit", True, "load_in_4bit and load_in_8bit are both true"),
    ({"load_in_8bit": True}, "load_in_4bit", True, "load_in_4bit and load_in_8bit are both true"),
    ({"load_in_4bit": True}, "use_lora", False, "quantised model can only be trained with adapters"),
    ({"use_lora": False}, "load_in_8bit", True, "quantised model can only be trained with adapters"),
    ({"base_precision": "fp8"}, "use_lora", False, "fp8 is for frozen weights, which use_lora false has none of"),
    ({"base_precision": "fp8"}, "load_in_4bit", True, "fp8 does not go with load_in_4bit; unset one of them"),
    ({"base_precision": "fp8"}, "lora_bias", "all", "fp8 does not go with lora_bias; unset one of them"),
    ({"deepspeed": "ds.json"}, "base_precision", "fp8", "fp8 does not go with deepspeed; unset one of them"),
    ({"use_dora": True}, "base_precision", "fp8", "fp8 does not go with use_dora; unset one of them"),
]


@pytest.mark.parametrize(("given", "name", "value", "message"), CONTRADICTIONS)
def test_contradiction_is_refused_at_construction(given, name, value, message):
    with pytest.raises(ConfigurationError, match=message):
        SFTConfig(**given, **{name: value})


@pytest.mark.parametrize(("given", "name", "value", "message"), CONTRADICTIONS)
def test_contradicting_assignment_is_rolled_back(given, name, value, message):
    config = SFTConfig(**given)
    before = config.model_dump()
    with pytest.raises(ConfigurationError, match=message):
        setattr(config, name, value)
    assert config.model_dump() == before
    assert config.model_fields_set == set(given)
    config.lora_r = 4  # later assignments do not meet the refused value
    assert config.lora_r == 4


def test_the_documented_switch_from_8_to_4_bits():
    config = SFTConfig(load_in_8bit=True)
    config.load_in_8bit = False
    config.load_in_4bit = True
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)


def test_values_are_read_from_their_text():
    config = SFTConfig(learning_rate="1e-5", lora_r="8", packing="false", num_train_epochs="2")
    assert (config.learning_rate, config.lora_r, config.packing, config.num_train_epochs) == (1e-5, 8, False, 2)
    assert SFTConfig(num_train_epochs="0.5").num_train_epochs == 0.5


def test_torch_dtype_may_be_torchs_own():
    assert SFTConfig(torch_dtype=torch.float32).torch_dtype == "float32"


def test_paths_may_be_path_objects():
    config = SFTConfig(dataset_path=Path("data") / "a.jsonl", output_dir=Path("out"), model_name=Path("m"))
    assert (config.dataset_path, config.output_dir, config.model_name) == ("data/a.jsonl", "out", "m")


def test_output_dir_resolves_to_the_method_only_where_unset():
    assert SFTConfig().output_dir == "./checkpoints"
    assert SFTConfig().resolved_output_dir == "./checkpoints/sft"
    assert SFTConfig(output_dir="./checkpoints").resolved_output_dir == "./checkpoints"
    config = SFTConfig()
    config.output_dir = "out"
    assert config.resolved_output_dir == "out"


def test_refused_output_dir_still_counts_as_unset():
    config = SFTConfig()
    with pytest.raises(ConfigurationError):
        config.output_dir = 3
    assert config.resolved_output_dir == "./checkpoints/sft"


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), lambda config: config.model_copy()],
    ids=["copy", "deepcopy", "pickle", "model_copy"],
)
def test_configuration_can_be_copied(duplicate):
    config = SFTConfig(lora_r=4, system_prompt="أجب بالعربية.", callbacks=[TrainerCallback()])
    twin = duplicate(config)
    assert type(twin) is SFTConfig
    assert twin.model_dump() == config.model_dump()
    assert [type(callback) for callback in twin.callbacks] == [TrainerCallback]
    assert twin.model_fields_set == config.model_fields_set
    twin.lora_r = 8
    assert config.lora_r == 4
    with pytest.raises(ConfigurationError):
        twin.lora_r = 0


def test_schema_describes_every_field():
    schema = SFTConfig.model_json_schema()
    assert set(schema["properties"]) == set(SFTConfig.model_fields)
    for name, field in schema["properties"].items():
        assert field.get("description"), name
        assert "\n" not in field["description"], name
        if name != "callbacks":
            assert field["default"] == SFTConfig.model_fields[name].default
    assert schema["additionalProperties"] is False


def test_sections_name_existing_fields():
    assert set(SFTConfig.sections) <= set(SFTConfig.model_fields)
    assert set(BaseConfig.sections) <= set(BaseConfig.model_fields)


@pytest.mark.parametrize(
    ("value", "expected"), [("train", "train"), (True, "train"), (False, False), (None, False)], ids=str
)
def test_normalize(value, expected):
    assert SFTConfig(normalize=value).normalize is expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalize", "compare"),
        ("normalize", ["train"]),
        ("diacritics", "remove"),
        ("diacritics", None),
        ("diacritics", ["strip"]),
        ("diacritics", {"output": "remove"}),
        ("diacritics", {"output": ["strip"]}),
    ],
    ids=str,
)
def test_bad_normalisation(name, value):
    with pytest.raises(ConfigurationError, match=f"^{name}: must be") as error:
        SFTConfig(**{name: value})
    assert len(str(error.value).splitlines()) == 1


def test_diacritics_by_column_go_through_yaml(tmp_path):
    config = SFTConfig(diacritics={"instruction": "strip", "output": "keep"}, normalize=False)
    config.to_yaml(tmp_path / "run.yaml")
    assert SFTConfig.from_yaml(tmp_path / "run.yaml") == config
