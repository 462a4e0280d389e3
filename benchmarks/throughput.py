"""Training speed of this package and of TRL: same model, adapters, token ids and order, and the same outcome.

    python benchmarks/throughput.py --method sft|dpo|ipo|kto|cpo|simpo [--model PATH] [--data PATH] [--json]
        [--dtype T] [--steps N] [--batch-size N] [--negatives K] [--equal-lengths] [--rounds N]

Both train new LoRA adapters (r=16, all linear layers, float32, no dropout) for one epoch of 2·N steps with the same
optimizer, and the second N steps are timed; with them the reference pass of DPO, IPO and KTO, and KTO's mismatched
completions. A token counts once for each prompt with completion that it belongs to; padding and those passes do not
count. TRL's CPO takes pairs, so a row with K negatives is K pairs of a batch there: same loss, same gradient. For SFT,
TRL runs padding-free, and padded with the rows of each half sorted by length; the faster counts.

`update_difference` is ‖ours − theirs‖ / ‖theirs‖ of what training added to the adapters, all weights as one vector, and
has a limit. Another order of the rows makes it 0.25 or more; rounding makes it 1e-3 at most in float32, but up to 0.3 in
bfloat16, where the limit finds gross mistakes only. Sorted rows make other steps, so that variant is not compared.

Without --data, lengths are log-normal: prompts of median 200 and completions of median 250 tokens, at most 512 each, an
eighth of that for models under 50 million parameters. --equal-lengths makes all of them the median.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl.experimental.cpo import CPOConfig as TRLCPOConfig
from trl.experimental.cpo import CPOTrainer as TRLCPOTrainer

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
from arabic_qwen.data.loaders import GroupDataset
from arabic_qwen.data.packing import Completion, Group
from arabic_qwen.models.precision import compute_dtype, device
from arabic_qwen.models.sources import resolve_model_name
from arabic_qwen.training.base_trainer import BaseTrainer

SORTED = "padded, sorted by length"
LARGEST_DIFFERENCE = {torch.float32: 0.01, torch.bfloat16: 0.5}


class Clock(TrainerCallback):
    """Seconds that the second half of the steps takes."""

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == state.max_steps // 2:
            self.start = time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.start


class Run(NamedTuple):
    seconds: float
    mean_loss: float
    start: torch.Tensor  # all adapter weights before training
    update: torch.Tensor  # and what training added to them


def random_groups(args: argparse.Namespace, count: int, vocabulary: int, scale: float) -> list[Group]:
    """Random tokens in the length mix that instruction data has."""
    rng = np.random.default_rng(0)

    def tokens(median: float) -> np.ndarray:
        length = median if args.equal_lengths else np.clip(rng.lognormal(np.log(median), 0.6), 8, 512)
        return rng.integers(0, vocabulary, max(2, int(length * scale)), dtype=np.int32)

    def completion() -> Completion:
        ids = tokens(250)
        return Completion(ids, np.ones(len(ids), dtype=bool))

    completions = {"sft": 1, "kto": 1, "cpo": 1 + args.negatives}.get(args.method, 2)
    groups = [Group(tokens(200), tuple(completion() for _ in range(completions))) for _ in range(count)]
    if args.method == "kto":
        neighbours = [group.completions[0] for group in groups[-1:] + groups[:-1]]
        groups = [g._replace(label=i % 2 == 0, mismatched=neighbours[i]) for i, g in enumerate(groups)]
    return groups


def train(trainer: Trainer) -> Run:
    def weights() -> torch.Tensor:
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name and p.dtype is torch.float32 for name, p in trained.items())
        return torch.cat([trained[name].detach().flatten().cpu() for name in sorted(trained)])

    start, clock = weights(), Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(np.isfinite(losses)), f"loss is not finite: {losses}"
    update = weights() - start
    assert update.norm() > 0, "adapters did not move: the benchmark measured nothing"
    return Run(clock.seconds, statistics.fmean(losses), start, update)


def ours(trainer: BaseTrainer, groups: list[Group]) -> Trainer:
    trainer.setup_lora()
    trainer.dataset = {"train": GroupDataset(groups)}
    return trainer.create_trainer(trainer.dataset, trainer.get_training_arguments(), [])


class TokenisedDPO(trl.DPOTrainer):
    """Takes rows of token ids, which need no preparation."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class TokenisedKTO(trl.KTOTrainer):
    _prepare_dataset = TokenisedDPO._prepare_dataset


