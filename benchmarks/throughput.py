"""Training speed of this package and of TRL: same model, same examples, same adapters, one process.

    python benchmarks/throughput.py --method sft [--model PATH] [--data PATH] [--steps N] [--json]

Both train LoRA (r=16, all linear layers, float32 adapters) on the same tokenised examples. TRL runs padded with batches
of similar length, and padding-free; the faster counts. Two epochs are trained and the second is timed. Tokens per second
are those of prompts and completions; padding is not counted. Without --data, lengths are log-normal: prompts of median 200 and
completions of median 250 tokens, at most 1,024 together, an eighth of that for models under 50 million parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from arabic_qwen.config import SFTConfig
from arabic_qwen.data.loaders import GroupDataset
from arabic_qwen.data.packing import Completion, Group
from arabic_qwen.models.loading import add_lora, compute_dtype, device, resolve_model_name
from arabic_qwen.training.base_trainer import BaseTrainer


class Clock(TrainerCallback):
    """Seconds that the second half of the steps takes."""

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == state.max_steps // 2:
            self.start = time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.start


def log_normal_examples(count: int, vocabulary: int, scale: float) -> list[Group]:
    """Random tokens in the length mix that instruction data has."""
    rng = np.random.default_rng(0)
    limit = int(1024 * scale)

    def length(median: float) -> int:
        return int(np.clip(rng.lognormal(np.log(median * scale), 0.6), 4, limit / 2))

    def tokens(n: int) -> np.ndarray:
        return rng.integers(0, vocabulary, n, dtype=np.int32)

    groups = []
    for _ in range(count):
        answer = tokens(length(250))
        groups.append(Group(tokens(length(200)), (Completion(answer, np.ones(len(answer), dtype=bool)),)))
    return groups


def check_update(model: torch.nn.Module, losses: list[float]) -> None:
    moved = [p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name]
    assert moved and all(value > 0 for value in moved), "adapters did not move: the benchmark measured nothing"
    assert all(np.isfinite(losses)), f"loss is not finite: {losses}"


def train_ours(config: SFTConfig, groups: list[Group]) -> tuple[float, list[float]]:
    clock = Clock()
    trainer = BaseTrainer(config)
    trainer.setup_model_and_tokenizer()
    trainer.setup_lora()
    trainer.dataset = {"train": GroupDataset(groups)}
    engine = trainer.create_trainer(trainer.dataset, trainer.get_training_arguments(), [clock])
    engine.train()
    losses = [entry["loss"] for entry in engine.state.log_history if "loss" in entry]
    check_update(trainer.model, losses)
    return clock.seconds, losses


def train_trl(config: SFTConfig, groups: list[Group], output_dir: str, padding_free: bool) -> tuple[float, list[float]]:
    """TRL on the same tokens; without padding, the exact block-diagonal mask follows from position ids."""
    rows = []
    for prompt, ((ids, targets),) in groups:
        labels = [-100] * len(prompt) + np.where(targets, ids, -100).tolist()
        rows.append({"input_ids": [*prompt.tolist(), *ids.tolist()], "labels": labels})
    dtype = compute_dtype(config)
    model = AutoModelForCausalLM.from_pretrained(resolve_model_name(config.model_name), dtype=dtype)
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=add_lora(model.to(device()), config),
        args=trl.SFTConfig(
            output_dir=output_dir,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            per_device_train_batch_size=config.per_device_train_batch_size,
            train_sampling_strategy="random" if padding_free else "group_by_length",
            padding_free=padding_free,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=config.gradient_checkpointing,
            use_cpu=not torch.cuda.is_available(),
            bf16=dtype is torch.bfloat16,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=BaseTrainer(config).get_data_loader().tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    check_update(trainer.model, losses)
    return clock.seconds, losses


def measure(method: str, model: str, data: str | None, steps: int, batch_size: int, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            model_name=model,
            dataset_path=data or "sample:sft",
            output_dir=f"{folder}/ours",
            instruction_template="tokenizer",
            max_seq_length=1024,
            packing=False,
            lora_target_modules="all-linear",
            lora_dropout=0.0,
            learning_rate=1e-4,
            max_steps=2 * steps,
            per_device_train_batch_size=batch_size,
            gradient_checkpointing=False,
            validation_split=0,
            logging_steps=1,
            save_strategy="no",
        )
        trainer = BaseTrainer(config)
        trainer.setup_model_and_tokenizer()
        parameters = sum(p.numel() for p in trainer.model.parameters())
        if data:
            groups = trainer.load_and_validate_dataset()["train"].groups[: steps * batch_size]
        else:
            scale = 1 / 8 if parameters < 50e6 else 1.0
            groups = log_normal_examples(steps * batch_size, len(trainer.tokenizer), scale)
        assert len(groups) == steps * batch_size, f"needs {steps * batch_size} rows, found {len(groups)}"
        del trainer
        tokens = sum(group.num_tokens for group in groups)

        ours, padded, padding_free, losses = [], [], [], {}
        for _ in range(rounds):
            seconds, losses["ours"] = train_ours(config, groups)
            ours.append(tokens / seconds)
            seconds, losses["trl_padded"] = train_trl(config, groups, f"{folder}/padded", padding_free=False)
            padded.append(tokens / seconds)
            seconds, losses["trl_padding_free"] = train_trl(config, groups, f"{folder}/free", padding_free=True)
            padding_free.append(tokens / seconds)
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    speeds = {"padded, grouped by length": statistics.median(padded), "padding-free": statistics.median(padding_free)}
    best = max(speeds, key=lambda name: speeds[name])
    return {
        "method": method,
        "model": model,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(compute_dtype(config)).removeprefix("torch."),
        "steps": steps,
        "batch_size": batch_size,
        "tokens": tokens,
        "mean_loss": means,
        "ours_tokens_per_s": round(statistics.median(ours), 1),
        "trl_tokens_per_s": round(speeds[best], 1),
        "trl_configuration": best,
        "all_tokens_per_s": {"ours": ours, "trl_padded": padded, "trl_padding_free": padding_free},
        "ratio": round(statistics.median(ours) / speeds[best], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["sft"], required=True)
    parser.add_argument("--model", default="arabic-qwen-tiny")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps an epoch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="repeats of both sides; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    result = measure(args.method, args.model, args.data, args.steps, args.batch_size, args.rounds)
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print(f"{result['model']} on {result['device']}, {result['dtype']}, {result['tokens']:,} tokens")
        print(f"ours {result['ours_tokens_per_s']:,} tokens/s")
        print(f"TRL  {result['trl_tokens_per_s']:,} tokens/s ({result['trl_configuration']})")
        print(f"ratio {result['ratio']}")


if __name__ == "__main__":
    main()
