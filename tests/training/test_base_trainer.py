"""BaseTrainer's documented behaviour, and what the documents leave open."""

import json
import logging
import shutil
import types
from pathlib import Path
from typing import get_args

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, get_scheduler

from arabic_qwen.config import DPOConfig, SFTConfig, load_config
from arabic_qwen.engine.arguments import planned_tokens
from arabic_qwen.errors import ConfigurationError, DatasetError, ModelLoadError, TrainingError
from arabic_qwen.training.base_trainer import BaseTrainer
from arabic_qwen.training.sft_trainer import SFTTrainer, create_sft_trainer

pytestmark = pytest.mark.engine


@pytest.fixture
def config(model_dir, sft_file, tmp_path):
    return SFTConfig(
        model_name=str(model_dir),
        dataset_path=str(sft_file),
        output_dir=str(tmp_path / "run"),
        torch_dtype="float32",
        instruction_template="chatml",
        learning_rate=1e-3,
        max_steps=2,
        validation_split=0.25,
        eval_samples=0,
    )


@pytest.fixture
def trained(config):
    trainer = create_sft_trainer(config)
    trainer.train()
    return trainer


class TestConfigurationChecks:
    @pytest.mark.parametrize("missing", ["model_name", "dataset_path"])
    def test_missing_required_value(self, missing):
        settings = types.SimpleNamespace(model_name="m", dataset_path="d")
        delattr(settings, missing)
        with pytest.raises(ValueError, match=f"{missing} is required"):
            BaseTrainer(settings)

    def test_any_object_gets_the_defaults(self):
        settings = types.SimpleNamespace(model_name="m", dataset_path="d")
        trainer = BaseTrainer(settings)
        assert settings.use_lora is True
        assert settings.lora_r == 16
        assert trainer.config is settings
        assert trainer._get_training_method() == "sft"

    def test_any_object_is_validated(self):
        with pytest.raises(ConfigurationError, match="learning_rate"):
            BaseTrainer(types.SimpleNamespace(model_name="m", dataset_path="d", learning_rate=-1))

    def test_any_object_trains(self, config, tmp_path):
        values = {"model_name": config.model_name, "dataset_path": config.dataset_path, "torch_dtype": "float32"}
        settings = types.SimpleNamespace(**values, output_dir=str(tmp_path / "any"), max_steps=1)
        BaseTrainer(settings).train()
        assert (tmp_path / "any" / "adapter_model.safetensors").is_file()


class TestInitialState:
    def test_nothing_is_loaded(self, config):
        trainer = BaseTrainer(config)
        assert (trainer.model, trainer.tokenizer, trainer.trainer, trainer.data_loader) == (None, None, None, None)
        assert trainer.config is config
        assert trainer.logger.name == "BaseTrainer"

    def test_output_dir_defaults_to_the_method(self, monkeypatch, tmp_path, config):
        monkeypatch.chdir(tmp_path)
        default = SFTConfig(
            model_name=config.model_name, dataset_path=config.dataset_path, max_steps=1, torch_dtype="float32"
        )
        BaseTrainer(default).train()
        assert default.output_dir == "./checkpoints"
        assert Path("checkpoints/sft/adapter_config.json").is_file()


