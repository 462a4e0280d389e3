"""The reference policy: what it is for each way to train, and its log-probabilities kept on disk."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arabic_qwen.config import SFTConfig
from arabic_qwen.engine.reference_cache import precompute
from arabic_qwen.models import compilation
from arabic_qwen.models import reference as reference_module
from arabic_qwen.models.reference import OtherModel, reference_policy
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.preference_runs import (
    ROWS,
    logp,
    move_adapters,
    preference_config,
    ready,
    relative_difference,
    run,
    trainable,
    write_data,
    write_rows,
)


@pytest.fixture
def pairs(tmp_path):
    return write_data("dpo", tmp_path)


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory, model_dir):
    """The output of a supervised run with adapters, far from its base model. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("stage-one")
    rows = [{"instruction": question, "response": answer} for question, answer, _ in ROWS]
    config = SFTConfig(
        model_name=str(model_dir),
        dataset_path=str(write_rows(folder / "sft.jsonl", rows)),
        output_dir=str(folder / "out"),
        torch_dtype="float32",
        instruction_template="chatml",
        lora_target_modules="all-linear",
        validation_split=0,
        learning_rate=5e-3,
        max_steps=4,
    )
    BaseTrainer(config).train()
    return folder / "out"


@pytest.fixture
def other_dir(tmp_path_factory, tiny_model, tokenizer):
    """A model with other weights."""
    path = tmp_path_factory.mktemp("other-qwen2")
    tiny_model("qwen2", seed=5).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def plain(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def scored(trainer):
    """Policy's and reference's log-probabilities of the training set's completions."""
    engine = trainer.trainer
    with torch.no_grad():
        step = engine._collate([[group] for group in trainer.dataset["train"].groups])
        engine._add_reference(step)
        scores = [engine._score(trainer.model, batch, 1.0) for batch in step.batches]
    return torch.cat([s.policy for s in scores]), torch.cat([s.reference for s in scores])


def sums(groups):
    return [logps.sum() for group in groups for logps in group.reference]


def expected(model, trainer):
    with torch.no_grad():
        return torch.tensor([logp(model, g, c) for g in trainer.dataset["train"].groups for c in g.completions])


class TestNewAdapters:
    def test_reference_is_the_model_without_them(self, model_dir, pairs, tmp_path):
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path, token_budget=100_000))
        policy, reference = scored(trainer)
        assert torch.allclose(reference, expected(plain(model_dir), trainer), atol=2e-4)
        assert not torch.allclose(policy, reference, atol=0.1)

    @pytest.mark.parametrize("training", [True, False])
    def test_policy_is_as_before_afterwards(self, training, model_dir, pairs, tmp_path):
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path, lora_dropout=0.5))
        trainer.model.train(training)
        before = trainable(trainer.model)
        with trainer.trainer.reference(trainer.model) as frozen:
            assert not any(module.training for module in frozen.modules())  # no dropout in the reference
        assert all(module.training == training for module in trainer.model.modules())
        after = trainable(trainer.model)
        assert before.keys() == after.keys()
        assert not trainer.model.get_base_model().model.layers[0].self_attn.q_proj.disable_adapters

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_trained_biases_do_not_move_the_reference(self, bias, model_dir, pairs, tmp_path):
        """Biases stay with the base model when its adapters are switched off."""
        config = preference_config("dpo", model_dir, pairs, tmp_path, lora_bias=bias, token_budget=100_000)
        trainer = ready(config, seed=None)
        with torch.no_grad():
            biases = [p for n, p in trainer.model.named_parameters() if n.endswith("bias") and p.requires_grad]
            assert biases
            for parameter in biases:
                parameter += 0.5
        policy, reference = scored(trainer)
        assert torch.allclose(reference, expected(plain(model_dir), trainer), atol=2e-4)
        assert not torch.allclose(policy, reference, atol=0.1)


