"""Every setting of every method changes something that can be seen, or says when it cannot act."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.data.templates import set_template
from arabic_qwen.engine import arguments
from arabic_qwen.engine.callbacks import run_callbacks
from arabic_qwen.methods.objective import Scores
from arabic_qwen.methods.registry import BUILT_IN, METHODS
from arabic_qwen.models import adapters, precision
from tests.preference_runs import write_rows

# Another value of each key, where the type does not give one; with what else must be set for it to act.
OTHER = {
    "dataset_path": {"dataset_path": ["other.jsonl"]},
    "eval_dataset_path": {"eval_dataset_path": "other.jsonl"},
    "max_samples": {"max_samples": 3},
    "normalize": {"normalize": False},
    "diacritics": {"diacritics": "strip"},
    "streaming": {"streaming": True, "max_steps": 3},
    "instruction_template": {"instruction_template": "chatml"},
    "response_template": {"response_template": "الرد:\n"},
    "save_steps": {"save_steps": 500},
    "run_name": {"run_name": "mine"},
    "ddp_find_unused_parameters": {"ddp_find_unused_parameters": True},
    "lora_target_modules": {"lora_target_modules": ["o_proj"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "lora_bias": {"lora_bias": "all"},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "evaluation_strategy": {"evaluation_strategy": "epoch"},
    "save_strategy": {"save_strategy": "epoch"},
    "metric_for_best_model": {"metric_for_best_model": "eval_other"},
    "validation_split": {"validation_split": 0.5},
    "max_seq_length": {"max_seq_length": 200},
    "max_prompt_length": {"max_prompt_length": 120},
    "max_length": {"max_length": 200},
    "report_to": {"report_to": "all"},
    "max_bad_rows": {"max_bad_rows": 5},
    "label_smoothing": {"label_smoothing": 0.2},
    "negatives": {"negatives": "softmax"},
    "discopop_tau": {"discopop_tau": 0.5, "loss_type": "discopop"},
    "simpo_gamma": {"simpo_gamma": 0.2, "loss_type": "simpo"},
    "loss_type": {"loss_type": "hinge"},
    "system_prompt": {"system_prompt": "أجب بإيجاز."},
    "resume_from_checkpoint": {"resume_from_checkpoint": "never"},
    "eval_steps": {"eval_steps": 250},
    "warmup_ratio": {"warmup_ratio": 0.2},
    "max_steps": {"max_steps": 7},
    "early_stopping_patience": {"early_stopping_patience": 1},
    "ddp_backend": {"ddp_backend": "gloo"},
}

# What is seen elsewhere: on other hardware, when weights are loaded or saved, in files, or on the hub.
ELSEWHERE = {
    "model_name": "tests/models/test_loading.py",
    "column_map": "tests/data/test_sources.py",
    "torch_dtype": "tests/models/test_precision.py",
    "dataloader_pin_memory": "tests/engine/test_trainer.py",
    "dataset_split": "tests/data/test_sources.py",
    "dataset_config": "tests/data/test_sources.py",
    "output_dir": "tests/runs/test_checkpoints.py",
    "overwrite_output_dir": "tests/runs/test_checkpoints.py",
    "resume_from_checkpoint": "tests/runs/test_checkpoints.py",
    "resume_changed": "tests/runs/test_checkpoints.py",
    "load_in_4bit": "tests/models/test_quantization.py",
    "load_in_8bit": "tests/engine/test_gpu.py",
    "base_precision": "tests/models/test_fp8.py",
    "fp16": "tests/models/test_precision.py",
    "bf16": "tests/models/test_precision.py",
    "use_flash_attention": "tests/engine/test_gpu.py",
    "torch_compile": "tests/models/test_compilation.py",
    "use_lora": "tests/training/test_base_trainer.py",
    "merge_and_save": "tests/training/test_base_trainer.py",
    "token_budget": "tests/engine/test_trainer.py",  # memory and speed, never results
    "optim": "tests/engine/test_gpu.py",
    "loss_spikes": "tests/engine/test_guards.py",
    "max_bad_rows": "tests/data/test_bad_rows.py",
    "eval_samples": "tests/generation/test_samples.py",
    "dialect_model": "tests/data/test_dialects.py",
    "callbacks": "tests/training/test_base_trainer.py",
    "report_to": "tests/runs/test_report.py",
    "ddp_backend": "tests/methods/test_objectives.py",
    "deepspeed": "tests/training/test_base_trainer.py",
    "length_column_name": "tests/training/test_base_trainer.py",
    "group_by_length": "tests/packing/test_sampler.py",
    "ref_model_name": "tests/models/test_reference.py",
    "precompute_reference": "tests/models/test_reference.py",
    "unpair_preferences": "tests/data/test_preferences.py",
}

ROWS = {
    "conversation": [{"instruction": f"مَا عاصمةُ البلد رقم {n}؟", "response": "الجوابُ ـــ طويل " * 9} for n in range(9)],
    "pair": [
        {"prompt": f"مَا عاصمةُ البلد رقم {n}؟ " * 4, "chosen": "صحيحٌ ـــ " * 9, "rejected": ["خطأ", "غلط"][: 1 + n % 2]}
        for n in range(9)
    ],
    "feedback": [
        {"prompt": f"مَا عاصمةُ البلد رقم {n}؟ " * 4, "completion": "جوابٌ ـــ " * 9, "label": n % 2 == 0}
        for n in range(9)
    ],
}


@pytest.fixture
def effects(tokenizer, model_dir, tmp_path, monkeypatch):
    """What of a configuration can be seen without training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")

    def see(config):
        rows = [dict(row) for row in ROWS[METHODS[config.method].rows[0]]]
        if config.method != "cpo":
            rows = [row | ({"rejected": row["rejected"][0]} if "rejected" in row else {}) for row in rows]
        write_rows(tmp_path / "data.jsonl", rows)
        write_rows(tmp_path / "other.jsonl", rows[:5])
        seen = {"data": data_of(config), "loss": loss_of(config)}
        schedule = arguments.resolve_schedule(config, has_validation=True)
        given = arguments.training_arguments(config, schedule).to_dict()
        seen["arguments"] = {name: value for name, value in given.items() if name != "logging_dir"}
        seen["callbacks"] = [
            (type(c).__name__, getattr(c, "early_stopping_patience", 0), getattr(c, "early_stopping_threshold", 0))
            for c in run_callbacks(config, schedule)
        ]
        seen["capacity"], seen["dtype"] = config.sequence_capacity, str(precision.compute_dtype(config))
        if config.use_lora:
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
            adapted = adapters.add_lora(model, config).peft_config["default"].to_dict()
            seen["adapters"] = {name: sorted(v) if isinstance(v, set) else v for name, v in adapted.items()}
        return json.dumps(seen, default=str, sort_keys=True)

    def data_of(config):
        set_template(tokenizer, config.instruction_template, config.response_template)
        splits = METHODS[config.method].data_loader(config, tokenizer).load()
        return {name: digest(split) for name, split in splits.items()}

    def digest(split):
        if isinstance(split, GroupStream):
            return "stream"
        assert isinstance(split, GroupDataset)
        return [(g.prompt.tolist(), [c.ids.tolist() for c in (*g.completions, *g.auxiliary)]) for g in split]

    def loss_of(config):
        rng = np.random.default_rng(0)
        pairs = METHODS[config.method].rows[0] == "pair"
        completions, groups = (9, 3) if pairs and config.method == "cpo" else (6, 3) if pairs else (3, 3)
        chosen = torch.arange(0, completions, completions // groups) if pairs else torch.tensor([0, 2])
        others = torch.tensor([c for c in range(completions) if c not in chosen.tolist()], dtype=torch.long)
        targets = torch.arange(completions).repeat_interleave(4)
        scores = Scores(
            logps=torch.tensor(-rng.random(len(targets)) - 0.1),
            reference_logps=torch.tensor(-rng.random(len(targets)) - 0.1),
            target_completion=targets,
            completion_group=torch.arange(completions) // (completions // groups),
            chosen=chosen,
            rejected=others,
            num_targets=torch.full((completions,), 4),
            lengths=torch.full((completions,), 4.0),
            tags=torch.zeros(groups, dtype=torch.long),
            mean_chosen_length=4.0,
            auxiliary=torch.tensor([0.3, 3.0]),
        )
        found = METHODS[config.method].make_objective(config).loss(scores)
        return [found.losses.tolist(), None if found.rewards is None else found.rewards.tolist()]

    return see


def settings(method, key):
    """Two configurations that differ in this key, where it acts."""
    other = OTHER.get(key)
    field = METHOD_CONFIGS[method].model_fields[key]
    if other is None:
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool) or default is None:
            other = {key: not default if isinstance(default, bool) else 5}
        elif isinstance(default, float):
            other = {key: default / 2 if default else 0.25}
        else:
            assert isinstance(default, int), f"{key} needs a value in OTHER"
            other = {key: default + 1}
    base = {"dataset_path": "data.jsonl", "torch_dtype": "bfloat16", "max_seq_length": 400, "max_prompt_length": 300}
    base = {name: value for name, value in base.items() if name in METHOD_CONFIGS[method].model_fields}
    without = {name: value for name, value in other.items() if name != key}
    if key == "diacritics" or method == "sft":
        base.pop("max_prompt_length", None)
    return METHOD_CONFIGS[method](**(base | without)), METHOD_CONFIGS[method](**(base | other))