class TestSetup:
    def test_model_and_tokenizer(self, config):
        trainer = BaseTrainer(config)
        trainer.setup_model_and_tokenizer()
        model = trainer.model
        trainer.setup_model_and_tokenizer()
        assert trainer.model is model
        assert len(trainer.tokenizer) > 0

    def test_padding_token(self, config):
        trainer = BaseTrainer(config)
        trainer.setup_model_and_tokenizer()
        trainer.tokenizer.pad_token = None
        trainer._setup_padding_token()
        assert trainer.tokenizer.pad_token == trainer.tokenizer.eos_token
        trainer.tokenizer.pad_token = trainer.tokenizer.eos_token = None
        trainer.tokenizer.unk_token = "<|endoftext|>"
        trainer._setup_padding_token()
        assert trainer.tokenizer.eos_token == "<|endoftext|>"

    def test_embedding_grows_with_the_vocabulary(self, config):
        trainer = BaseTrainer(config)
        trainer.setup_model_and_tokenizer()
        rows = trainer.model.get_input_embeddings().num_embeddings
        trainer.tokenizer.add_tokens([f"<new{i}>" for i in range(rows - len(trainer.tokenizer) + 3)])
        trainer._setup_padding_token()
        assert trainer.model.get_input_embeddings().num_embeddings == rows + 3

    def test_lora_follows_the_configuration(self, config):
        config.lora_r, config.lora_alpha, config.lora_target_modules = 4, 8, ["q_proj", "k_proj", "o_proj"]
        trainer = BaseTrainer(config)
        trainer.setup_lora()
        lora = trainer.model.peft_config["default"]
        assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (4, 8, {"q_proj", "k_proj", "o_proj"})
        trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trainable and all("lora_" in name for name in trainable)

    def test_earlier_callers_of_the_steps_may_still_train(self, config, caplog):
        trainer = BaseTrainer(config)
        trainer.setup_model_and_tokenizer()
        trainer.setup_lora()
        model = trainer.model
        trainer.train()
        assert trainer.model is model
        assert "has adapters" not in caplog.text

    def test_data(self, config):
        dataset = BaseTrainer(config).load_and_validate_dataset()
        assert len(dataset["train"]) == 9
        assert len(dataset["validation"]) == 3
        assert type(BaseTrainer(config).get_data_loader()).__name__ == "SFTDataLoader"


class TestTrainingArguments:
    def test_documented_mapping(self, config):
        config.warmup_ratio, config.group_by_length, config.run_name = 0.25, True, "mine"
        config.evaluation_strategy, config.eval_steps, config.save_steps = "steps", 50, 100
        args = BaseTrainer(config).get_training_arguments()
        assert args.output_dir == config.output_dir
        assert args.get_warmup_steps(100) == 25
        assert args.train_sampling_strategy == "group_by_length"
        assert args.eval_strategy == "steps" and args.eval_steps == 50 and args.save_steps == 100
        assert args.load_best_model_at_end and args.metric_for_best_model == "eval_loss" and not args.greater_is_better
        assert args.run_name == "mine"
        assert args.logging_nan_inf_filter is False
        assert args.optim == "adamw_torch_fused"

    @pytest.mark.parametrize(
        ("values", "said", "expected"),
        [
            ({"evaluation_strategy": "no"}, "last model is kept", {"load_best_model_at_end": False}),
            ({"eval_steps": 30, "save_steps": 70}, "save_steps 60", {"save_steps": 60, "load_best_model_at_end": True}),
            ({"eval_steps": 30, "save_steps": 4}, "save_steps 3,", {"save_steps": 3, "load_best_model_at_end": True}),
            ({"save_strategy": "epoch"}, "last model is kept", {"load_best_model_at_end": False}),
            ({"validation_split": 0}, "no validation rows", {"eval_strategy": "no", "load_best_model_at_end": False}),
        ],
    )
    def test_contradictions_are_resolved_and_said(self, config, caplog, values, said, expected):
        for name, value in values.items():
            setattr(config, name, value)
        args = BaseTrainer(config).get_training_arguments()
        assert said in caplog.text
        assert {name: getattr(args, name) for name in expected} == expected

    @pytest.mark.parametrize(("name", "value"), [("report_to", "nowhere"), ("deepspeed", "no/such.json")])
    def test_what_transformers_refuses_is_a_configuration_error(self, config, name, value):
        setattr(config, name, value)
        with pytest.raises(ConfigurationError, match=str(value)[:8]):
            BaseTrainer(config).get_training_arguments()

    @pytest.mark.parametrize("name", sorted(get_args(SFTConfig.model_fields["lr_scheduler_type"].annotation)))
    def test_every_schedule_is_transformers_and_needs_nothing_more(self, config, name):
        config.lr_scheduler_type = name
        args = BaseTrainer(config).get_training_arguments()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        assert get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=4)


