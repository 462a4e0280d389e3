"""The preference trainers' documented interface."""

import json
import types
from pathlib import Path

import pytest
import torch

from arabic_qwen.config import (
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    SFTConfig,
    SimPOConfig,
)
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.training.base_trainer import BaseTrainer
from arabic_qwen.training.dpo_trainer import DPOTrainer, create_dpo_trainer
from arabic_qwen.training.preference_trainer import (
    CPOTrainer,
    IPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    PreferenceTrainer,
    create_cpo_trainer,
    create_ipo_trainer,
    create_kto_trainer,
    create_orpo_trainer,
)
from arabic_qwen.training.simpo_trainer import SimPOTrainer, create_simpo_trainer
from tests.preference_runs import ROWS, preference_config, write_data, write_rows

pytestmark = pytest.mark.engine

FACTORIES = {
    "dpo": (create_dpo_trainer, DPOTrainer, DPOConfig),
    "kto": (create_kto_trainer, KTOTrainer, KTOConfig),
    "ipo": (create_ipo_trainer, IPOTrainer, IPOConfig),
    "cpo": (create_cpo_trainer, CPOTrainer, CPOConfig),
    "simpo": (create_simpo_trainer, SimPOTrainer, SimPOConfig),
    "orpo": (create_orpo_trainer, ORPOTrainer, ORPOConfig),
}
QUESTION = ROWS[0][0]


@pytest.fixture
def config(model_dir, tmp_path):
    """Method, values -> a configuration of one step; the files are in its own folder."""

    def build(method, **values):
        folder = tmp_path / method
        folder.mkdir(exist_ok=True)
        return preference_config(
            method, model_dir, write_data(method, folder), folder / "run", **({"max_steps": 1} | values)
        )

    return build


@pytest.mark.parametrize("method", FACTORIES)
class TestEveryMethod:
    def test_factory(self, method, config):
        create, cls, config_class = FACTORIES[method]
        settings = config(method)
        trainer = create(settings)
        assert type(trainer) is cls
        assert isinstance(trainer, PreferenceTrainer)
        assert isinstance(trainer, BaseTrainer)
        assert trainer.config is settings
        assert cls.config_class is config_class
        assert trainer._get_training_method() == method
        assert trainer.logger.name == cls.__name__

    def test_refuses_another_methods_configuration(self, method, config):
        create, cls, config_class = FACTORIES[method]
        for other in (*FACTORIES, "sft"):
            if other == method:
                continue
            wrong = SFTConfig() if other == "sft" else config(other)
            with pytest.raises(ConfigurationError) as error:
                create(wrong)
            assert str(error.value) == f"{cls.__name__} needs a {config_class.__name__}, not a {type(wrong).__name__}"

    def test_any_object_is_completed(self, method):
        create, _, config_class = FACTORIES[method]
        settings = types.SimpleNamespace(model_name="m", dataset_path="d")
        trainer = create(settings)
        assert trainer.config is settings
        for name, field in config_class.model_fields.items():
            if name not in ("model_name", "dataset_path"):
                assert getattr(settings, name) == field.get_default(call_default_factory=True)
        assert trainer._get_training_method() == method

    def test_any_object_is_checked(self, method):
        create, _, _ = FACTORIES[method]
        with pytest.raises(ConfigurationError, match="beta"):
            create(types.SimpleNamespace(model_name="m", dataset_path="d", beta=-1))
        with pytest.raises(ValueError, match="dataset_path is required"):
            create(types.SimpleNamespace(model_name="m"))

    def test_trains_evaluates_saves_and_loads(self, method, config):
        create, _, _ = FACTORIES[method]
        settings = config(method, validation_split=0.25, eval_steps=1)
        trainer = create(settings)
        trainer.train()
        metrics = trainer.evaluate()
        assert {"eval_loss", "eval_rewards/chosen", "eval_rewards/margins", "eval_rewards/accuracies"} < set(metrics)
        folder = settings.output_dir
        card = Path(folder, "README.md").read_text(encoding="utf-8")
        assert method.upper() in card.upper()

        loaded = create(settings)
        loaded.load_model(folder)
        assert loaded.evaluate() == pytest.approx(metrics, abs=1e-4)
        assert isinstance(loaded.predict(QUESTION, max_length=3), str)

    def test_base_trainer_takes_its_configuration(self, method, config):
        assert BaseTrainer(config(method))._get_training_method() == method
        assert PreferenceTrainer(config(method))._get_training_method() == method


def test_base_class_needs_a_method(config):
    with pytest.raises(ConfigurationError, match="needs a configuration class, which says the method"):
        PreferenceTrainer(types.SimpleNamespace(model_name="m", dataset_path="d"))
    with pytest.raises(ConfigurationError, match="PreferenceTrainer needs a PreferenceConfig, not a SFTConfig"):
        PreferenceTrainer(SFTConfig())


def test_any_object_trains(config, tmp_path):
    given = config("dpo")
    settings = types.SimpleNamespace(
        model_name=given.model_name,
        dataset_path=given.dataset_path,
        output_dir=str(tmp_path / "any"),
        torch_dtype="float32",
        max_steps=1,
        loss_type="ipo",
    )
    trainer = create_dpo_trainer(settings)
    trainer.train()
    assert (tmp_path / "any" / "adapter_model.safetensors").is_file()
    assert "loss_type: ipo" in (tmp_path / "any" / "training_config.yaml").read_text()


