import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import TrainerCallback

from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models import adapters
from arabic_qwen.models.adapters import add_lora, grow_embedding, load_adapter
from arabic_qwen.models.layers import decoder_layers
from arabic_qwen.models.loading import load_model
from arabic_qwen.models.scoring import enable_packed_forward, score_completions
from arabic_qwen.training.base_trainer import BaseTrainer


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


VARIANTS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_16"},
    {"init_lora_weights": "pissa", "use_rslora": True, "lora_bias": "lora_only"},
]


def preference_run(model_dir, tmp_path, output, **values):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i} {QUESTION}", "chosen": "عاصمة الأردن هي عمّان.", "rejected": "القراءة."} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DPOConfig(
        **{
            "model_name": str(model_dir),
            "dataset_path": str(data),
            "output_dir": str(tmp_path / output),
            "instruction_template": "chatml",
            "torch_dtype": "float32",
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.0,
            "learning_rate": 2e-3,
            "max_steps": 4,
            "save_steps": 2,
            "eval_steps": 2,
            "logging_steps": 1,
            **values,
        }
    )
    trainer = BaseTrainer(config)
    trainer.train()
    return trainer


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits.float()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
class TestVariants:
    @pytest.mark.parametrize("torch_dtype", ["bfloat16", "float32"])
    def test_first_margin_is_zero(self, model_dir, tmp_path, variant, torch_dtype):
        trainer = preference_run(model_dir, tmp_path, "run", torch_dtype=torch_dtype, **variant)
        if (
            "lora_bias" not in variant or torch_dtype == "float32"
        ):  # else the reference is the model before decomposition
            assert trainer.trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
        if "lora_bias" not in variant:
            assert trainer.trainer.state.log_history[0]["rewards/margins"] == 0
        assert abs(trainer.metrics["eval_rewards/margins"]) > 1e-3

    def test_saved_loaded_merged_and_continued(self, model_dir, tmp_path, variant):
        trainer = preference_run(model_dir, tmp_path, "run", load_best_model_at_end=False, **variant)
        trained, before = (
            logits_of(trainer.model),
            logits_of(load_model(str(model_dir), trainer.config, trainable=False)),
        )
        assert (trained - before).abs().max() > 0.01

        loaded = BaseTrainer(DPOConfig(torch_dtype="float32"))
        loaded.load_model(trainer.config.output_dir)
        close = {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(logits_of(loaded.model), trained, **close)
        pair = loaded.generate_comparison(QUESTION, max_length=4)
        untouched = BaseTrainer(
            DPOConfig(model_name=str(model_dir), torch_dtype="float32", instruction_template="chatml")
        )
        assert pair["reference_model_response"] == untouched.predict(QUESTION, max_length=4)
        torch.testing.assert_close(logits_of(loaded.model.merge_and_unload()), trained, **close)

        checkpoint = load_model(f"{trainer.config.output_dir}/checkpoint-4", trainer.config, trainable=False)
        torch.testing.assert_close(logits_of(checkpoint), trained, **close)

        merged = preference_run(
            model_dir, tmp_path, "merged", merge_and_save=True, load_best_model_at_end=False, **variant
        )
        whole = load_model(merged.config.output_dir, merged.config, trainable=False)
        torch.testing.assert_close(logits_of(whole), trained, **close)

        second = preference_run(trainer.config.output_dir, tmp_path, "second")
        assert second.trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa_niter_16"}], ids=str)
def test_resumed_equals_uninterrupted(model_dir, tmp_path, variant):
    values = {"load_best_model_at_end": False, "evaluation_strategy": "no"} | variant
    whole = preference_run(model_dir, tmp_path, "whole", **values)

    class Crash(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    config = whole.config.model_copy(update={"output_dir": str(tmp_path / "parts")})
    config.callbacks = [Crash()]
    with pytest.raises(KeyboardInterrupt):
        BaseTrainer(config).train()
    config.callbacks = []
    resumed = BaseTrainer(config)
    resumed.train()
    assert resumed.trainer.state.global_step == 4
    assert torch.equal(logits_of(resumed.model), logits_of(whole.model))


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_16"])
@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit", "use_dora"])
def test_combinations_that_cannot_be(init, key):
    with pytest.raises(
        ConfigurationError, match=f"init_lora_weights '{init}' changes the base model's weights, which {key}"
    ):
        SFTConfig(init_lora_weights=init, **{key: True})


QUESTION = "ما عاصمة الأردن؟"


class TestNewTokens:
    """A tokenizer with more tokens than the embedding has rows."""

    @pytest.fixture(params=[True, False], ids=["tied", "untied"])
    def larger(self, request, tiny_model, tokenizer, tmp_path):
        """A model's folder whose tokenizer got three Arabic tokens."""
        model = tiny_model("qwen2", tied=request.param)
        tokenizer.add_tokens(["عاصمة", "الأردن", "القراءة"])
        assert len(tokenizer) == model.config.vocab_size + 3
        model.save_pretrained(tmp_path / "larger")
        tokenizer.save_pretrained(tmp_path / "larger")
        return tmp_path / "larger"

    def run(self, larger, sft_file, config_class=SFTConfig, **values):
        config = config_class(
            **{
                "model_name": str(larger),
                "dataset_path": str(sft_file),
                "output_dir": str(larger.parent / "run"),
                "instruction_template": "chatml",
                "torch_dtype": "float32",
                "learning_rate": 1e-2,
                "max_steps": 4,
                "save_steps": 2,
                "eval_steps": 2,
                **values,
            }
        )
        trainer = BaseTrainer(config)
        trainer.train()
        return trainer

    def logits(self, trainer):
        ids = trainer.tokenizer(QUESTION, return_tensors="pt").input_ids
        assert ids.max() >= len(trainer.tokenizer) - 3
        with torch.no_grad():
            return trainer.model.eval()(ids).logits

    @pytest.mark.parametrize("values", [{}, {"merge_and_save": True}, {"use_lora": False}], ids=str)
    def test_are_trained_and_saved(self, larger, sft_file, values):
        trainer = self.run(larger, sft_file, **values)
        other = BaseTrainer(SFTConfig(torch_dtype="float32"))
        other.load_model(trainer.config.output_dir)
        torch.testing.assert_close(self.logits(other), self.logits(trainer), rtol=1e-4, atol=1e-4)
        old = len(trainer.tokenizer) - 3
        rows = trainer.model.get_input_embeddings().weight[old:]
        start = load_file(larger / "model.safetensors")["model.embed_tokens.weight"].mean(0)
        assert ((rows - start).norm(dim=1) > 1e-3).sum() >= 2  # "القراءة" may be held out

    def test_packed_and_ordinary_passes_agree(self, larger, sft_file):
        model = self.run(larger, sft_file).model.eval()
        ids = [*range(5, 12), model.config.vocab_size - 1]
        with torch.no_grad():
            ordinary = (
                model(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])
            )
            ((packed,),) = score_completions(model, [(ids[:1], [ids[1:]])])
        torch.testing.assert_close(packed, ordinary[:, 0], rtol=1e-4, atol=1e-4)

    def test_checkpoints_hold_the_rows_and_not_the_embedding(self, larger, sft_file):
        trainer = self.run(larger, sft_file)
        for folder in (trainer.config.output_dir, f"{trainer.config.output_dir}/checkpoint-2"):
            shapes = {
                n: w.shape[0] for n, w in load_file(f"{folder}/adapter_model.safetensors").items() if "lora" not in n
            }
            assert shapes and set(shapes.values()) == {3}

    @pytest.mark.parametrize("use_lora", [True, False])
    def test_preferences_start_at_margin_zero(self, larger, tmp_path, use_lora):
        data = tmp_path / "pairs.jsonl"
        row = {"prompt": QUESTION, "chosen": "عاصمة الأردن هي عمّان.", "rejected": "القراءة."}
        data.write_text("".join(json.dumps(row | {"prompt": f"{i} {QUESTION}"}) + "\n" for i in range(6)))
        first = self.run(larger, data, DPOConfig, use_lora=use_lora, lora_dropout=0.0, logging_steps=1)
        assert first.trainer.state.log_history[0]["rewards/margins"] == 0
        assert first.metrics["eval_rewards/margins"] != 0
        config = first.config.model_copy(
            update={"model_name": first.config.output_dir, "output_dir": str(tmp_path / "2")}
        )
        second = BaseTrainer(config)
        second.train()
        assert second.trainer.state.log_history[0]["rewards/margins"] == 0
        assert second.metrics["eval_rewards/margins"] != 0

    def test_embedding_larger_than_the_tokenizer_is_left_alone(self, tiny_model, tokenizer):
        model = tiny_model("qwen2", vocab_size=len(tokenizer) + 100)
        assert grow_embedding(model, len(tokenizer)) == 0
        assert add_lora(model, SFTConfig()).peft_config["default"].trainable_token_indices is None
        assert model.config.vocab_size == len(tokenizer) + 100


class TestForwardOfAdapters:
    """Under autocast adapters take the layer's input as it is, in half precision."""

    def run(self, tiny_model, *, as_peft: bool, autocast: bool = True, **values):
        config = SFTConfig(lora_target_modules="all-linear", lora_dropout=0.0, **values)
        plain = tiny_model().bfloat16()
        enable_packed_forward(plain)
        model = add_lora(plain, config).train()
        if as_peft:
            undo_forward(model)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = tensor, storage.nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            logps = torch.cat(score_completions(model, [([3, 4, 5] * 30, [[6, 7, 8] * 30])])[0])
        logps.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return logps, gradients, sum(size for _, size in kept.values())

    def test_same_results_in_less_memory(self, tiny_model):
        logps, gradients, size = self.run(tiny_model, as_peft=False)
        peft_logps, peft_gradients, peft_size = self.run(tiny_model, as_peft=True)
        assert torch.equal(logps, peft_logps)
        assert all(torch.equal(a, b) for a, b in zip(gradients, peft_gradients, strict=True)) and gradients
        assert size < 0.95 * peft_size

    @pytest.mark.parametrize("values", [{}, {"use_dora": True}], ids=str)
    def test_is_cast_without_autocast(self, tiny_model, values):
        logps, gradients, _ = self.run(tiny_model, as_peft=False, autocast=False, **values)
        assert logps.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)

    def test_doras_norms_stay_in_float32(self, tiny_model):
        logps, gradients, _ = self.run(tiny_model, as_peft=False, use_dora=True)
        peft_logps, peft_gradients, _ = self.run(tiny_model, as_peft=True, use_dora=True)
        assert torch.equal(logps, peft_logps)
        assert all(torch.equal(a, b) for a, b in zip(gradients, peft_gradients, strict=True))

    @pytest.mark.parametrize("values", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
    def test_equal_to_pefts_in_any_scale(self, tiny_model, tmp_path, values):
        """Of adapters from elsewhere too, as those with a bias."""
        options = LoraConfig(r=6, lora_alpha=7, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **values)
        get_peft_model(tiny_model(), options).save_pretrained(tmp_path)
        results = []
        for as_peft in (False, True):
            model = load_adapter(tiny_model(), str(tmp_path), trainable=True).double()
            if as_peft:
                undo_forward(model)
            logits = model(torch.arange(3, 60)[None]).logits
            logits.logsumexp(-1).sum().backward()
            results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        assert len(results[0]) > 1


def undo_forward(model):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            vars(layer).pop("forward", None)


def test_what_the_swiglu_kernel_takes(tiny_model):
    """One adapter that is on; PEFT's way computes all else."""
    model = add_lora(tiny_model("qwen2"), SFTConfig(lora_r=16, lora_target_modules="all-linear"))
    (mlp, *_) = [layer.mlp for layer in decoder_layers(model)]
    assert mlp.forward.__func__ is adapters._mlp_forward
    gate = mlp.gate_proj
    assert adapters._rank(gate) == 16
    with model.disable_adapter():
        assert adapters._rank(gate) == 0
    model.merge_adapter()
    assert adapters._rank(gate) == 0
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=8, target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert adapters._rank(gate) == adapters._rank(mlp.up_proj) == 0
    model.base_model.set_adapter("other")
    assert adapters._rank(gate) == 0 and adapters._rank(mlp.up_proj) == 8
    model.unload()
    assert adapters._rank(mlp.gate_proj) == 0
    dora = add_lora(tiny_model("qwen2"), SFTConfig(use_dora=True, lora_target_modules="all-linear"))
    assert decoder_layers(dora)[0].mlp.forward.__func__ is type(mlp).forward
