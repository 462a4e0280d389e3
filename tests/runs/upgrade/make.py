"""Makes what test_upgrade.py goes on from: runs of version 0.1.0, commit 52a6b1e, which alone has written it.

From a checkout of that commit with its own environment (torch 2.13.0, transformers 5.24.0, peft 0.21.2):

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. .venv/bin/python …/tests/runs/upgrade/make.py FOLDER

fills FOLDER with a model, data, a run of each method that was stopped by SIGTERM at its third step of six, a finished run,
and what the stopped ones would have ended with.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.conftest import CORPUS, QWEN2_SPLIT, SFT_ROWS
from tests.training.preference_runs import CONFIGS, write_data
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from arabic_qwen.config import SFTConfig
from arabic_qwen.training.base_trainer import BaseTrainer

QUESTION = "ما عاصمة الأردن؟"
METHODS = {"sft": SFTConfig, **CONFIGS}
DATA = {"sft": "sft.jsonl", "cpo": "cpo.jsonl", "kto": "kto.jsonl"}  # the others: pairs


def make_model(folder: Path) -> None:
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_data() -> None:
    lines = [json.dumps({"instruction": q, "response": a}, ensure_ascii=False) for q, a in SFT_ROWS]
    Path("sft.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for method in ("cpo", "kto"):
        write_data(method, Path())
    write_data("dpo", Path()).rename("pairs.jsonl")


def config_of(method: str, name: str):
    """Six steps with dropout, of adapters of rank 2."""
    settings = dict(
        model_name="model",
        dataset_path=DATA.get(method, "pairs.jsonl"),
        output_dir=f"runs/{name}",
        torch_dtype="float32",
        instruction_template="chatml",
        validation_split=0,
        max_seq_length=96,
        lora_r=2,
        lora_alpha=4,
        lora_dropout=0.1,
        lora_target_modules=["q_proj", "v_proj"],
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_ratio=0.1,
        gradient_checkpointing=False,
        per_device_train_batch_size={"sft": 1, "kto": 4}.get(method, 2),  # six steps an epoch
        max_steps=6,
        logging_steps=1,
        save_steps=3,
        save_total_limit=2,
        evaluation_strategy="no",
        load_best_model_at_end=False,
    )
    if method == "ipo":
        settings["precompute_reference"] = True
    return METHODS[method](**settings)


class Terminate(TrainerCallback):
    """Asks the process to stop, as a cluster does."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def train(config, *callbacks) -> BaseTrainer:
    trainer = BaseTrainer(config.model_copy(update={"callbacks": list(callbacks)}))
    trainer.train()
    return trainer


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(f"runs/{run}/adapter_model.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    os.makedirs(sys.argv[1])
    os.chdir(sys.argv[1])
    make_model(Path("model"))
    make_data()
    expected = {}
    for method in METHODS:
        stopped, copy = Path("runs", method), Path("copy")
        try:
            train(config_of(method, method), Terminate())
        except SystemExit:
            assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-3"]
            shutil.copytree(stopped, copy)
        train(config_of(method, method))
        ended = weights(method)
        expected |= {f"{method}/{name}": tensor for name, tensor in ended.items()}
        shutil.rmtree(stopped)
        copy.rename(stopped)
        train(config_of(method, "whole"))
        assert all(torch.equal(tensor, ended[name]) for name, tensor in weights("whole").items())
        shutil.rmtree("runs/whole")
    save_file(expected, "expected.safetensors")

    answer = train(config_of("sft", "finished")).predict(QUESTION, max_length=8)
    Path("expected.json").write_text(json.dumps({QUESTION: answer}, ensure_ascii=False) + "\n", encoding="utf-8")
    for checkpoint in Path("runs/finished").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in ("loss_curve.png", ".lock"):  # drawn again; names the machine
        for file in Path("runs").rglob(name):
            file.unlink()


main()