class TestCallbacks:
    def test_early_stopping_by_default(self, config):
        config.early_stopping_patience, config.early_stopping_threshold = 5, 0.001
        (stopper,) = [c for c in BaseTrainer(config).get_callbacks() if isinstance(c, EarlyStoppingCallback)]
        assert (stopper.early_stopping_patience, stopper.early_stopping_threshold) == (5, 0.001)

    def test_own_early_stopping_replaces_it(self, config):
        mine = EarlyStoppingCallback(early_stopping_patience=7)
        config.callbacks = [mine]
        assert [c for c in BaseTrainer(config).get_callbacks() if isinstance(c, EarlyStoppingCallback)] == [mine]

    def test_none_without_evaluation(self, config, caplog):
        config.evaluation_strategy, config.callbacks = "no", [EarlyStoppingCallback()]
        assert not [c for c in BaseTrainer(config).get_callbacks() if isinstance(c, EarlyStoppingCallback)]
        assert "no early stopping" in caplog.text

    def test_own_callbacks_are_called(self, config):
        class Custom(TrainerCallback):
            epochs = 0

            def on_epoch_end(self, args, state, control, **kwargs):
                self.epochs += 1

        config.callbacks = [Custom()]
        BaseTrainer(config).train()
        assert config.callbacks[0].epochs >= 1