def own_keys(method):
    fields = METHOD_CONFIGS[method].model_fields
    common = BaseConfig.model_fields
    return [name for name in fields if name not in common or repr(fields[name]) != repr(common[name])]


COMMON = [("sft", key) for key in BaseConfig.model_fields]
OWN = [(method, key) for method in BUILT_IN for key in own_keys(method)]


@pytest.mark.parametrize(("method", "key"), [*COMMON, *OWN])
def test_acts(method, key, effects):
    if key in ELSEWHERE or len(get_args(METHOD_CONFIGS[method].model_fields[key].annotation)) == 1:  # it has one value
        return
    one, other = settings(method, key)
    assert getattr(one, key) != getattr(other, key)
    assert effects(one) != effects(other), f"{method}: {key} changes nothing that is seen"


def test_what_is_seen_elsewhere_is_tested_there():
    for key, file in ELSEWHERE.items():
        with open(file, encoding="utf-8") as test:
            assert key in test.read(), f"{file} does not test {key}"


DOCUMENTED = [
    ("ipo", {"beta": 0.1, "tau": 0.1, "label_smoothing": 0.0}),
    ("cpo", {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 1.0, "loss_type": "sigmoid"}),
]


@pytest.mark.parametrize(("method", "values"), DOCUMENTED)
def test_documented_defaults_are_taken_in_silence(method, values):
    assert METHOD_CONFIGS[method](**values).notices() == []


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("ipo", {"beta": 0.3}, "beta: 0.3 does nothing here: in IPO it only scales the rewards"),
        ("cpo", {"simpo_gamma": 0.5}, "simpo_gamma: 0.5 does nothing here: it is the margin of loss_type simpo"),
        ("dpo", {"discopop_tau": 0.5}, "discopop_tau: 0.5 does nothing here"),
        ("sft", {"use_lora": False, "lora_r": 8}, "lora_r: 8 does nothing here: use_lora is false"),
        ("sft", {"max_steps": 5, "num_train_epochs": 2}, "num_train_epochs: 2 does nothing here: max_steps"),
        ("dpo", {"loss_type": "ipo", "beta": 0.2}, "loss_type: 'ipo' is another name of method ipo with tau=0.2"),
        ("dpo", {"loss_type": "sft"}, "loss_type: 'sft' is another name of method sft"),
        (
            "cpo",
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
            "is another name of method simpo with gamma_beta_ratio=0.5",
        ),
    ],
)
def test_what_cannot_act_is_said(method, values, said):
    assert any(said in notice for notice in METHOD_CONFIGS[method](**values).notices())