class TokenisedCPO(TRLCPOTrainer):
    def tokenize_row(self, feature, model=None):
        return feature


def peer(config: Any) -> tuple[type[Trainer], type[TrainingArguments], Callable[[Group], dict], dict[str, Any]]:
    """TRL's trainer and configuration class, how a group is written as its row, and the method's settings."""
    if config.method == "sft":
        options = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return trl.SFTTrainer, trl.SFTConfig, _sft_row, options
    options = {"max_length": config.max_seq_length, "beta": config.beta}
    if config.method == "dpo":
        return TokenisedDPO, trl.DPOConfig, _pair_row, options
    if config.method == "ipo":  # TRL's beta is the paper's tau
        return TokenisedDPO, trl.DPOConfig, _pair_row, options | {"loss_type": "ipo", "beta": config.tau}
    if config.method == "kto":
        return TokenisedKTO, trl.KTOConfig, _kto_row, options
    if config.method == "cpo":
        return TokenisedCPO, TRLCPOConfig, _cpo_row, options | {"cpo_alpha": config.cpo_alpha}
    gamma = config.beta * config.gamma_beta_ratio
    options |= {"loss_type": "simpo", "simpo_gamma": gamma, "cpo_alpha": 0.0}
    return TokenisedCPO, TRLCPOConfig, _cpo_row, options