class TestTrain:
    def test_run_directory(self, trained, config):
        folder = Path(config.output_dir)
        names = {path.name for path in folder.iterdir()}
        assert names >= {
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "training_config.yaml",
            "metrics.jsonl",
            "loss_curve.png",
            "README.md",
            "run_summary.json",
            "checkpoint-2",
        }
        assert SFTConfig.from_yaml(folder / "training_config.yaml") == config
        assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [e["step"] for e in entries if "eval_loss" in e][-1] == 2
        card = (folder / "README.md").read_text()
        assert str(folder.parent) not in card and Path(config.dataset_path).name in card
        for part in ("base_model:", "9 examples", "eval_perplexity", "learning_rate", "load_model", "loss_curve.png"):
            assert part in card

    def test_loss_falls_and_adapters_move(self, config):
        config.max_steps, config.learning_rate, config.packing = 30, 1e-2, False
        trainer = BaseTrainer(config)
        trainer.train()
        losses = [e["loss"] for e in trainer.trainer.state.log_history if "loss" in e]
        assert losses[-1] < 0.8 * losses[0]

    def test_finished_run_is_left_as_it_is(self, trained, config, caplog):
        before = {p: p.read_bytes() for p in Path(config.output_dir).rglob("*") if p.is_file()}
        again = create_sft_trainer(config)
        again.train()
        assert "finished" in caplog.text
        assert before == {p: p.read_bytes() for p in Path(config.output_dir).rglob("*") if p.is_file()}
        assert again.metrics == trained.metrics
        assert isinstance(again.predict("مرحبا", max_length=2), str)

    def test_other_settings_do_not_overwrite_a_run(self, trained, config):
        adapter = Path(config.output_dir, "adapter_model.safetensors")
        first = adapter.read_bytes()
        config.learning_rate = 5e-4
        create_sft_trainer(config).train()
        assert Path(f"{config.output_dir}-1", "adapter_model.safetensors").read_bytes() == first != adapter.read_bytes()

    def test_other_settings_do_not_go_on_from_an_unfinished_run(self, trained, config):
        Path(config.output_dir, "run_summary.json").unlink()
        config.learning_rate = 5e-4
        with pytest.raises(ConfigurationError, match=r"learning_rate: 0.001 → 0.0005.*overwrite_output_dir"):
            create_sft_trainer(config).train()
        config.overwrite_output_dir = True
        create_sft_trainer(config).train()

    def test_a_finished_run_of_a_version_that_did_not_normalise(self, trained, config, caplog):
        record = Path(config.output_dir, "training_config.yaml")
        record.write_text("\n".join(line for line in record.read_text().splitlines() if "normalize" not in line))
        create_sft_trainer(config).train()
        assert "holds this run, finished" in caplog.text

    def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(self, trained, config, caplog):
        Path(config.output_dir, "run_summary.json").unlink()
        Path(config.output_dir, "checkpoint-3").mkdir()
        create_sft_trainer(config).train()
        assert "checkpoint-3: manifest.json is missing, so it is passed over" in caplog.text
        assert f"Going on from {config.output_dir}/checkpoint-2" in caplog.text

    def test_a_run_that_cannot_start_leaves_nothing(self, trained, config, tmp_path):
        for values in ({"dataset_path": "none.jsonl"}, {"metric_for_best_model": "bleu"}):
            broken = config.model_copy(update=values | {"output_dir": str(tmp_path / "new")})
            with pytest.raises(TrainingError):
                create_sft_trainer(broken).train()
        assert not (tmp_path / "new").exists()
        with pytest.raises(DatasetError):  # nor does it set aside what is there
            create_sft_trainer(config.model_copy(update={"dataset_path": "none.jsonl"})).train()
        assert Path(config.output_dir, "run_summary.json").is_file()

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_file_in_the_way_of_the_output_is_said_at_once(self, config, tmp_path, name):
        (tmp_path / "file").write_text("mine")
        config.output_dir, config.model_name = str(tmp_path / name), "never/loaded"
        with pytest.raises(ConfigurationError, match=r"output_dir: .*file is a file.*choose another"):
            create_sft_trainer(config).train()

    def test_a_run_that_is_trained_on_is_not_set_aside(self, trained, config):
        config.learning_rate, config.model_name = 5e-4, config.output_dir
        with pytest.raises(ConfigurationError, match="other settings"):
            create_sft_trainer(config).train()

    def test_overwriting_keeps_foreign_files(self, trained, config):
        foreign = Path(config.output_dir, "notes.txt")
        foreign.write_text("mine")
        config.overwrite_output_dir = True
        create_sft_trainer(config).train()
        assert foreign.read_text() == "mine"

    def test_without_validation_rows(self, config):
        config.validation_split = 0
        trainer = create_sft_trainer(config)
        trainer.train()
        assert trainer.metrics == {}
        with pytest.raises(DatasetError, match="validation_split"):
            trainer.evaluate()

    def test_unknown_metric(self, config):
        config.metric_for_best_model = "eval_bleu"
        with pytest.raises(ConfigurationError, match="eval_perplexity"):
            create_sft_trainer(config).train()

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [("model_name", "no/such-model", ModelLoadError), ("dataset_path", "missing.jsonl", DatasetError)],
    )
    def test_missing_inputs(self, config, name, value, error):
        setattr(config, name, value)
        with pytest.raises(error, match=value):
            create_sft_trainer(config).train()

    @pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
    def test_reporting_without_its_package(self, config, monkeypatch, name):
        monkeypatch.setattr("arabic_qwen.engine.arguments.get_available_reporting_integrations", lambda: [])
        config.report_to = ["none", name]
        with pytest.raises(
            ConfigurationError, match=rf"report_to: {name} is not installed; pip install 'arabic-qwen\[{name}"
        ):
            BaseTrainer(config).get_training_arguments()

    def test_unknown_reporting(self, config):
        config.report_to = "wandbb"
        with pytest.raises(ConfigurationError, match=r"report_to: 'wandbb' is unknown; choose from none, .*, wandb"):
            BaseTrainer(config).get_training_arguments()

    @pytest.mark.parametrize(
        ("use_lora", "rate", "said"), [(False, 2e-4, True), (False, 1e-5, False), (True, 2e-4, False)]
    )
    def test_learning_rate_of_adapters_for_all_weights(self, config, caplog, use_lora, rate, said):
        config.use_lora, config.learning_rate = use_lora, rate
        with caplog.at_level(logging.WARNING):
            BaseTrainer(config).train()
        assert ("learning_rate: 0.0002 suits adapters" in caplog.text) == said

    @pytest.mark.parametrize(
        ("length", "rope", "said"),
        [
            (64, {"rope_type": "default"}, False),
            (65, {"rope_type": "default", "factor": None}, True),
            (128, {"rope_type": "linear", "factor": 2.0}, False),
            (65, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, True),
            (80, {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 16}, False),
        ],
    )
    def test_longer_than_the_model_was_made_for(self, config, model_dir, tmp_path, caplog, length, rope, said):
        shutil.copytree(model_dir, tmp_path / "short")
        path = tmp_path / "short" / "config.json"
        settings = {"max_position_embeddings": 64, "rope_parameters": rope | {"rope_theta": 10_000.0}}
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        config.model_name, config.max_seq_length = str(tmp_path / "short"), length
        BaseTrainer(config).prepare()
        assert ("short was made for 64 tokens, and longer examples come out wrong" in caplog.text) == said

    def test_bf16_without_support(self, config, monkeypatch):
        monkeypatch.setattr("arabic_qwen.models.precision._processor_has_bf16", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        config.bf16 = True
        with pytest.raises(ConfigurationError, match="bf16"):
            create_sft_trainer(config).train()


class TestSavingAndLoading:
    def test_adapter_round_trip(self, trained, config):
        answer = trained.predict("ما عاصمة الأردن؟", max_length=8, do_sample=False)
        other = BaseTrainer(SFTConfig(model_name="unused", torch_dtype="float32"))
        other.load_model(config.output_dir)
        assert isinstance(other.model, PeftModel)
        assert other.predict("ما عاصمة الأردن؟", max_length=8, do_sample=False) == answer
        assert other.evaluate(config.dataset_path) == pytest.approx(trained.evaluate(config.dataset_path))

    def test_prompt_format_is_restored(self, config):
        config.system_prompt, config.instruction_template = "أجب بإيجاز.", "alpaca"
        trained = create_sft_trainer(config)
        trained.train()
        other = BaseTrainer(SFTConfig(model_name="unused", torch_dtype="float32"))
        other.load_model(config.output_dir)
        assert other.config.system_prompt == "أجب بإيجاز."
        assert "### Instruction" in other.tokenizer.chat_template

    @pytest.mark.parametrize("merge_and_save", [True, False])
    def test_whole_models(self, config, merge_and_save, tmp_path):
        config.use_lora = config.merge_and_save = merge_and_save
        trainer = create_sft_trainer(config)
        trainer.train()
        names = {path.name for path in Path(config.output_dir).iterdir()}
        assert "model.safetensors" in names and not any(name.startswith("adapter_") for name in names)
        other = BaseTrainer(SFTConfig(model_name="unused", torch_dtype="float32"))
        other.load_model(config.output_dir)
        assert not isinstance(other.model, PeftModel)
        rows = config.dataset_path
        assert other.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], abs=1e-4)

    def test_save_elsewhere(self, trained, tmp_path):
        trained.save_model(str(tmp_path / "copy"))
        assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()

    def test_nothing_to_save(self, config):
        with pytest.raises(TrainingError, match="train"):
            BaseTrainer(config).save_model()

    def test_training_goes_on_from_a_loaded_model(self, trained, config, tmp_path):
        other = SFTTrainer(config.model_copy(update={"output_dir": str(tmp_path / "more")}))
        other.load_model(config.output_dir)
        start = {n: p.clone() for n, p in other.model.named_parameters() if "lora_" in n}
        saved = {n: p for n, p in trained.model.named_parameters() if "lora_" in n}
        assert all(torch.equal(start[n], saved[n]) for n in saved)
        other.train()
        assert any(not torch.equal(p, start[n]) for n, p in other.model.named_parameters() if "lora_B" in n)

    def test_questions_are_read_as_in_training(self, config):
        config.diacritics = {"instruction": "strip", "response": "keep"}
        trained = create_sft_trainer(config)
        trained.train()
        other = BaseTrainer(SFTConfig(model_name="unused", torch_dtype="float32"))
        other.load_model(config.output_dir)
        assert other.config.diacritics == config.diacritics
        plain, typed = "ما عاصمة الأردن؟", "مَـا عاصِمَة ﺍﻷﺭﺩﻥ؟\u200f"
        answer = other.predict(plain, max_length=6, do_sample=False)
        assert other.predict(typed, max_length=6, do_sample=False) == answer
        other.config.normalize, other.config.diacritics = False, "keep"
        assert other.predict(plain, max_length=6, do_sample=False) == answer
        assert other.predict(typed, max_length=6, do_sample=False) != answer


