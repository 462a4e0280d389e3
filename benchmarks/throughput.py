"""Training speed of this package and of TRL: same model, same token ids, same adapters, one process.

    python benchmarks/throughput.py --method sft|dpo|ipo|cpo|simpo [--model PATH] [--data PATH] [--json]
        [--steps N] [--batch-size N] [--negatives K] [--equal-lengths] [--rounds N]

Both train LoRA (r=16, all linear layers, float32 adapters) on the same tokenised examples, without dropout; DPO and IPO
with the reference pass inside the timing. For SFT, TRL runs padded with batches of similar length, and padding-free; the
faster counts. TRL's CPO takes pairs, so a row with K negatives is K pairs there. Two epochs are trained and the second
is timed. A token counts once for each prompt with completion that it belongs to, padding does not count.

Without --data, lengths are log-normal: prompts of median 200 and completions of median 250 tokens, at most 512 each, an
eighth of that for models under 50 million parameters. --equal-lengths makes all of them the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl.experimental.cpo import CPOConfig as TRLCPOConfig
from trl.experimental.cpo import CPOTrainer as TRLCPOTrainer

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
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


def random_groups(count: int, completions: int, vocabulary: int, scale: float, equal: bool) -> list[Group]:
    """Random tokens in the length mix that instruction data has."""
    rng = np.random.default_rng(0)

    def tokens(median: float) -> np.ndarray:
        length = median if equal else np.clip(rng.lognormal(np.log(median), 0.6), 8, 512)
        return rng.integers(0, vocabulary, max(2, int(length * scale)), dtype=np.int32)

    def completion() -> Completion:
        ids = tokens(250)
        return Completion(ids, np.ones(len(ids), dtype=bool))

    return [Group(tokens(200), tuple(completion() for _ in range(completions))) for _ in range(count)]


def check_update(model: torch.nn.Module, losses: list[float]) -> None:
    # TRL keeps a frozen copy of the adapters as reference
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    moved = [p.abs().max().item() for p in trained.values()]
    assert moved and all(value > 0 for value in moved), "adapters did not move: the benchmark measured nothing"
    assert losses and all(np.isfinite(losses)), f"loss is not finite: {losses}"


def finish(trainer: Any, clock: Clock) -> tuple[float, list[float]]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    check_update(trainer.model, losses)
    return clock.seconds, losses


def train_ours(config: BaseConfig, groups: list[Group]) -> tuple[float, list[float]]:
    clock = Clock()
    trainer = BaseTrainer(config)
    trainer.setup_model_and_tokenizer()
    trainer.setup_lora()
    trainer.dataset = {"train": GroupDataset(groups)}
    return finish(trainer.create_trainer(trainer.dataset, trainer.get_training_arguments(), [clock]), clock)


class TokenisedDPO(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class TokenisedCPO(TRLCPOTrainer):
    def tokenize_row(self, feature, model=None):
        return json.loads(feature["tokens"])


def train_trl(config: BaseConfig, groups: list[Group], output_dir: str, **options: Any) -> tuple[float, list[float]]:
    """TRL on the same token ids; `options` are for its configuration class."""
    if config.method == "sft":
        trainer_class, config_class = trl.SFTTrainer, trl.SFTConfig
        options |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        rows = [_sft_row(group) for group in groups]
    elif config.method in ("dpo", "ipo"):
        trainer_class, config_class = TokenisedDPO, trl.DPOConfig
        options |= {
            "beta": config.beta,
            "loss_type": "ipo" if config.method == "ipo" else "sigmoid",
            "max_length": None,
        }
        rows = [_pair_row(group) for group in groups]
    else:
        trainer_class, config_class = TokenisedCPO, TRLCPOConfig
        simpo = config.method == "simpo"
        options |= {"beta": config.beta, "loss_type": "simpo" if simpo else "sigmoid", "max_length": 1024}
        options |= {"cpo_alpha": 0.0 if simpo else 1.0, "simpo_gamma": 1.0}
        rows = [_cpo_row(group.prompt, group.completions[0], n) for group in groups for n in group.completions[1:]]
    dtype = compute_dtype(config)
    model = AutoModelForCausalLM.from_pretrained(resolve_model_name(config.model_name), dtype=dtype)
    clock = Clock()
    trainer = trainer_class(
        model=add_lora(model.to(device()), config),
        args=config_class(
            output_dir=output_dir,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            per_device_train_batch_size=config.per_device_train_batch_size * len(rows) // len(groups),
            gradient_checkpointing=config.gradient_checkpointing,
            use_cpu=not torch.cuda.is_available(),
            bf16=dtype is torch.bfloat16,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=BaseTrainer(config).get_data_loader().tokenizer,
        callbacks=[clock],
    )
    return finish(trainer, clock)


def _sft_row(group: Group) -> dict[str, list[int]]:
    ((ids, targets),) = group.completions
    labels = [-100] * len(group.prompt) + np.where(targets, ids, -100).tolist()
    return {"input_ids": [*group.prompt.tolist(), *ids.tolist()], "labels": labels}


def _pair_row(group: Group) -> dict[str, list[int]]:
    chosen, rejected = group.completions
    return {
        "prompt_ids": group.prompt.tolist(),
        "chosen_ids": chosen.ids.tolist(),
        "rejected_ids": rejected.ids.tolist(),
    }


def _cpo_row(prompt: np.ndarray, chosen: Completion, rejected: Completion) -> dict[str, str]:
    tokens = {"prompt_input_ids": prompt.tolist(), "prompt_attention_mask": [1] * len(prompt)}
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        ids = [*prompt.tolist(), *completion.ids.tolist()]
        tokens[f"{name}_input_ids"], tokens[f"{name}_attention_mask"] = ids, [1] * len(ids)
        tokens[f"{name}_labels"] = [-100] * len(prompt) + completion.ids.tolist()
    # TRL's own columns must be there, though nothing reads them.
    return {"prompt": "", "chosen": "", "rejected": "", "tokens": json.dumps(tokens)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = {"packing": False} if args.method == "sft" else {"max_prompt_length": 1024}
        config = METHOD_CONFIGS[args.method](
            model_name=args.model,
            dataset_path=args.data or "sample:sft",
            output_dir=f"{folder}/ours",
            instruction_template="tokenizer",
            max_seq_length=1024,
            lora_target_modules="all-linear",
            lora_dropout=0.0,
            learning_rate=1e-4,
            max_steps=2 * args.steps,
            per_device_train_batch_size=args.batch_size,
            gradient_checkpointing=False,
            validation_split=0,
            logging_steps=1,
            save_strategy="no",
            **options,
        )
        trainer = BaseTrainer(config)
        trainer.setup_model_and_tokenizer()
        count = args.steps * args.batch_size
        if args.data:
            groups = trainer.load_and_validate_dataset()["train"].groups[:count]
        else:
            tiny = sum(p.numel() for p in trainer.model.parameters()) < 50e6
            completions = {"sft": 1, "cpo": 1 + args.negatives}.get(args.method, 2)
            vocabulary = len(trainer.tokenizer)
            groups = random_groups(count, completions, vocabulary, 1 / 8 if tiny else 1.0, args.equal_lengths)
        assert len(groups) == count, f"needs {count} rows, found {len(groups)}"
        del trainer
        tokens = sum(len(group.prompt) + len(c.ids) for group in groups for c in group.completions)

        variants: dict[str, dict[str, Any]] = {"padded": {}}
        if args.method == "sft":
            variants = {
                "padded, grouped by length": {"train_sampling_strategy": "group_by_length"},
                "padding-free": {"padding_free": True},
            }
        speeds: dict[str, list[float]] = {}
        losses: dict[str, float] = {}
        for _ in range(args.rounds):
            for name in ("ours", *variants):
                if name == "ours":
                    seconds, values = train_ours(config, groups)
                else:
                    seconds, values = train_trl(config, groups, f"{folder}/trl", **variants[name])
                speeds.setdefault(name, []).append(round(tokens / seconds, 1))
                losses[name] = round(statistics.fmean(values), 4)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max(variants, key=lambda name: medians[name])
    return {
        "method": args.method,
        "model": args.model,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(compute_dtype(config)).removeprefix("torch."),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "tokens": tokens,
        "mean_loss": losses,
        "ours_tokens_per_s": medians["ours"],
        "trl_tokens_per_s": medians[best],
        "trl_configuration": best,
        "all_tokens_per_s": speeds,
        "ratio": round(medians["ours"] / medians[best], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["sft", "dpo", "ipo", "cpo", "simpo"], required=True)
    parser.add_argument("--model", default="arabic-qwen-tiny")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps an epoch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--negatives", type=int, default=4, help="rejected completions a row, for CPO without --data")
    parser.add_argument("--equal-lengths", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="repeats of both sides; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    result = measure(args)
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