class TestSecondStage:
    """Preference training that goes on with the adapters of an earlier run."""

    def test_starts_at_margin_zero_against_the_first_stage(self, stage_one, model_dir, pairs, tmp_path):
        trainer = ready(preference_config("dpo", stage_one, pairs, tmp_path, token_budget=100_000), seed=None)
        policy, reference = scored(trainer)
        assert torch.equal(policy, reference)
        first_stage = PeftModel.from_pretrained(plain(model_dir), stage_one).eval()
        assert torch.allclose(reference, expected(first_stage, trainer), atol=2e-4)
        assert not torch.allclose(reference, expected(plain(model_dir), trainer), atol=0.1)
        metrics = trainer.evaluate([{"prompt": q, "chosen": a, "rejected": b[0]} for q, a, b in ROWS])
        assert metrics["eval_rewards/chosen"] == metrics["eval_rewards/margins"] == 0
        assert metrics["eval_loss"] == pytest.approx(0.6931472)

    def test_first_stage_does_not_move(self, stage_one, model_dir, pairs, tmp_path):
        config = preference_config("dpo", stage_one, pairs, tmp_path / "run", token_budget=100_000)
        _, trainer = run(config)
        policy, reference = scored(trainer)
        first_stage = PeftModel.from_pretrained(plain(model_dir), stage_one).eval()
        assert torch.allclose(reference, expected(first_stage, trainer), atol=2e-4)
        assert not torch.equal(policy, reference)

    def test_only_one_adapter_is_trained(self, stage_one, pairs, tmp_path):
        trainer = ready(preference_config("dpo", stage_one, pairs, tmp_path), seed=None)
        scored(trainer)
        names = trainable(trainer.model)
        assert names
        assert all(".default." in name for name in names)

    def test_saves_only_the_adapter_in_training(self, stage_one, pairs, tmp_path):
        config = preference_config("dpo", stage_one, pairs, tmp_path / "run", save_steps=1)
        ours, _ = run(config)
        folders = [tmp_path / "run", *(tmp_path / "run").glob("checkpoint-*")]
        assert len(folders) > 1
        for folder in folders:
            assert (folder / "adapter_model.safetensors").is_file()
            assert not list(folder.glob("*/adapter_model.safetensors")) or folder == tmp_path / "run"
            assert not (folder / "reference").exists()
            assert not any("reference" in name for name in load_file(folder / "adapter_model.safetensors"))
        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        assert {name.replace(".default", ""): None for name in ours} == {name: None for name in saved}

    def test_output_is_trained_on_and_generates(self, stage_one, pairs, tmp_path):
        run(preference_config("dpo", stage_one, pairs, tmp_path / "two", max_steps=1))
        again = ready(preference_config("ipo", tmp_path / "two", pairs, tmp_path / "three"), seed=None)
        policy, reference = scored(again)
        assert torch.equal(policy, reference)
        loaded = BaseTrainer(preference_config("dpo", stage_one, pairs, tmp_path / "two"))
        loaded.load_model(str(tmp_path / "two"))
        assert isinstance(loaded.predict("مرحبا", max_length=3), str)

    def test_evaluation_after_load_model_compares_with_the_first_stage(self, stage_one, pairs, tmp_path):
        config = preference_config("dpo", stage_one, pairs, tmp_path / "two", validation_split=0.25)
        _, trainer = run(config)
        assert trainer.metrics["eval_rewards/margins"] != 0
        loaded = BaseTrainer(config)
        loaded.load_model(str(tmp_path / "two"))
        assert loaded.evaluate() == pytest.approx(trainer.metrics, abs=1e-4)

    @pytest.mark.parametrize("stop", [1, 3])
    def test_interrupted_and_resumed_equals_uninterrupted(self, stop, stage_one, pairs, tmp_path, monkeypatch):
        from tests.engine.test_trainer import StopAfter

        values = dict(lora_dropout=0.1, max_steps=5, validation_split=0.25, save_steps=1, eval_steps=1)
        whole, _ = run(preference_config("dpo", stage_one, pairs, tmp_path / "whole", **values))
        config = preference_config("dpo", stage_one, pairs, tmp_path / "cut", callbacks=[StopAfter(stop)], **values)
        interrupted = BaseTrainer(config)
        with monkeypatch.context() as patch:
            patch.setattr(interrupted, "evaluate", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                interrupted.train()
        resumed, again = run(preference_config("dpo", stage_one, pairs, tmp_path / "cut", **values))
        assert str(again.trainer._resumed_from).endswith(f"checkpoint-{stop}")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class TestOtherModels:
    def test_full_fine_tuning_keeps_a_frozen_copy(self, model_dir, pairs, tmp_path):
        config = preference_config("dpo", model_dir, pairs, tmp_path / "run", use_lora=False, token_budget=100_000)
        _, trainer = run(config)
        policy, reference = scored(trainer)
        assert torch.allclose(reference, expected(plain(model_dir), trainer), atol=2e-4)
        assert not torch.allclose(policy, reference, atol=1e-2)
        with trainer.trainer.reference(trainer.model) as frozen:
            assert frozen is not trainer.model
            assert not any(parameter.requires_grad for parameter in frozen.parameters())
        assert not trainer.trainer.state.log_history[0]["rewards/margins"]  # before the first step they are equal

    def test_it_is_compiled_where_the_policy_is(self, model_dir, pairs, tmp_path, monkeypatch):
        compiled = []

        def compile_packed(model):
            compiled.append(model)
            model.compiled = True

        for module in (compilation, reference_module):
            monkeypatch.setattr(module, "compile_packed", compile_packed)
        monkeypatch.setattr(compilation, "should_compile", lambda *args: True)
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path, use_lora=False), seed=None)
        with trainer.trainer.reference(trainer.model) as frozen:
            assert compiled == [trainer.model, frozen]

    def test_full_fine_tuning_after_adapters(self, stage_one, model_dir, pairs, tmp_path):
        config = preference_config("dpo", stage_one, pairs, tmp_path, use_lora=False, token_budget=100_000)
        policy, reference = scored(ready(config, seed=None))
        assert torch.allclose(policy, reference, atol=1e-3)
        config = preference_config("dpo", model_dir, pairs, tmp_path, use_lora=False, token_budget=100_000)
        assert not torch.allclose(reference, scored(ready(config, seed=None))[1], atol=0.1)

    @pytest.mark.parametrize("use_lora", [True, False])
    def test_model_by_name(self, use_lora, model_dir, other_dir, pairs, tmp_path):
        config = preference_config(
            "dpo", model_dir, pairs, tmp_path, ref_model_name=str(other_dir), use_lora=use_lora, token_budget=100_000
        )
        trainer = ready(config, seed=None)
        policy, reference = scored(trainer)
        assert torch.allclose(reference, expected(plain(other_dir), trainer), atol=2e-4)
        assert torch.allclose(policy, expected(plain(model_dir), trainer), atol=2e-4)

    def test_adapter_by_name(self, stage_one, model_dir, pairs, tmp_path):
        config = preference_config(
            "dpo", model_dir, pairs, tmp_path, ref_model_name=str(stage_one), token_budget=100_000
        )
        trainer = ready(config)
        first_stage = PeftModel.from_pretrained(plain(model_dir), stage_one).eval()
        assert torch.allclose(scored(trainer)[1], expected(first_stage, trainer), atol=2e-4)

    def test_methods_without_reference_load_none(self, model_dir, pairs, tmp_path):
        for method in ("cpo", "simpo", "orpo"):
            assert ready(preference_config(method, model_dir, pairs, tmp_path)).trainer.reference is None