class TestStages:
    @pytest.mark.parametrize("second", ["adapter", "full"])
    @pytest.mark.parametrize("first", ["adapter", "merged", "full"])
    def test_second_stage_starts_where_the_first_ended(self, config, tmp_path, caplog, first, second):
        config.merge_and_save, config.use_lora = first == "merged", first != "full"
        stage1 = create_sft_trainer(config)
        stage1.train()
        settings = config.model_dump() | {"model_name": config.output_dir, "output_dir": str(tmp_path / "stage2")}
        stage2_config = SFTConfig(**settings | {"use_lora": second == "adapter", "merge_and_save": False})
        stage2 = create_sft_trainer(stage2_config)
        assert stage2.evaluate()["eval_loss"] == pytest.approx(stage1.metrics["eval_loss"], abs=1e-4)
        assert "has adapters" not in caplog.text
        stage2.train()
        assert stage2.metrics["eval_loss"] != stage1.metrics["eval_loss"]
        assert ("has adapters, which training goes on with" in caplog.text) == (first == second == "adapter")
        loaded = BaseTrainer(SFTConfig(model_name="unused", torch_dtype="float32"))
        loaded.load_model(str(tmp_path / "stage2"))
        rows = config.dataset_path
        assert loaded.evaluate(rows)["eval_loss"] == pytest.approx(stage2.evaluate(rows)["eval_loss"], abs=1e-4)

    def test_template_of_the_first_stage_is_kept_unless_another_is_named(self, trained, config, caplog):
        values = {"model_name": config.output_dir, "dataset_path": config.dataset_path, "torch_dtype": "float32"}
        keeps = BaseTrainer(SFTConfig(**values))
        keeps.get_data_loader()
        assert keeps.config.instruction_template == "chatml"
        assert "<|im_start|>" in keeps.tokenizer.chat_template
        assert "unset it to keep that one" not in caplog.text
        changes = BaseTrainer(SFTConfig(**values, instruction_template="alpaca"))
        changes.get_data_loader()
        assert "### Instruction" in changes.tokenizer.chat_template
        assert "unset it to keep that one" in caplog.text

    def test_normalisation_of_the_first_stage_is_kept_unless_another_is_named(self, config, tmp_path):
        config.normalize, config.diacritics = False, "strip"
        create_sft_trainer(config).train()
        values = {"model_name": config.output_dir, "dataset_path": config.dataset_path, "torch_dtype": "float32"}
        for given, expected in (({}, (False, "strip")), ({"diacritics": "keep"}, (False, "keep"))):
            later = BaseTrainer(SFTConfig(**values, **given))
            later.get_data_loader()
            assert (later.config.normalize, later.config.diacritics) == expected

    def test_diacritics_by_column_of_an_earlier_stage(self, config, tmp_path):
        """Its questions were read as `instruction`; so are the prompts of this stage, and its answers keep theirs."""
        config.diacritics = {"instruction": "strip", "response": "keep"}
        create_sft_trainer(config).train()
        rows = [{"prompt": f"مَن {n}؟", "chosen": "عُمَرُ", "rejected": "لا"} for n in range(4)]
        data = tmp_path / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = dict(model_name=config.output_dir, dataset_path=str(data), torch_dtype="float32", eval_samples=0)
        values |= dict(max_steps=1, output_dir=str(tmp_path / "second"))
        second = BaseTrainer(DPOConfig(**values))
        second.train()
        given = second.config.diacritics
        assert given == config.diacritics
        again = BaseTrainer(DPOConfig(**values | {"output_dir": str(tmp_path / "again"), "diacritics": given}))
        again.train()  # as the second's own config.yaml says
        (group,) = second.data_loader.encode(rows[:1])
        assert "من 0" in second.tokenizer.decode(group.prompt)
        assert "عُمَرُ" in second.tokenizer.decode(group.completions[0].ids)
        own = DPOConfig(**values | {"model_name": config.model_name, "output_dir": str(tmp_path / "own")})
        own.diacritics = given
        with pytest.raises(ConfigurationError, match="no row has instruction, response"):
            BaseTrainer(own).train()

    def test_own_template_goes_with_the_output(self, config, tmp_path):
        path = tmp_path / "own.jinja"
        path.write_text(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        config.instruction_template = str(path)
        trainer = BaseTrainer(config)
        trainer.train()
        path.unlink()
        later = BaseTrainer(SFTConfig(model_name=config.output_dir, dataset_path=config.dataset_path))
        later.get_data_loader()
        assert later.config.instruction_template == "tokenizer"
        assert later.tokenizer.chat_template == trainer.tokenizer.chat_template
        loaded = BaseTrainer(load_config(Path(config.output_dir, "training_config.yaml")))
        loaded.load_model(config.output_dir)
        assert loaded.predict("سؤال", max_length=2) is not None


class TestEvaluateAndPredict:
    def test_any_rows(self, trained, config):
        rows = [{"instruction": "ما عاصمة قطر؟", "response": "الدوحة."}]
        direct = trained.evaluate(rows)
        assert direct == trained.evaluate(Dataset.from_list(rows))
        assert set(direct) >= {"eval_loss", "eval_perplexity"}
        with pytest.raises(DatasetError, match="row 0"):
            trained.evaluate([{"question": "?"}])

    def test_base_model_before_training(self, config):
        before = BaseTrainer(config)
        assert before.evaluate()["eval_loss"] > 0
        assert isinstance(before.model, PeftModel)  # the model that train() begins with
        assert planned_tokens(config, before.dataset) > 0
        held_out = before.dataset["validation"]
        assert planned_tokens(config, {"train": held_out, "validation": held_out}) == 0  # as evaluate() asks

    def test_batched_predictions_equal_single_ones(self, trained):
        prompts = ["ما عاصمة الأردن؟", "مرحبا", "اكتب جملة قصيرة عن البحر في فصل الشتاء"]
        singles = [trained.predict(p, max_length=6, do_sample=False) for p in prompts]
        assert trained.predict(prompts, max_length=6, do_sample=False) == singles

    def test_max_length_counts_new_tokens(self, trained):
        answer = trained.generate_response("مرحبا", max_length=1, do_sample=False)
        assert len(trained.tokenizer(answer).input_ids) <= 1

    def test_sampling_parameters(self, trained):
        sampling = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1)
        assert isinstance(trained.predict("مرحبا", max_length=4, **sampling), str)

    def test_predict_before_anything_else(self, config):
        assert isinstance(BaseTrainer(config).predict("مرحبا", max_length=2), str)