def theirs(config: BaseConfig, groups: list[Group], output_dir: str, **options: Any) -> Trainer:
    """TRL on the groups in their order; `options` are for its configuration class."""
    trainer_class, config_class, row, method_options = peer(config)
    trainer = BaseTrainer(config)
    # All of our arguments: TRL's defaults for some of them are its own.
    given = trainer.get_training_arguments()
    arguments = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.init}
    arguments |= {"output_dir": output_dir, "train_sampling_strategy": "sequential", **method_options, **options}
    if config.method == "cpo":
        assert len({len(group.completions) for group in groups}) == 1, "TRL needs as many negatives in every row"
        negatives = len(groups[0].completions) - 1
        groups = [g._replace(completions=(g.completions[0], c)) for g in groups for c in g.completions[1:]]
        arguments["per_device_train_batch_size"] *= negatives
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model_name(config.model_name), dtype=compute_dtype(config), use_safetensors=True
    )
    return trainer_class(
        model=model.to(device()),
        args=config_class(**arguments),
        train_dataset=Dataset.from_list([row(group) for group in groups]),
        processing_class=trainer.get_data_loader().tokenizer,
        # A model that has adapters would get a copy of them as reference; this way TRL only switches them off.
        peft_config=LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def _sft_row(group: Group) -> dict[str, list[int]]:
    prompt, ((ids, targets),) = group.prompt.tolist(), group.completions
    return {"input_ids": prompt + ids.tolist(), "labels": [-100] * len(prompt) + np.where(targets, ids, -100).tolist()}


def _pair_row(group: Group) -> dict[str, list[int]]:
    chosen, rejected = (completion.ids.tolist() for completion in group.completions)
    return {"prompt_ids": group.prompt.tolist(), "chosen_ids": chosen, "rejected_ids": rejected}


def _kto_row(group: Group) -> dict[str, Any]:
    completion, other = (c.ids.tolist() for c in (*group.completions, group.mismatched))
    row = {"prompt_ids": group.prompt.tolist(), "completion_ids": completion, "KL_completion_ids": other}
    return row | {"label": group.label}


def _cpo_row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": "", "chosen": "", "rejected": ""}  # must be there, though nothing reads them
    prompt = group.prompt.tolist()
    for name, completion in zip(("chosen", "rejected"), group.completions, strict=True):
        ids = completion.ids.tolist()
        row[f"{name}_input_ids"], row[f"{name}_labels"] = prompt + ids, [-100] * len(prompt) + ids
        row[f"{name}_attention_mask"] = [1] * len(prompt + ids)
    return row


def load_groups(config: BaseConfig, args: argparse.Namespace) -> tuple[list[Group], list[Group]]:
    """The examples of all steps, and the same in the order in which our trainer takes them."""
    trainer = BaseTrainer(config)
    trainer.setup_model_and_tokenizer()
    count = 2 * args.steps * args.batch_size
    if args.data:
        groups = trainer.load_and_validate_dataset()["train"].groups[:count]
        assert len(groups) == count, f"needs {count} rows, found {len(groups)}"
    else:
        tiny = sum(p.numel() for p in trainer.model.parameters()) < 50e6
        groups = random_groups(args, count, len(trainer.tokenizer), 1 / 8 if tiny else 1.0)
    return groups, [groups[i] for i in ours(trainer, groups).get_train_dataloader().batch_sampler.order()]


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
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
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_steps=2 * args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=False,
        validation_split=0,
        logging_steps=1,
        save_strategy="no",
        torch_dtype=args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        **options,
    )
    groups, ordered = load_groups(config, args)
    half = len(ordered) // 2
    tokens = sum(len(group.prompt) + len(c.ids) for group in ordered[half:] for c in group.completions)
    variants: dict[str, tuple[list[Group], dict[str, Any]]] = {"padded": (ordered, {})}
    if args.method == "sft":
        by_length = [g for rows in (ordered[:half], ordered[half:]) for g in sorted(rows, key=lambda g: -g.num_tokens)]
        variants = {SORTED: (by_length, {}), "padding-free": (ordered, {"padding_free": True})}
    speeds: dict[str, list[float]] = {name: [] for name in ("ours", *variants)}
    losses, difference = {}, 0.0
    for _ in range(args.rounds):
        runs = {"ours": train(ours(BaseTrainer(config), groups))}
        for name, (rows, trl_options) in variants.items():
            runs[name] = train(theirs(config, rows, f"{folder}/trl", **trl_options))
        for name, run in runs.items():
            assert torch.equal(runs["ours"].start, run.start), "the adapters do not start alike"
            speeds[name].append(round(tokens / run.seconds, 1))
            losses[name] = round(run.mean_loss, 4)
            if name != SORTED:
                difference = max(difference, float((runs["ours"].update - run.update).norm() / run.update.norm()))
        assert difference < LARGEST_DIFFERENCE[compute_dtype(config)], f"updates differ by {difference:.3g} of TRL's"
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    best = max(variants, key=lambda name: medians[name])
    cuda = torch.cuda.is_available()
    return {
        "method": args.method,
        "model": args.model,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(compute_dtype(config)).removeprefix("torch."),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "tokens": tokens,
        "mean_loss": losses,
        "update_difference": float(f"{difference:.3g}"),
        "ours_tokens_per_s": medians["ours"],
        "trl_tokens_per_s": medians[best],
        "trl_configuration": best,
        "all_tokens_per_s": speeds,
        "ratio": round(medians["ours"] / medians[best], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["sft", "dpo", "ipo", "kto", "cpo", "simpo"], required=True)
    parser.add_argument("--model", default="arabic-qwen-tiny")
    parser.add_argument("--data")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps, after as many others")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--negatives", type=int, default=4, help="rejected completions a row, for CPO without --data")
    parser.add_argument("--equal-lengths", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="repeats of both sides; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, folder)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['model']} on {result['device']}, {result['dtype']}, {result['tokens']:,} tokens")
        print(f"ours {result['ours_tokens_per_s']:,} tokens/s")
        print(f"TRL  {result['trl_tokens_per_s']:,} tokens/s ({result['trl_configuration']})")
        print(f"ratio {result['ratio']}; the updates differ by {result['update_difference']:.2g} of TRL's")


if __name__ == "__main__":
    main()
