"""Faults put into a step: what is not finite, spikes of the loss, memory that does not suffice."""

import dataclasses
import json
import math
import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import TrainerCallback

from arabic_qwen.data.locations import name_rows
from arabic_qwen.engine import guards
from arabic_qwen.engine.trainer import PackedTrainer
from arabic_qwen.errors import TrainingError
from arabic_qwen.runs import checkpoints
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import StopAfter, sft_config
from tests.preference_runs import gradients_of, preference_config, ready, write_data
from tests.runs.test_checkpoints import EXACT, outcome
from tests.training.test_base_trainer import CustomTrainer

pytestmark = pytest.mark.engine


class Faulty(BaseTrainer):
    """Trains with a fault in some calls of the loss: micro-batches, counted from 1."""

    fault = staticmethod(lambda call, losses: losses)
    arguments: ClassVar[dict] = {}
    calls = 0

    def get_training_arguments(self):
        return dataclasses.replace(super().get_training_arguments(), **self.arguments)

    def create_trainer(self, *args):
        trainer = super().create_trainer(*args)
        right = trainer.objective.loss

        def loss(scores):
            self.calls += 1
            found = right(scores)
            return found._replace(losses=self.fault(self.calls, found.losses))

        trainer.objective = dataclasses.replace(trainer.objective, loss=loss)
        return trainer


@pytest.fixture
def seen(monkeypatch):
    """The steps that are trained on."""
    steps = []
    step = PackedTrainer.training_step

    def training_step(self, model, inputs, *args):
        steps.append(inputs)
        return step(self, model, inputs, *args)

    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    return steps


def lines_of(tokenizer, sft_file, batch):
    """The lines of the file whose answers stand in a packed batch."""
    text = tokenizer.decode(batch.input_ids)
    rows = map(json.loads, sft_file.read_text(encoding="utf-8").splitlines())
    return [number for number, row in enumerate(rows, 1) if row["response"] in text]


def nan_loss(call, losses):
    return losses * math.nan if call == FAULTY_CALL else losses


def infinite_gradient(call, losses):
    if call == FAULTY_CALL:
        losses.register_hook(lambda gradient: gradient * math.inf)
    return losses


STEP = 3
FAULTY_CALL = (STEP - 1) * 4 + 2  # the second of four micro-batches
BIG = 10_000


@pytest.mark.parametrize(
    "fault, steps_per_epoch, settings, arguments",
    [
        (nan_loss, 3, {}, {}),
        (infinite_gradient, 2, dict(max_grad_norm=0), {}),  # in an epoch's first step
        (infinite_gradient, 3, dict(logging_steps=3, load_best_model_at_end=False), dict(optim="adamw_torch")),
    ],
    ids=["loss", "gradient", "optimizer without a flag"],
)
def test_what_is_not_finite_stays_out(
    fault, steps_per_epoch, settings, arguments, model_dir, sft_file, tmp_path, seen, monkeypatch
):
    values = EXACT | dict(
        token_budget=1, packing=False, num_train_epochs=2, warmup_ratio=0.2, lr_scheduler_type="cosine"
    )
    values |= dict(
        per_device_train_batch_size=4, max_samples=4 * steps_per_epoch, validation_split=0, logging_steps=BIG
    )
    values |= dict(max_steps=4, num_train_epochs=2) | settings
    monkeypatch.setattr(Faulty, "arguments", arguments)
    whole = tmp_path / "whole" / "run"
    Faulty(sft_config(model_dir, sft_file, whole, **values)).train()

    config = sft_config(model_dir, sft_file, tmp_path / "run", **values | dict(save_steps=BIG))
    seen.clear()
    stopped = Faulty(config)
    stopped.fault = fault
    with pytest.raises(TrainingError) as info:
        stopped.train()
    # The flag is read one step later, but where something else is due.
    late = not arguments and values["logging_steps"] == BIG
    assert stopped.calls == (STEP + late) * 4
    kind, batches = ("loss is nan", [1]) if fault is nan_loss else ("gradient's norm is inf", range(4))
    lines = {line for n in batches for line in lines_of(stopped.tokenizer, sft_file, seen[STEP - 1].batches[n])}
    places = ", ".join(f"{sft_file}:{line}" for line in sorted(lines))
    checkpoint = tmp_path / "run" / f"checkpoint-{STEP - 1}"
    assert f"step {STEP}: the {kind}" in str(info.value).replace("norm is nan", "norm is inf")
    assert f", in {places}; the weights are as they were before it, in {checkpoint}. " in str(info.value)
    assert checkpoints.find_checkpoints(tmp_path / "run") == [checkpoint] and checkpoints.damage(checkpoint) is None
    for name in ("adapter_model", "optimizer", "scheduler", "random"):
        for file in checkpoint.glob(f"{name}.*"):
            assert file.read_bytes() == (whole / checkpoint.name / file.name).read_bytes(), file.name

    Faulty(config).train()
    found, expected = outcome(tmp_path / "run"), outcome(whole)
    assert {k: v for k, v in found.items() if k.endswith("adapter_model.safetensors")} == {
        k: v for k, v in expected.items() if k.endswith("adapter_model.safetensors")
    }


