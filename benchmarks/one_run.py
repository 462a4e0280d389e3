"""Measured training runs in a process of their own, for throughput.py and scaling.py.

    python benchmarks/one_run.py SPECIFICATION.json RESULTS.json

A process for each peer keeps their patches of torch and transformers apart. Ours does several methods in one, so that
loading and compiling, the longest part of a short run, are done once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))[0]["peer"] == "unsloth":
    import unsloth  # noqa: F401  # before the libraries that it patches

import numpy as np
import torch
import workload
from transformers import PrinterCallback, Trainer, TrainerCallback

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.errors import TrainingError
from arabic_qwen.memory.limit import is_out_of_memory
from arabic_qwen.packing.group import Group
from arabic_qwen.training.base_trainer import BaseTrainer

OUT_OF_MEMORY = "out of memory"


def lacks_memory(error: Exception) -> bool:
    return is_out_of_memory(error) or (isinstance(error, TrainingError) and OUT_OF_MEMORY in str(error))


class Clock(TrainerCallback):
    """Seconds of the steps after the warm-up, and what was compiled meanwhile; the peak of memory is theirs too."""

    def __init__(self, warmup: int):
        self.warmup = warmup

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step not in (self.warmup, state.max_steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # trying how much fits took more
            self.warmup_seconds = time.perf_counter() - self.start
            self.start, self.compiled = time.perf_counter(), _graphs_compiled()
        else:
            self.seconds = time.perf_counter() - self.start
            self.compiled = _graphs_compiled() - self.compiled


def _graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def trained(trainer: Trainer, use_lora: bool) -> dict[str, torch.Tensor]:
    """The weights that are trained: adapters alone, or all."""
    # TRL copies the adapters of a model that has some, as reference.
    found = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad and ".ref." not in n}
    if use_lora:
        assert found and all("lora_" in name for name in found), "something but adapters is trained"
    else:
        assert len(found) == len(list(trainer.model.parameters())), "not all weights are trained"
    assert all(p.dtype is torch.float32 for p in found.values()), "trained weights are not float32 masters"
    return {name: found[name] for name in sorted(found)}


@torch.no_grad()
def start_alike(trainer: Trainer) -> None:
    """The same adapters for every peer: libraries draw theirs in different orders."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in trained(trainer, use_lora=True).items():
        if "lora_A" in name:  # as PEFT does
            bound = weight.shape[1] ** -0.5
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        else:
            weight.zero_()


def record_losses(trainer: Trainer) -> list[tuple[int, torch.Tensor]]:
    """Step and loss of each call of training_step, to be filled; on the device, for to read them is to wait for them."""
    train, found = trainer.training_step, []

    def training_step(*args, **kwargs):
        loss = train(*args, **kwargs)
        found.append((trainer.state.global_step, loss.detach()))
        return loss

    trainer.training_step = training_step
    return found


def measure(trainer: Trainer, warmup: int, use_lora: bool, update_file: str | None = None) -> dict[str, Any]:
    """Train and time; asserts that every loss is finite and that every trained weight matrix has learned."""
    if use_lora:
        start_alike(trainer)
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in trained(trainer, use_lora).items()}
    clock = Clock(warmup)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    recorded = record_losses(trainer)
    trainer.train()
    losses = [0.0] * trainer.state.global_step
    for step, loss in recorded:
        losses[step] += float(loss)
    assert np.isfinite(losses).all(), f"loss is not finite: {losses}"
    updates = {name: weight.detach().cpu() - before[name] for name, weight in trained(trainer, use_lora).items()}
    still = [name for name, update in updates.items() if not update.norm() > 0]
    assert not still, f"{len(still)} trained weights had no gradient, {still[0]} first: this measured nothing"
    if update_file:
        np.save(update_file, torch.cat([update.flatten() for update in updates.values()]).numpy())
    return {
        "seconds": round(clock.seconds, 3),
        "warmup_seconds": round(clock.warmup_seconds, 1),
        "mean_loss": round(float(np.mean(losses)), 5),
        "losses": [round(loss, 5) for loss in losses],
        "peak_gb": workload.peak_gb(),
        "compiled_while_timed": clock.compiled,
        "padding_free": bool(getattr(trainer, "padding_free", False)),
        **{name: getattr(trainer, name) for name in ("token_budget", "recomputed") if hasattr(trainer, name)},
    }


def load(config: Any) -> BaseTrainer:
    """The model with adapters, or without where all weights are trained, for :func:`ours`."""
    loaded = BaseTrainer(config)
    loaded.setup_lora() if config.use_lora else loaded.setup_model_and_tokenizer()
    return loaded


def ours(loaded: BaseTrainer, config: Any, groups: list[Group]) -> Trainer:
    """Our trainer on the model that is loaded: what was compiled for another method or length is used again."""
    gc.collect()
    torch.cuda.empty_cache()  # of an earlier trainer
    trainer = BaseTrainer(config)
    trainer.model, trainer.tokenizer, trainer._start = loaded.model, loaded.tokenizer, loaded._start
    trainer.dataset = {"train": GroupDataset(groups)}
    return trainer.create_trainer(trainer.dataset, trainer.get_training_arguments(), [])


def measured(
    create: Callable[[], Trainer], warmup: int, use_lora: bool, update_file: str | None = None
) -> dict[str, Any]:
    """:func:`measure` of the trainer that `create` makes; memory that does not suffice is a result too."""
    try:
        return measure(create(), warmup, use_lora, update_file)
    except (RuntimeError, TrainingError) as error:
        if not lacks_memory(error):
            raise
        return {"failed": OUT_OF_MEMORY}


def run(specification: dict[str, Any], loaded: BaseTrainer | None) -> dict[str, Any]:
    config, groups = configured(specification)

    def create() -> Trainer:
        if loaded:
            return ours(loaded, config, groups)
        import peers

        peer = peers.unsloth_peer if specification["peer"] == "unsloth" else peers.trl_peer
        return peer(config, workload.in_training_order(config, groups), specification)

    return measured(create, specification["args"]["warmup"], config.use_lora, specification["update_file"])


def configured(specification: dict[str, Any]) -> tuple[BaseConfig, list[Group]]:
    """The run's configuration in our terms, and the examples of all its steps."""
    args = argparse.Namespace(**specification["args"])
    total = args.warmup + args.steps
    config = workload.configuration(
        specification["method"],
        args,
        f"{specification['folder']}/output",
        max_steps=total,
        per_device_train_batch_size=args.batch_size,
        logging_steps=total,
    )
    return config, workload.load_groups(config, args)


def run_all(specifications: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results of runs of one peer."""
    first = specifications[0]
    loaded = load(configured(first)[0]) if first["peer"].startswith("ours") else None
    for specification in specifications:
        yield run(specification, loaded)


def main() -> None:
    results = []
    for result in run_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        results.append(result)
        workload.write_json(sys.argv[2], results)


if __name__ == "__main__":
    workload.script(main)
