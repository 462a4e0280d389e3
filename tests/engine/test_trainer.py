"""The engine against TRL, against itself cut and interrupted in other ways, and against itself on two processes."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from arabic_qwen.config import SFTConfig
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.packing.batch import pack
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.preference_runs import ready, relative_difference, train_on_two_processes

pytestmark = pytest.mark.engine


def sft_config(model_dir, sft_file, output_dir, **values):
    settings = dict(
        model_name=str(model_dir),
        dataset_path=str(sft_file),
        output_dir=str(output_dir),
        torch_dtype="float32",
        instruction_template="chatml",
        packing=False,
        validation_split=0.2,
        lora_dropout=0.0,
        lora_target_modules="all-linear",
        learning_rate=1e-3,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        eval_samples=0,
    )
    return SFTConfig(**(settings | values))


def trained_weights(config):
    trainer = BaseTrainer(config)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, trainer


def initial_adapter(config):
    model = add_lora(AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32), config)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_equal_trl(model_dir, sft_file, tmp_path, accumulation):
    import trl

    config = sft_config(
        model_dir, sft_file, tmp_path / "ours", gradient_accumulation_steps=accumulation, validation_split=0
    )
    start = initial_adapter(config)
    ours, trainer = trained_weights(config)

    loader = trainer.trainer.get_train_dataloader()
    trainer.trainer.state.epoch = 0
    order = loader.batch_sampler.order()
    assert len(order) >= 3 * 2 * accumulation
    rows = []
    for index in order[: 3 * 2 * accumulation]:
        ((prompt, ((ids, targets, _),), *_),) = loader.dataset[index]
        labels = [-100] * len(prompt) + [int(i) if t else -100 for i, t in zip(ids, targets, strict=True)]
        rows.append({"input_ids": [*prompt.tolist(), *ids.tolist()], "labels": labels})

    model = add_lora(AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32), config)
    peer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=config.weight_decay,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=trainer.tokenizer,
    )
    peer.train()
    theirs = {name: p.detach() for name, p in peer.model.named_parameters() if p.requires_grad}

    assert ours.keys() == theirs.keys() == start.keys()
    assert relative_difference(ours, theirs, start) < 1e-3
    our_losses = [entry["loss"] for entry in trainer.trainer.state.log_history if "loss" in entry]
    their_losses = [entry["loss"] for entry in peer.state.log_history if "loss" in entry]
    assert our_losses == pytest.approx(their_losses, abs=1e-4)


@pytest.mark.parametrize("use_lora", [True, False])
def test_result_does_not_depend_on_the_token_budget(model_dir, sft_file, tmp_path, use_lora):
    def run(name, budget):
        config = sft_config(model_dir, sft_file, tmp_path / name, use_lora=use_lora, token_budget=budget)
        config.per_device_train_batch_size = 5
        return trained_weights(config)[0]

    whole, cut = run("whole", 100_000), run("cut", 1)
    assert all(torch.allclose(whole[name], cut[name], atol=2e-5) for name in whole)
    assert any(not torch.equal(whole[name], cut[name]) for name in whole)  # they were computed differently


def test_gradient_checkpointing_and_workers_change_nothing(model_dir, sft_file, tmp_path):
    plain, _ = trained_weights(sft_config(model_dir, sft_file, tmp_path / "a"))
    other, _ = trained_weights(
        sft_config(model_dir, sft_file, tmp_path / "b", gradient_checkpointing=True, dataloader_num_workers=2)
    )
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_all_layers_recompute_from_the_first_step(model_dir, sft_file, tmp_path, monkeypatch):
    norm, calls = Qwen2RMSNorm.forward, []

    def counted(*args):
        calls.append(args)
        return norm(*args)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", counted)
    numbers = []
    for recompute in (False, True):
        calls.clear()
        values = dict(validation_split=0, token_budget=10_000, max_steps=1)
        BaseTrainer(
            sft_config(model_dir, sft_file, tmp_path / str(recompute), gradient_checkpointing=recompute, **values)
        ).train()
        numbers.append(len(calls))
    assert numbers == [5, 9]  # two in each of two layers, and the last one


class StopAfter(TrainerCallback):
    """As a crash would, right after a checkpoint was written."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_interrupted_and_resumed_equals_uninterrupted(model_dir, sft_file, tmp_path, stop):
    # dropout, two epochs, a ragged last step, accumulation
    values = dict(
        lora_dropout=0.1, max_steps=None, num_train_epochs=2, gradient_accumulation_steps=2, save_steps=1, eval_steps=1
    )
    whole, trainer = trained_weights(sft_config(model_dir, sft_file, tmp_path / "whole", **values))
    assert trainer.trainer.state.global_step > 4

    interrupted = BaseTrainer(sft_config(model_dir, sft_file, tmp_path / "cut", callbacks=[StopAfter(stop)], **values))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed, again = trained_weights(sft_config(model_dir, sft_file, tmp_path / "cut", **values))
    assert str(again.trainer._resumed_from).endswith(f"checkpoint-{stop}")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [
        e["step"]
        for e in map(json.loads, (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in e
    ]
    assert steps == sorted(steps)


def test_packed_sequences_fill_max_seq_length(model_dir, sft_file, tmp_path):
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path, packing=True, max_seq_length=128, max_steps=1))
    trainer.train()
    sequences = trainer.trainer.get_train_dataloader().dataset
    assert sorted(i for members in sequences.members for i in members) == list(range(len(trainer.dataset["train"])))
    assert max(sequences.lengths) <= 128
    assert len(sequences) < len(trainer.dataset["train"])


def test_evaluation_is_the_token_mean_over_the_whole_set(model_dir, sft_file, tmp_path):
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path, per_device_eval_batch_size=2, validation_split=0.5))
    metrics = trainer.evaluate()
    total = count = 0.0
    for group in trainer.dataset["validation"]:
        with torch.no_grad():
            logps = trainer.model(packed=pack([group]))
        total, count = total - logps.sum().item(), count + len(logps)
    assert metrics["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_two_processes_equal_one(model_dir, sft_file, tmp_path):
    """Batch 2 on one process equals batch 1 on two, at a ragged end too (an odd number of rows, one epoch)."""
    values = dict(max_steps=None, num_train_epochs=1, save_steps=100, validation_split=0.25, eval_samples=2)
    one, trainer = trained_weights(sft_config(model_dir, sft_file, tmp_path / "one", **values))
    assert len(trainer.dataset["train"]) % 2 == 1
    config = sft_config(
        model_dir, sft_file, tmp_path / "two", per_device_train_batch_size=1, ddp_backend="gloo", **values
    )
    two = train_on_two_processes(config)
    assert load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert relative_difference(two, one, initial_adapter(config)) < 1e-4
    losses = [
        [
            e["eval_loss"]
            for e in map(json.loads, (tmp_path / n / "metrics.jsonl").read_text().splitlines())
            if "eval_loss" in e
        ]
        for n in ("one", "two")
    ]
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=1e-5)
    samples = [(tmp_path / name / "samples.jsonl").read_text(encoding="utf-8").splitlines() for name in ("one", "two")]
    assert len(samples[0]) == len(samples[1])


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_are_pinned_for_a_gpu(pinned, model_dir, sft_file, tmp_path, monkeypatch):
    engine = ready(sft_config(model_dir, sft_file, tmp_path, dataloader_pin_memory=pinned), seed=None).trainer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine.args.dataloader_pin_memory = pinned  # which TrainingArguments takes back without a GPU
    assert engine.get_train_dataloader().pin_memory is pinned
