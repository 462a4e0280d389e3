"""What supervised fine-tuning changes on a real model: held-out loss and chrF, base, after one stage, after two.

    python benchmarks/sft_results.py --model PATH --data FILE.jsonl [--output-dir DIR] [--held-out N] [--json]

Stage 1 trains LoRA adapters on the base model; stage 2 goes on from stage 1's output folder at a quarter of the learning
rate. Both hold out the same N rows. chrF is sacrebleu's, over greedy answers to the held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import time

import sacrebleu

from arabic_qwen.config import SFTConfig
from arabic_qwen.data.conversations import to_conversation
from arabic_qwen.data.sources import read_rows
from arabic_qwen.training.sft_trainer import SFTTrainer


def score(trainer: SFTTrainer, metrics: dict[str, float]) -> dict[str, float]:
    held_out = [to_conversation(row.values) for row in trainer.get_data_loader().split()["validation"]]
    answers = trainer.predict([messages[-2]["content"] for messages in held_out], max_length=64, do_sample=False)
    chrf = sacrebleu.corpus_chrf(answers, [[messages[-1]["content"] for messages in held_out]]).score
    return {"held_out_loss": round(metrics["eval_loss"], 4), "chrf": round(chrf, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="arabic-qwen-tiny")
    parser.add_argument("--data", default="sample:sft")
    parser.add_argument("--output-dir", default="./checkpoints/sft_results")
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()

    rows = sum(1 for _ in read_rows(SFTConfig(), args.data))

    def stage(number: int, model: str) -> SFTTrainer:
        config = SFTConfig(
            model_name=model,
            dataset_path=args.data,
            output_dir=f"{args.output_dir}/stage{number}",
            validation_split=args.held_out / rows,
            instruction_template="tokenizer",
            lora_target_modules="all-linear",
            packing=False,
            per_device_train_batch_size=8,
            learning_rate=2e-4 / 4 ** (number - 1),
            num_train_epochs=args.epochs / number,
            gradient_checkpointing=False,
            evaluation_strategy="epoch",
            save_strategy="epoch",
        )
        return SFTTrainer(config)

    results: dict[str, dict[str, float]] = {}
    first = stage(1, args.model)
    results["base"] = score(first, first.evaluate())
    for name, trainer in (("stage 1", first), ("stage 2", stage(2, f"{args.output_dir}/stage1"))):
        started = time.perf_counter()
        trainer.train()
        minutes = round((time.perf_counter() - started) / 60, 1)
        results[name] = score(trainer, trainer.metrics) | {"minutes": minutes}

    if args.json:
        print(json.dumps(results, indent=2))
    else:
        for name, values in results.items():
            print(name, " · ".join(f"{key} {value}" for key, value in values.items()))


if __name__ == "__main__":
    main()