class TestHalfPrecision:
    """Policy and reference round alike, so that training starts at a margin of exactly 0."""

    @pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
    @pytest.mark.parametrize("use_lora", [True, False])
    @pytest.mark.parametrize("precompute_reference", [True, False])
    def test_first_margin_is_zero(self, method, use_lora, precompute_reference, model_dir, tmp_path):
        settings = dict(torch_dtype="bfloat16", use_lora=use_lora, precompute_reference=precompute_reference)
        settings |= dict(token_budget=60, max_steps=1)
        config = preference_config(method, model_dir, write_data(method, tmp_path), tmp_path / "run", **settings)
        first = run(config)[1].trainer.state.log_history[0]
        tolerance = 1e-2 if precompute_reference or method == "kto" else 0  # packed otherwise, so rounded otherwise
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(first[name]) <= tolerance, name


class TestPrecomputed:
    @pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
    @pytest.mark.parametrize("start", ["model", "stage_one"])
    def test_equals_on_the_fly(self, method, start, model_dir, stage_one, tmp_path):
        source = {"model": model_dir, "stage_one": stage_one}[start]
        values = dict(validation_split=0.25, beta=0.5, learning_rate=5e-3, eval_steps=2)
        data = write_data(method, tmp_path)
        config = preference_config(method, source, data, tmp_path / "a", **values)
        begin = trainable(ready(config, seed=None).model)
        live, trainer = run(config)
        kept, other = run(preference_config(method, source, data, tmp_path / "b", precompute_reference=True, **values))
        assert relative_difference(kept, live, begin) < 2e-3  # packed otherwise, so rounded otherwise
        assert other.metrics == pytest.approx(trainer.metrics, rel=1e-5, abs=1e-3)
        assert len(list((tmp_path / "b").glob("reference-*.safetensors"))) == 2  # of either split
        assert not list((tmp_path / "b").glob("*.tmp"))
        assert not list((tmp_path / "a").glob("reference-*"))

    def test_reference_is_not_called_again(self, model_dir, pairs, tmp_path, monkeypatch):
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path, precompute_reference=True))
        monkeypatch.setattr(trainer.trainer, "reference", None)
        scored(trainer)

    def test_new_rows_are_scored_on_the_fly(self, model_dir, pairs, tmp_path):
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path, precompute_reference=True))
        metrics = trainer.evaluate([{"prompt": "سؤال", "chosen": "جواب", "rejected": "خطأ"}])
        assert metrics["eval_rewards/chosen"] != 0

    def test_a_second_model_is_freed(self, model_dir, pairs, tmp_path):
        settings = dict(use_lora=False, precompute_reference=True)
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path, **settings), seed=None)
        reference = trainer.trainer.reference
        assert isinstance(reference, OtherModel)
        assert reference._frozen is None
        before = trainer.dataset["train"].groups[0].reference
        again = expected(plain(model_dir), trainer)[:2]
        assert [logps.sum() for logps in before] == pytest.approx(again.tolist(), abs=1e-3)
        metrics = trainer.evaluate([{"prompt": "سؤال", "chosen": "جواب", "rejected": "خطأ"}])  # loads it again
        assert metrics["eval_rewards/margins"] == 0

    @pytest.fixture
    def prepared(self, model_dir, pairs, tmp_path):
        trainer = ready(preference_config("dpo", model_dir, pairs, tmp_path))
        groups = trainer.dataset["train"].groups
        reference = reference_policy(trainer.model, str(model_dir), trainer.config, trainer.tokenizer)
        return trainer, groups, reference

    def test_cache_is_used(self, prepared, tmp_path, monkeypatch):
        trainer, groups, reference = prepared
        first = precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        monkeypatch.setattr("arabic_qwen.engine.reference_cache._compute", None)
        again = precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        assert sums(again) == sums(first)

    @pytest.mark.parametrize("change", ["cut", "flipped"])
    def test_damaged_cache_is_computed_again(self, prepared, tmp_path, caplog, change):
        trainer, groups, reference = prepared
        precompute([groups], trainer.model, reference, tmp_path / "cache", 100)
        (path,) = (tmp_path / "cache").iterdir()
        content = path.read_bytes()
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if change == "flipped" else b""))
        precompute([groups], trainer.model, reference, tmp_path / "cache", 100)
        assert path.read_bytes() == content
        assert f"{path}: is damaged; it is computed again" in caplog.text

    def test_training_weights_do_not_matter(self, prepared, tmp_path):
        trainer, groups, reference = prepared
        precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        move_adapters(trainer.model, 9)
        precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_other_weights(self, prepared, tmp_path):
        trainer, groups, reference = prepared
        first = precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        with torch.no_grad():
            next(p for n, p in trainer.model.named_parameters() if "layers.1.mlp.up_proj.base" in n)[0, 0] += 1
        second = precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        assert len(list((tmp_path / "cache").iterdir())) == 2
        assert sums(first) != sums(second)

    def test_other_data(self, prepared, tmp_path):
        trainer, groups, reference = prepared
        precompute([groups], trainer.model, reference, tmp_path / "cache", 100)[0]
        precompute([groups[1:]], trainer.model, reference, tmp_path / "cache", 100)[0]
        precompute([groups[::-1]], trainer.model, reference, tmp_path / "cache", 100)[0]
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_other_settings_of_the_same_weights(self, stage_one, pairs, tmp_path):
        changed = tmp_path / "changed"
        shutil.copytree(stage_one, changed)
        settings = json.loads((changed / "adapter_config.json").read_text())
        (changed / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 4 * settings["lora_alpha"]}))
        names = [
            next((tmp_path / name).glob("reference-*")).name
            for name, source in (("a", stage_one), ("b", changed))
            if ready(preference_config("dpo", source, pairs, tmp_path / name, precompute_reference=True))
        ]
        assert names[0] != names[1]

    @pytest.mark.parametrize("change", ["template", "adapter", "stage"])
    def test_whatever_changes_the_reference(self, change, model_dir, stage_one, pairs, tmp_path):
        def names(**values):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            settings = {"model_name": str(model_dir), "precompute_reference": True} | values
            ready(preference_config("dpo", settings.pop("model_name"), pairs, folder, **settings))
            return {path.name for path in folder.glob("reference-*")}

        if change == "template":
            before, after = names(), names(instruction_template="alpaca")
        elif change == "stage":
            before, after = names(), names(model_name=str(stage_one))
        else:  # the adapters of a reference by name
            before = names(ref_model_name=str(stage_one))
            other = tmp_path / "moved"
            model = PeftModel.from_pretrained(plain(model_dir), stage_one)
            move_adapters(model, 3)
            model.save_pretrained(other)
            after = names(ref_model_name=str(other))
        assert len(before) == len(after) == 1
        assert before != after
