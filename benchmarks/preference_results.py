"""What preference optimisation changes on a real model: how often the better of two unseen answers is the likelier one.

    python benchmarks/preference_results.py --model PATH --data FILE.jsonl [--methods dpo,kto] [--held-out SHARE]
        [--epochs N] [--learning-rate X] [--max-rows N] [--output-dir DIR] [--plot FILE.png] [--json]

Every method trains LoRA adapters (r=16, all linear layers, no dropout) on the same pairs (`prompt`, `chosen`,
`rejected`), eight a step; KTO learns from both answers of each. A share of the prompts is held out with all their pairs.
All methods are judged alike before and after, by the log-probabilities of the held-out answers: the share of pairs whose
chosen answer is the likelier one, as a whole and per token. Beside them stand the trainer's own metrics on the same
pairs, which each method defines in its way.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
from arabic_qwen.models.precision import compute_dtype
from arabic_qwen.models.scoring import score_completions
from arabic_qwen.packing.group import Group
from arabic_qwen.training.base_trainer import BaseTrainer

#: For LoRA; the configurations' defaults are those of full fine-tuning.
LEARNING_RATES = {"dpo": 5e-5, "ipo": 5e-5, "kto": 5e-5, "cpo": 5e-5, "simpo": 2e-5, "orpo": 1e-4}
MEASURES = {"whole_answer": "whole answer", "per_token": "per token"}
REPORTED = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


def configuration(method: str, args: argparse.Namespace, **values: Any) -> BaseConfig:
    options = {"unpair_preferences": True} if method == "kto" else {}
    return METHOD_CONFIGS[method](
        model_name=args.model,
        output_dir=f"{args.output_dir}/{method}",
        overwrite_output_dir=True,
        instruction_template="tokenizer",
        lora_target_modules="all-linear",
        lora_dropout=0.0,
        learning_rate=args.learning_rate or LEARNING_RATES[method],
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16 if method == "kto" else 8,  # answers, pairs
        gradient_checkpointing=False,
        evaluation_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        **options,
        **values,
    )


def write_split(args: argparse.Namespace) -> dict[str, str]:
    """Split once for all methods, by prompt, and write both parts; the settings that name their files."""
    config = configuration("dpo", args, dataset_path=args.data, validation_split=args.held_out)
    split = BaseTrainer(config).get_data_loader().split()
    total = sum(map(len, split.values()))
    files = {}
    for key, name in (("dataset_path", "train"), ("eval_dataset_path", "validation")):
        rows = [row.values for row in split[name]]
        if args.max_rows and args.max_rows < total:
            rows = random.Random(0).sample(rows, max(1, round(len(rows) * args.max_rows / total)))
        path = Path(args.output_dir, f"{name}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        files[key] = str(path)
    return files


def judge(trainer: BaseTrainer, pairs: list[Group]) -> dict[str, float]:
    """Share of pairs whose chosen answer is likelier."""
    with torch.no_grad():
        scores = score_completions(
            trainer.model.eval(), [(g.prompt.tolist(), [c.ids.tolist() for c in g.completions]) for g in pairs]
        )
    whole = sum(bool(chosen.sum() > rejected.sum()) for chosen, rejected in scores)
    per_token = sum(bool(chosen.mean() > rejected.mean()) for chosen, rejected in scores)
    return {"whole_answer": round(whole / len(scores), 4), "per_token": round(per_token / len(scores), 4)}


def train(config: BaseConfig, pairs: list[Group]) -> dict[str, float]:
    trainer = BaseTrainer(config)
    started = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started) / 60
    return {
        "learning_rate": config.learning_rate,
        **judge(trainer, pairs),
        **{name: round(trainer.metrics[name], 4) for name in REPORTED},
        "minutes": round(minutes, 2),
    }


def plot(before: dict[str, float], results: dict[str, dict[str, float]], path: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items(), strict=True):
        positions = range(len(results))
        axes.bar([p - 0.2 for p in positions], [before[key]] * len(results), 0.4, label="before")
        axes.bar([p + 0.2 for p in positions], [result[key] for result in results.values()], 0.4, label="after")
        axes.set_xticks(list(positions), list(results))
        axes.set(title=title, ylim=(0, 1))
    figure.axes[0].set_ylabel("held-out pairs whose chosen answer is likelier")
    figure.legend(["before", "after"], loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="arabic-qwen-tiny")
    parser.add_argument("--data", default="sample:dpo")
    parser.add_argument("--methods", default=",".join(LEARNING_RATES), help="separated by commas")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the prompts")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, help=f"for all methods; default: {LEARNING_RATES}")
    parser.add_argument("--max-rows", type=int, help="use about that many rows, chosen at random")
    parser.add_argument("--output-dir", default="./checkpoints/preference_results")
    parser.add_argument("--plot", help="default: preference_results.png in the output folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if not set(methods) <= set(LEARNING_RATES):
        parser.error(f"--methods: choose from {', '.join(LEARNING_RATES)}")

    files = write_split(args)
    configs = {method: configuration(method, args, **files) for method in methods}
    untouched = BaseTrainer(configuration("dpo", args, **files))
    untouched.setup_model_and_tokenizer()
    data = untouched.load_and_validate_dataset()
    pairs = data["validation"].groups
    before = judge(untouched, pairs)
    del untouched
    results = {method: train(config, pairs) for method, config in configs.items()}
    path = args.plot or f"{args.output_dir}/preference_results.png"
    plot(before, results, path)

    if args.json:
        report = {
            "model": args.model,
            "data": args.data,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "dtype": str(compute_dtype(next(iter(configs.values())))).removeprefix("torch."),
            "epochs": args.epochs,
            "training_pairs": len(data["train"]),
            "held_out_pairs": len(pairs),
            "before": before,
            "after": results,
            "plot": path,
        }
        print(json.dumps(report, indent=2))
        return
    print(f"{len(data['train'])} pairs, {len(pairs)} held out; chosen answer likelier, as a whole and per token:\n")
    columns = f"{'eval_loss':>10} {'accuracies':>11} {'margins':>9}"
    print(f"{'':9} {'whole':>7} {'token':>7} {'rate':>8} {columns} {'minutes':>8}")
    print(f"{'before':9} {before['whole_answer']:7.3f} {before['per_token']:7.3f}")
    for method, result in results.items():
        loss, accuracy, margin = (result[name] for name in REPORTED)
        print(
            f"{method:9} {result['whole_answer']:7.3f} {result['per_token']:7.3f} {result['learning_rate']:8.0e} "
            f"{loss:10.4f} {accuracy:11.3f} {margin:9.3f} {result['minutes']:8.2f}"
        )
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