@pytest.mark.parametrize(
    "values",
    [
        {"loss_type": "exo_pair", "label_smoothing": 0.001},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "sft"},
        {"loss_type": "aot"},
        {"loss_type": "discopop"},
        {"loss_type": "sigmoid_norm"},
    ],
    ids=lambda values: values["loss_type"],
)
def test_loss_types_train(values, config):
    trainer = create_dpo_trainer(config("dpo", max_steps=2, **values))
    trainer.train()
    logged = [entry["loss"] for entry in trainer.trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(torch.isfinite(torch.tensor(logged)))


def test_bad_rows_are_named_with_file_and_line(config, tmp_path):
    rows = [{"prompt": "س", "chosen": "ج", "rejected": "ج"}, {"prompt": "س", "chosen": "ج", "rejected": "خ"}]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    trainer = create_dpo_trainer(config("dpo", dataset_path=str(path)))
    with pytest.raises(DatasetError, match=r"bad\.jsonl:1: chosen and rejected are the same"):
        trainer.train()


def test_unpaired_preferences_train(config, tmp_path):
    trainer = create_kto_trainer(config("kto", dataset_path=str(write_data("dpo", tmp_path)), unpair_preferences=True))
    trainer.train()
    labels = [group.desirable for group in trainer.dataset["train"].groups]
    assert labels == [True, False] * len(ROWS)


class TestComparison:
    KEYS = ("prompt", "trained_model_response", "reference_model_response")

    @staticmethod
    def train(config, **values):
        """A policy that has moved far from its start."""
        settings = config("dpo", learning_rate=0.1, max_steps=2, **values)
        trainer = create_dpo_trainer(settings)
        trainer.train()
        return settings, trainer

    @staticmethod
    def before(settings):
        fresh = create_dpo_trainer(settings)
        return fresh.predict([QUESTION], max_length=8, do_sample=False)[0]

    @pytest.mark.parametrize("use_lora", [True, False])
    def test_single_and_list(self, use_lora, config):
        settings, trainer = self.train(config, use_lora=use_lora)
        one = trainer.generate_comparison(QUESTION, max_length=8, do_sample=False)
        assert tuple(one) == self.KEYS
        assert one["prompt"] == QUESTION
        assert one["trained_model_response"] == trainer.predict(QUESTION, max_length=8, do_sample=False)
        assert one["reference_model_response"] == self.before(settings)
        assert one["trained_model_response"] != one["reference_model_response"]
        several = trainer.generate_comparison([QUESTION, ROWS[1][0]], max_length=8, do_sample=False)
        assert several[0] == one
        assert [row["prompt"] for row in several] == [QUESTION, ROWS[1][0]]
        assert json.dumps(several)

    @pytest.mark.parametrize("use_lora", [True, False])
    def test_after_load_model(self, use_lora, config):
        settings, trainer = self.train(config, use_lora=use_lora)
        expected = trainer.generate_comparison(QUESTION, max_length=8, do_sample=False)
        loaded = create_dpo_trainer(settings)
        loaded.load_model(settings.output_dir)
        model = loaded.model
        assert loaded.generate_comparison(QUESTION, max_length=8, do_sample=False) == expected
        assert loaded.generate_comparison(QUESTION, max_length=8, do_sample=False) == expected  # again
        assert loaded.model is model

    def test_second_stage_compares_with_the_first(self, config, tmp_path):
        first, trainer = self.train(config)
        answer = trainer.predict(QUESTION, max_length=8, do_sample=False)
        second = create_dpo_trainer(
            config(
                "dpo", model_name=first.output_dir, output_dir=str(tmp_path / "second"), learning_rate=0.1, max_steps=2
            )
        )
        second.train()
        expected = second.generate_comparison(QUESTION, max_length=8, do_sample=False)
        assert expected["reference_model_response"] == answer
        loaded = create_dpo_trainer(second.config)
        loaded.load_model(str(tmp_path / "second"))
        for _ in range(2):
            assert loaded.generate_comparison(QUESTION, max_length=8, do_sample=False) == expected
        assert not (tmp_path / "second" / "reference").exists()

    def test_reference_by_name(self, config, tmp_path, tiny_model, tokenizer):
        """It stops where the template's answers end, whatever its own configuration says."""
        other = tiny_model("qwen2", seed=5)
        other.generation_config.eos_token_id = None
        other.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        settings = config("dpo", ref_model_name=str(tmp_path / "other"))
        trainer = create_dpo_trainer(settings)
        trainer.train()
        compared = trainer.generate_comparison(QUESTION, max_length=8, do_sample=False)
        plain = create_dpo_trainer(config("dpo", model_name=str(tmp_path / "other")))
        assert compared["reference_model_response"] == plain.predict(QUESTION, max_length=8, do_sample=False)

    @pytest.mark.parametrize("method", ["kto", "cpo", "simpo"])
    def test_other_methods(self, method, config):
        create, _, _ = FACTORIES[method]
        settings = config(method)
        trainer = create(settings)
        trainer.train()
        assert tuple(trainer.generate_comparison(QUESTION, max_length=4)) == self.KEYS
        loaded = create(settings)
        loaded.load_model(settings.output_dir)
        assert tuple(loaded.generate_comparison(QUESTION, max_length=4)) == self.KEYS
