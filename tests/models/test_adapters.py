import json

import pytest
import torch
from safetensors.torch import load_file

from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.adapters import add_lora, grow_embedding
from arabic_qwen.models.loading import load_model
from arabic_qwen.models.scoring import score_completions
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