@pytest.mark.parametrize("case", ["kto", "aot"])
def test_not_finite_in_a_pass_without_gradients(case, model_dir, tmp_path, seen, monkeypatch):
    """KTO's divergence spoils every micro-batch's loss, so all of the step's rows are named."""
    method = "dpo" if case == "aot" else "kto"
    data = write_data(method, tmp_path)
    settings = dict(loss_type="aot") if case == "aot" else {}
    config = preference_config(
        method, model_dir, data, tmp_path / "run", token_budget=1, save_steps=BIG, logging_steps=BIG, **settings
    )
    score, passes = PackedTrainer._score, []

    def nan_score(self, model, batch, *args):
        scores = score(self, model, batch, *args)
        if len(seen) == STEP - 1 and not torch.is_grad_enabled():
            passes.append(batch)
            if len(passes) == 2:
                scores.logps = scores.logps * math.nan
        return scores

    monkeypatch.setattr(PackedTrainer, "_score", nan_score)
    trainer = BaseTrainer(config)
    weights = {}

    class Before(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == STEP - 2:
                weights.update({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.config.callbacks = [Before()]
    with pytest.raises(TrainingError) as info:
        trainer.train()
    step = seen[STEP - 2]
    rows = step.rows[1] if case == "aot" else [group.row for group in step.groups]
    assert f"step {STEP - 1}: the loss is nan, in {name_rows(trainer.trainer._places, rows)}; " in str(info.value)
    assert all(torch.equal(weights[name], p) for name, p in trainer.model.named_parameters())


def test_a_bad_first_step_changes_nothing(model_dir, sft_file, tmp_path):
    trainer = Faulty(sft_config(model_dir, sft_file, tmp_path / "run", max_steps=1))
    trainer.fault = lambda call, losses: losses * math.nan
    trainer.setup_lora()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan, .* before it\. If the loss"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert checkpoints.find_checkpoints(tmp_path / "run") == []


def test_a_signal_while_flags_are_read_saves_no_bad_step(model_dir, sft_file, tmp_path, monkeypatch):
    read = guards.GuardedTrainer._read_judged

    def then_signal(self, unread):
        read(self, unread)
        if unread and self.state.global_step == STEP:
            self.stop.received = signal.SIGINT

    monkeypatch.setattr(guards.GuardedTrainer, "_read_judged", then_signal)
    config = sft_config(
        model_dir, sft_file, tmp_path / "run", token_budget=1, per_device_train_batch_size=4, max_steps=5, packing=False,
        save_steps=BIG, logging_steps=BIG, validation_split=0,
    )  # fmt: skip
    trainer = Faulty(config)
    trainer.fault = nan_loss
    with pytest.raises(TrainingError, match=f"step {STEP}: the loss is nan"):
        trainer.train()
    (checkpoint,) = checkpoints.find_checkpoints(tmp_path / "run")
    assert checkpoints.step_of(checkpoint) == STEP - 1
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == STEP - 1


class Losses(guards.GuardedTrainer):
    """Only what a step's judgement needs."""

    _optimizer_can_skip = True

    def __init__(self, loss_spikes="skip"):
        self.args = SimpleNamespace(world_size=1, device=torch.device("cpu"))
        self.accelerator = SimpleNamespace(scaler=None)
        self.optimizer = SimpleNamespace(optimizer=SimpleNamespace())
        self.state = SimpleNamespace(global_step=0)
        self.loss_spikes = loss_spikes
        self._judged, self._before = deque(), None
        self._failed, self._recent, self._known = torch.tensor(False), torch.zeros(guards._WINDOW), 0

    def skipped(self, losses):
        """Which steps' updates are left out."""
        found = []
        for step, loss in enumerate(losses):
            self.observe(torch.tensor(float(loss)), [], [])
            self._judge(None, torch.tensor(1.0))
            if self.optimizer.optimizer.found_inf:
                found.append(step)
        return found


NOISE = [2 + 0.1 * math.sin(7 * n) for n in range(60)]


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([0] * 60, []),
        ([2] * 30 + [2.05] * 30, []),  # a level that was constant has no deviation
        ([1e-6 + 1e-9 * n for n in range(30)] + [1e-3] * 30, []),
        ([0] * 30 + [1] * 30, [30]),
        (NOISE[:30] + [9] * 30, [30]),  # risen for good
        (NOISE + [9] * 30, [60, 61]),
        (NOISE[:30] + [4 + 0.3 * math.sin(5 * n) for n in range(60)], [30]),
        ([*NOISE[:30], 50, *NOISE[30:]], [30]),
        ([*NOISE[:30], 50, *NOISE[30:35], 60], [30, 36]),
        ([*NOISE[:19], 50], []),  # too few before it
        ([*(-n for n in NOISE[:30]), 5], [30]),
    ],
)
def test_what_is_a_spike(losses, expected):
    assert Losses().skipped(losses) == expected


@pytest.mark.parametrize("loss_spikes", ["log", "skip"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_spikes_are_told_and_left_out(loss_spikes, optim, model_dir, sft_file, tmp_path, monkeypatch, caplog, seen):
    monkeypatch.setattr(guards, "_FEWEST", 3)
    monkeypatch.setattr(Faulty, "arguments", dict(optim=optim))
    config = sft_config(
        model_dir, sft_file, tmp_path / "run", max_steps=5, save_steps=1, save_total_limit=None, loss_spikes=loss_spikes,
        evaluation_strategy="no", load_best_model_at_end=False, validation_split=0,
    )  # fmt: skip
    trainer = Faulty(config)
    trainer.fault = lambda call, losses: losses + (100 if call == 4 else 0)
    trainer.train()
    (warning,) = [text for text in caplog.messages if "far above" in text]
    lines = lines_of(trainer.tokenizer, sft_file, seen[3].batches[0])
    assert warning.startswith("step 4: the loss is 10")
    assert warning.endswith(f"it is of {', '.join(f'{sft_file}:{line}' for line in lines)}")
    assert ("its update is left out" in warning) == (loss_spikes == "skip")

    def saved(step):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        return [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors")]

    assert (saved(3) == saved(4)) == (loss_spikes == "skip")
    assert saved(4)[0] != saved(5)[0]


def test_the_level_is_known_after_a_resume(model_dir, sft_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guards, "_FEWEST", 3)
    config = sft_config(
        model_dir, sft_file, tmp_path / "run", max_steps=5, save_steps=1, loss_spikes="skip", validation_split=0
    )
    cut = Faulty(config.model_copy(update={"callbacks": [StopAfter(3)]}))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    trainer = Faulty(config)
    trainer.fault = lambda call, losses: losses + (100 if call == 1 else 0)
    trainer.train()
    assert [text[:7] for text in caplog.messages if "far above" in text] == ["step 4:"]


@pytest.mark.parametrize("case, calls", [("sft", 0), ("dpo", 4), ("kto", 8), ("aot", 8)])  # before the first gradient
def test_a_step_that_did_not_fit_gives_the_same_gradient(case, calls, model_dir, sft_file, tmp_path, caplog):
    method = "dpo" if case == "aot" else case
    if case == "sft":
        config = sft_config(model_dir, sft_file, tmp_path / "run", per_device_train_batch_size=8)
    else:
        settings = dict(loss_type="aot") if case == "aot" else {}
        config = preference_config(method, model_dir, write_data(method, tmp_path), tmp_path / "run", **settings)
    trainer = ready(config)
    engine, groups = trainer.trainer, trainer.dataset["train"].groups[:8]
    budget = next(
        b
        for b in range(1000, 1, -1)
        if len(dataclasses.replace(engine._collate, token_budget=b)([groups]).batches) == 4
    )
    engine.token_budget = budget

    def gradients():
        with gradients_of(trainer.model) as found:
            loss = engine.training_step(trainer.model, engine._collate([groups]))
        return loss.item(), found, {name: value.item() for name, value in engine._sums.items()}

    expected_loss, expected, sums = gradients()
    engine._sums, engine.token_budget = {}, budget
    count = 0

    def third(*_):
        nonlocal count
        count += 1
        if count == calls + 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    hook = trainer.model.register_forward_pre_hook(third)
    state = torch.get_rng_state()
    loss, found, again = gradients()
    hook.remove()
    assert count > calls + 3 and engine.token_budget < budget
    assert torch.equal(state, torch.get_rng_state())  # no dropout
    assert loss == pytest.approx(expected_loss, rel=1e-6) and again == pytest.approx(sums, rel=1e-5)
    scale = max(g.abs().max() for g in expected.values())
    assert max((found[name] - expected[name]).abs().max() for name in expected) <= 1e-6 * scale
    assert any("out of memory" in text and str(budget) in text for text in caplog.messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_with_the_smaller_budget(workers, model_dir, sft_file, tmp_path, seen, monkeypatch):
    """A third of the memory: in training, in evaluation, and for steps that a worker has packed before."""
    config = sft_config(
        model_dir, sft_file, tmp_path / "run", per_device_train_batch_size=4, dataloader_num_workers=workers,
        lora_dropout=0.1, eval_steps=1, token_budget=BIG, max_steps=2, save_steps=2,
    )  # fmt: skip
    sizes = []
    score = PackedTrainer._score

    def limited(self, model, batch, *args):
        if len(batch.input_ids) > 70 and len(batch.query_lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.input_ids))
        return score(self, model, batch, *args)

    monkeypatch.setattr(PackedTrainer, "_score", limited)
    trainer = BaseTrainer(config)
    trainer.train()
    assert [step.token_budget for step in seen][:1] == [BIG] and trainer.trainer.token_budget < 150
    assert len(sizes) > 4
    progress = json.loads((tmp_path / "run" / "checkpoint-2" / "progress.json").read_text())
    assert progress["trainer"]["token_budget"] == trainer.trainer.token_budget


def test_evaluation_that_did_not_fit(model_dir, sft_file, tmp_path, monkeypatch):
    trainer = ready(sft_config(model_dir, sft_file, tmp_path / "run", validation_split=0.5), seed=None)
    expected = trainer.evaluate()["eval_loss"]
    score = PackedTrainer._score

    def limited(self, model, batch, *args):
        if len(batch.query_lengths) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return score(self, model, batch, *args)

    monkeypatch.setattr(PackedTrainer, "_score", limited)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(PackedTrainer, "_score", lambda *args: torch.empty(1 << 60))
    with pytest.raises(TrainingError, match=rf"out of memory with {sft_file}:\d+ alone"):
        trainer.evaluate()


def test_reference_that_did_not_fit(model_dir, tmp_path, monkeypatch):
    def reference(name):
        data = write_data("dpo", tmp_path)
        trainer = ready(preference_config("dpo", model_dir, data, tmp_path / name, precompute_reference=True))
        return [float(logp) for g in trainer.dataset["train"].groups for logps in g.reference for logp in logps]

    expected = reference("whole")
    from arabic_qwen.models import scoring

    pack = scoring.pack

    def limited(groups):
        if len(groups) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pack(groups)

    monkeypatch.setattr(scoring, "pack", limited)
    assert reference("cut") == pytest.approx(expected, rel=1e-5)
    assert Path(tmp_path / "cut").is_dir()


def test_of_several_processes_each_is_told_what_to_set(model_dir, sft_file, tmp_path):
    trainer = ready(sft_config(model_dir, sft_file, tmp_path / "run", token_budget=512), seed=None)
    engine = trainer.trainer

    def compute(step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    step = engine._collate([engine.train_groups.groups])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.args), "world_size", property(lambda self: 2))
        with pytest.raises(TrainingError, match=r"process \d; set token_budget to \d+ \(it is 512\)"):
            engine._within_memory(step, None, compute, lambda: None)


def test_a_trainer_that_is_not_ours_makes_no_bad_update_either(model_dir, sft_file, tmp_path):
    config = sft_config(model_dir, sft_file, tmp_path / "run", max_steps=3, save_steps=1, validation_split=0)

    class Nan(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * math.nan)

    config.callbacks = [Nan()]
    trainer = CustomTrainer(config)
    with pytest.raises(TrainingError, match=r"step 2: the gradient's norm is nan; this update is not made"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [checkpoints.step_of(path) for path in checkpoints.find_checkpoints(tmp_path / "run")] == [1]


def test_out_of_memory_in_what_cannot_be_cut(model_dir, sft_file, tmp_path, monkeypatch):
    def none_left(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path / "run", validation_split=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", none_left)
        with pytest.raises(TrainingError, match=r"^out of memory \(CUDA .* 2 GiB\); lower token_budget"):
            trainer.train()
    monkeypatch.setattr(PackedTrainer, "_measure", none_left)
    with pytest.raises(TrainingError, match=r"^out of memory .* eval_samples"):
        trainer.evaluate()