class CustomTrainer(BaseTrainer):
    def _get_training_method(self) -> str:
        return "custom"

    def create_trainer(self, dataset, training_args, callbacks):
        return Trainer(
            model=self.model,
            args=training_args,
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("validation"),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )


class TestCustomMethod:
    def test_plain_trainer(self, config, caplog):
        caplog.set_level(logging.INFO)
        trainer = CustomTrainer(config)
        trainer.train()
        expected = {"input_ids", "attention_mask", "labels", trainer.config.length_column_name}
        assert expected <= set(trainer.dataset["train"].column_names)
        assert trainer.metrics["eval_loss"] > 0
        assert Path(config.output_dir, "adapter_model.safetensors").is_file()

    def test_plain_trainer_measures_what_ours_does(self, config):
        config.per_device_eval_batch_size = 100  # Trainer means over batches, ours over tokens
        plain = CustomTrainer(config)
        assert plain.evaluate()["eval_loss"] == plain.evaluate(plain.dataset["validation"])["eval_loss"]
        assert plain.metrics["eval_loss"] == pytest.approx(BaseTrainer(config).evaluate()["eval_loss"], abs=1e-4)

    def test_create_trainer_must_be_overridden(self, config):
        class Unfinished(BaseTrainer):
            def _get_training_method(self):
                return "custom"

        with pytest.raises(NotImplementedError, match="create_trainer"):
            Unfinished(config).train()
