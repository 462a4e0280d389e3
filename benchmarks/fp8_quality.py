"""What a setting costs in quality: the same training without and with it, loss by loss. By default an FP8 base.

    python benchmarks/fp8_quality.py --model PATH --data PATH [--method sft|dpo] [--steps N] [--setting KEY=VALUE]
        [--batch-size N] [--learning-rate X] [--held-out SHARE] [--output-dir DIR] [--json FILE] [--plot FILE.png]

LoRA r=16 on all linear layers, no dropout: same adapters, rows and order in both runs, so that what differs is the
setting's rounding. The held-out loss is taken before the first step and at ten places on the way. The differences are in
percent of the run without: of the last held-out loss, and of the training loss, as the mean over the last quarter of the
steps and as the largest of means over 10 steps. The JSON is written after each run, so what is finished outlives a time
limit; DIR/without/metrics.jsonl and DIR/with/metrics.jsonl have each step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import workload
import yaml
from matplotlib.figure import Figure

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
from arabic_qwen.models.precision import check_fp8
from arabic_qwen.training.base_trainer import BaseTrainer

LEARNING_RATES = {"sft": 2e-4, "dpo": 5e-5}


def configuration(name: str, setting: dict[str, Any], args: argparse.Namespace) -> BaseConfig:
    return METHOD_CONFIGS[args.method](
        model_name=args.model,
        dataset_path=args.data,
        output_dir=f"{args.output_dir}/{name}",
        overwrite_output_dir=True,
        instruction_template="tokenizer",
        max_seq_length=1024,
        lora_target_modules="all-linear",
        lora_dropout=0.0,
        learning_rate=args.learning_rate or LEARNING_RATES[args.method],
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=False,
        validation_split=args.held_out,
        eval_steps=max(1, args.steps // 10),
        eval_samples=0,
        early_stopping_patience=args.steps,
        load_best_model_at_end=False,
        save_strategy="no",
        logging_steps=1,
        **({"packing": False} if args.method == "sft" else {}),
        **setting,
    )


def train(config: BaseConfig) -> dict[str, Any]:
    """Training loss of every step, held-out loss by step, and tokens/s of the steps after the first quarter."""
    trainer = BaseTrainer(config)
    before = trainer.evaluate()["eval_loss"]
    trainer.trainer = None
    trainer.train()
    entries = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
    training = [entry for entry in entries if "loss" in entry]
    speeds = [entry["tokens_per_second"] for entry in training[len(training) // 4 :]]
    return {
        "training": [entry["loss"] for entry in training],
        "held_out": {0: before} | {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry},
        "stream_tokens_per_s": round(float(np.median(speeds)), 1),
        "peak_gb": workload.peak_gb(),
    }


def differences(without: dict[str, Any], with_it: dict[str, Any]) -> dict[str, float]:
    """In percent of the run without the setting."""
    a, b = np.array(without["training"]), np.array(with_it["training"])
    quarter = -max(1, len(a) // 4)
    window = np.ones(min(10, len(a))) / min(10, len(a))
    smooth_a, smooth_b = np.convolve(a, window, "valid"), np.convolve(b, window, "valid")
    last_a, last_b = list(without["held_out"].values())[-1], list(with_it["held_out"].values())[-1]
    found = {
        "held_out_percent": last_b / last_a - 1,
        "training_last_quarter_percent": b[quarter:].mean() / a[quarter:].mean() - 1,
        "training_largest_percent": np.abs(smooth_b / smooth_a - 1).max(),
    }
    return {name: round(100 * float(value), 3) for name, value in found.items()}


def plot(runs: dict[str, dict[str, Any]], path: str) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    training, held_out = figure.subplots(1, 2)
    for name, run in runs.items():
        training.plot(range(1, 1 + len(run["training"])), run["training"], linewidth=1, label=name)
        held_out.plot(list(run["held_out"]), list(run["held_out"].values()), marker="o", markersize=3, label=name)
    for axes, title in ((training, "training loss"), (held_out, "held-out loss")):
        axes.set(xlabel="optimizer step", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="arabic-qwen-tiny")
    parser.add_argument("--data", help="default: the sample data of the method")
    parser.add_argument("--method", choices=LEARNING_RATES, default="sft")
    parser.add_argument("--setting", type=workload.setting, default="base_precision=fp8", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=workload.positive, default=200)
    parser.add_argument("--batch-size", type=workload.positive, default=16)
    parser.add_argument("--learning-rate", type=float, help=f"default: {LEARNING_RATES}")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the rows")
    parser.add_argument("--output-dir", default="./checkpoints/fp8_quality")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    args.data = args.data or f"sample:{args.method}"
    key, _, value = args.setting.partition("=")
    plain, changed = (configuration(*run, args) for run in (("without", {}), ("with", {key: yaml.safe_load(value)})))
    check_fp8(changed)  # before the first run
    runs: dict[str, dict[str, Any]] = {}
    report = workload.machine() | {"settings": vars(args), "runs": runs}
    runs["without"] = train(plain)
    workload.write_json(args.json, report)
    runs[args.setting] = train(changed)
    found = differences(*runs.values())
    workload.write_json(args.json, report | {"differences": found})
    if args.plot:
        plot(runs, args.plot)
    print(f"{args.method}, {args.steps} steps, {args.setting}; difference in percent of the run without:\n")
    print("\n".join(f"{name.removesuffix('_percent'):24} {percent:+8.3f}" for name, percent in found.items()))
    for name, run in runs.items():
        last = list(run["held_out"].values())[-1]
        print(
            f"{name:24} held-out loss {last:.4f}, {run['stream_tokens_per_s']:,} stream tokens/s, {run['peak_gb']} GB"
        )


if __name__ == "__main__":
    workload.script(main)
