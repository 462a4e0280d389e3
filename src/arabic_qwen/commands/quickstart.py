"""`arabic-qwen quickstart`: the main job from beginning to end, with its effect shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.data.conversations import to_conversation
from arabic_qwen.models.sources import EMBEDDED_MODEL
from arabic_qwen.runs.report import METRICS_FILE, read_entries
from arabic_qwen.terminal import isolated
from arabic_qwen.training.dpo_trainer import DPOTrainer
from arabic_qwen.training.sft_trainer import SFTTrainer

_SHOWN = 6  # held-out prompts that are answered before and after


def run(model: str, data: str, output_dir: str) -> None:
    """Fine-tune `model` on `data` (empty: what comes with the package), then on preferences; print before and after."""
    tiny = not model
    common = {
        "instruction_template": "tokenizer",
        "lora_target_modules": "all-linear",
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": not tiny,
        "torch_dtype": "float32" if tiny else "bfloat16",
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "early_stopping_patience": None,
    }
    _fine_tune(model or EMBEDDED_MODEL, data or "sample:sft", f"{output_dir}/sft", tiny, common)
    _prefer(f"{output_dir}/sft", f"{output_dir}/dpo", tiny, common)
    print(
        f"\nEverything is in {output_dir}/: adapters, README.md (model card), metrics.jsonl, loss_curve.png of each stage"
    )
    print(f"Talk to it:             arabic-qwen chat {output_dir}/dpo")
    print(
        "The same, a real Qwen:  arabic-qwen quickstart --model Qwen/Qwen2.5-0.5B-Instruct --output-dir quickstart-qwen"
    )


def _fine_tune(model: str, data: str, output_dir: str, tiny: bool, common: dict[str, Any]) -> None:
    config = SFTConfig(
        model_name=model,
        dataset_path=data,
        output_dir=output_dir,
        packing=False,
        # The tiny model knows Arabic words, not conversations, so it has more to learn than a real one.
        learning_rate=1e-3 if tiny else 2e-4,
        num_train_epochs=8 if tiny else 2,
        **common,
    )
    trainer = SFTTrainer(config)
    print(f"1. Supervised fine-tuning of {model} on {data}, a tenth of the rows held out")
    held_out = trainer.get_data_loader().split()["validation"]
    held_out = held_out[:: max(1, len(held_out) // _SHOWN)][:_SHOWN]  # rows of one kind stand together
    conversations = [to_conversation(row.values) for row in held_out]
    prompts = [messages[-2]["content"] for messages in conversations]

    before = trainer.evaluate()
    answers_before = trainer.predict(prompts, max_length=48, do_sample=False)
    trainer.train()
    after = trainer.metrics
    answers_after = trainer.predict(prompts, max_length=48, do_sample=False)

    print("\nHeld-out prompts, none of them trained on:")
    for messages, old, new in zip(conversations, answers_before, answers_after, strict=True):
        print(f"\n  prompt     {isolated(messages[-2]['content'], 13)}")
        print(f"  reference  {isolated(messages[-1]['content'], 13)}")
        print(f"  before     {isolated(_one_line(old), 13)}")
        print(f"  after      {isolated(_one_line(new), 13)}")
    print(f"\nHeld-out loss {before['eval_loss']:.3f} → {after['eval_loss']:.3f} nats per token", end="")
    print(f" (perplexity {before['eval_perplexity']:.1f} → {after['eval_perplexity']:.1f})")


def _prefer(model: str, output_dir: str, tiny: bool, common: dict[str, Any]) -> None:
    config = DPOConfig(
        model_name=model,
        dataset_path="sample:dpo",
        output_dir=output_dir,
        learning_rate=3e-4 if tiny else 1e-5,
        num_train_epochs=4,
        **common,
    )
    trainer = DPOTrainer(config)
    print("\n2. Preference optimisation (DPO) of the result on sample:dpo, a tenth of the pairs held out")
    before = trainer.evaluate()
    trainer.train()
    trained = [entry for entry in read_entries(Path(output_dir, METRICS_FILE)) if "rewards/margins" in entry]
    held_out = trainer.metrics["eval_rewards/margins"], trainer.metrics["eval_rewards/accuracies"]
    margins = " → ".join(f"{entry['rewards/margins']:.2f}" for entry in trained)
    print(f"\nMargin of chosen over rejected answers while training: {margins}")
    print(
        f"Held-out pairs: margin {before['eval_rewards/margins']:.2f} → {held_out[0]:.2f}, preferred the right way round: {held_out[1]:.0%}"
    )


def _one_line(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
