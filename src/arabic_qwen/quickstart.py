"""`arabic-qwen quickstart`: the main job from beginning to end, with its effect shown."""

from __future__ import annotations

from arabic_qwen.config import SFTConfig
from arabic_qwen.data.conversations import to_conversation
from arabic_qwen.models.loading import EMBEDDED_MODEL
from arabic_qwen.training.sft_trainer import SFTTrainer

_SHOWN = 6  # held-out prompts that are answered before and after


def run(model: str, data: str, output_dir: str) -> None:
    """Fine-tune `model` on `data` (empty: what comes with the package); print held-out loss and answers, before and after."""
    tiny = not model
    config = SFTConfig(
        model_name=model or EMBEDDED_MODEL,
        dataset_path=data or "sample:sft",
        output_dir=output_dir,
        instruction_template="tokenizer",
        lora_target_modules="all-linear",
        lora_dropout=0.0,
        packing=False,
        # The tiny model knows Arabic words, not conversations, so it has more to learn than a real one.
        learning_rate=1e-3 if tiny else 2e-4,
        num_train_epochs=8 if tiny else 2,
        per_device_train_batch_size=8,
        gradient_checkpointing=not tiny,
        torch_dtype="float32" if tiny else "bfloat16",
        evaluation_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        early_stopping_patience=None,
    )
    trainer = SFTTrainer(config)
    print(f"Model {config.model_name}, data {config.dataset_path}: LoRA fine-tuning, a tenth of the rows held out.")
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
        print(f"\n  prompt     {messages[-2]['content']}")
        print(f"  reference  {messages[-1]['content']}")
        print(f"  before     {_one_line(old)}")
        print(f"  after      {_one_line(new)}")
    print(f"\nHeld-out loss {before['eval_loss']:.3f} → {after['eval_loss']:.3f} nats per token", end="")
    print(f" (perplexity {before['eval_perplexity']:.1f} → {after['eval_perplexity']:.1f})")
    print(f"Everything is in {output_dir}/: adapters, README.md (model card), metrics.jsonl, loss_curve.png")
    print(f"Talk to it:             arabic-qwen chat {output_dir}")
    print(
        "The same, a real Qwen:  arabic-qwen quickstart --model Qwen/Qwen2.5-0.5B-Instruct --output-dir quickstart-qwen"
    )


def _one_line(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
