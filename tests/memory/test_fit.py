"""The choice of token budget and recomputed layers: against laws of memory, and what a run keeps of it."""

import json
import logging
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from arabic_qwen.memory import fit as fitting
from arabic_qwen.models.layers import decoder_layers, recompute_first
from arabic_qwen.packing.group import Completion, Group
from arabic_qwen.plan import estimate
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import StopAfter, sft_config
from tests.preference_runs import preference_config, write_data


class Law:
    """A step's peak: weights, then the head or the working set of one layer, over what all layers keep.

    The last, of whose activations all have this `share`, keeps less than the others.
    """

    def __init__(self, weights, hidden, saved, working, head, layers, share=1.0, capacity=math.inf):
        self.__dict__.update(locals())
        self.calls = []

    def __call__(self, tokens, kept):
        self.calls.append((tokens, kept))
        hidden = (self.layers - kept) * self.hidden
        own = hidden + (kept - (1 - self.share) * (kept > 0)) * self.saved
        again = hidden + self.saved + self.working if kept < self.layers else 0  # when what others kept is free
        peak = self.weights + tokens * max(own, again) + self.head * min(tokens, 900)
        return peak if peak <= self.capacity else math.inf  # out of memory


laws = st.builds(
    Law,
    weights=st.integers(0, 10**9),
    hidden=st.integers(1, 10**4),
    saved=st.integers(10**4, 10**6),
    working=st.integers(0, 10**6),
    head=st.integers(0, 10**6),
    layers=st.integers(1, 80),
    share=st.sampled_from([1.0, 0.75, 0.5]),
)


@given(law=laws, limit=st.integers(10**6, 10**11), slack=st.floats(1, 1.2), longest=st.integers(1, 40_000))
@example(law=Law(0, hidden=1, saved=10_000, working=77_030, head=0, layers=17), limit=1_511_217, slack=1.125, longest=1)
def test_never_more_than_the_limit_and_what_is_there_is_used(law, limit, slack, longest):
    law.capacity = limit * slack
    found = fitting.choose(law, layers=law.layers, limit=limit, longest=longest)
    tokens, kept = max(found.token_budget, longest), law.layers - found.recomputed
    assert found.peak == law(tokens, kept)
    if law(longest, 0) > limit:  # nothing fits
        assert (found.token_budget, kept) == (longest, 0)
        return
    assert found.peak <= limit
    assert kept == law.layers or law(tokens, kept + 1) > limit
    if found.token_budget < fitting.FULL_BUDGET and longest < fitting.FULL_BUDGET:
        assert law(fitting.FULL_BUDGET, 0) > limit
        assert law(2 * tokens, 0) > limit or 2 * tokens > fitting.FULL_BUDGET
    assert len(law.calls) < 40


@given(law=laws, limit=st.integers(10**6, 10**11), recomputes=st.sampled_from([None, False, True]))
def test_small_models_take_larger_micro_batches_where_nothing_is_recomputed_for_it(law, limit, recomputes):
    given_layers = None if recomputes is None else law.layers * recomputes
    values = dict(layers=law.layers, limit=limit, longest=9, recomputed=given_layers)
    usual, found = fitting.choose(law, **values), fitting.choose(law, busy=50_000, **values)
    assert found.recomputed == usual.recomputed
    more = [tokens for tokens in (50_000, 25_000, 12_500) if law(tokens, law.layers - found.recomputed) <= limit]
    wanted = usual.token_budget == fitting.FULL_BUDGET and (recomputes is not None or usual.recomputed == 0)
    assert found.token_budget == (more[0] if wanted and more else usual.token_budget)
    assert found.peak == law(max(found.token_budget, 9), law.layers - found.recomputed)


def test_a_layer_that_is_half_as_large_takes_twice_the_tokens():
    assert fitting.busy_budget(3584, 18944) == fitting.busy_budget(5120, 13824 * 2) == fitting.FULL_BUDGET
    assert fitting.busy_budget(3584, 18944 // 2) == 2 * fitting.FULL_BUDGET
    assert fitting.busy_budget(64, 128) == 8 * fitting.FULL_BUDGET


@given(law=laws, limit=st.integers(10**6, 10**11))
def test_what_is_given_stays(law, limit):
    assert fitting.choose(law, layers=law.layers, limit=limit, longest=9, token_budget=77).token_budget == 77
    for recomputed in (0, law.layers):
        law.calls.clear()
        found = fitting.choose(law, layers=law.layers, limit=limit, longest=9, recomputed=recomputed)
        assert found.recomputed == recomputed
        assert {kept for _, kept in law.calls} == {law.layers - recomputed}


def test_a_large_gpu_is_asked_few_questions():
    law = Law(weights=16e9, hidden=7168, saved=250_000, working=150_000, head=1e6, layers=28)
    found = fitting.choose(law, layers=28, limit=77e9, longest=2048)
    assert (found.token_budget, found.recomputed) == (8192, 0)
    assert len(law.calls) <= 5
    smaller = fitting.choose(law, layers=28, limit=0.92 * 48e9, longest=2048)
    assert smaller.token_budget == 8192
    assert 10 < smaller.recomputed < 20


def group(length):
    return Group(np.zeros(1, np.int32), (Completion(np.zeros(length - 1, np.int32), np.ones(length - 1, bool)),))


def test_longest_groups_fill_the_batch():
    groups = [group(n) for n in (30, 20, 7, 5)]
    assert [g.num_tokens for g in fitting.longest_groups(groups, 52)] == [30, 20]
    assert [g.num_tokens for g in fitting.longest_groups(groups, 10)] == [30]
    assert sum(g.num_tokens for g in fitting.longest_groups(groups, 1000)) > 995


@pytest.fixture
def small_gpu(monkeypatch):
    """A processor that says it is a GPU of little memory; its measurements follow a law."""

    class Measured(Law):
        def __init__(self, model, groups, largest_step, optimizer_bytes):
            super().__init__(optimizer_bytes, 10, 1000, 500, 0, len(decoder_layers(model)))
            self.model = model
            self.largest_step = largest_step
            assert [g.num_tokens for g in groups] == sorted((g.num_tokens for g in groups), reverse=True)

        def memory(self):
            return 3000 * 400

        def __call__(self, tokens, kept):
            recompute_first(self.model, self.layers - kept)
            return super().__call__(min(tokens, self.largest_step), kept)

    monkeypatch.setattr(fitting, "CudaMeasure", Measured)
    real = fitting.fit

    def fit(trainer):
        device = torch.device("cuda")
        given = trainer.args
        pretended = types.SimpleNamespace(
            device=device,
            optim=given.optim,
            per_device_train_batch_size=given.per_device_train_batch_size,
            gradient_accumulation_steps=given.gradient_accumulation_steps,
        )
        real(Shown(trainer, pretended))

    class Shown:
        def __init__(self, trainer, args):
            self.__dict__.update(trainer=trainer, args=args)

        def __getattr__(self, name):
            return getattr(self.trainer, name)

        def __setattr__(self, name, value):
            setattr(self.trainer, name, value)

    monkeypatch.setattr(fitting, "fit", fit)


def test_a_run_keeps_what_was_chosen(model_dir, sft_file, tmp_path, small_gpu, caplog):
    caplog.set_level(logging.INFO)
    values = dict(gradient_checkpointing="auto", save_steps=1, evaluation_strategy="no", load_best_model_at_end=False)
    values |= dict(per_device_train_batch_size=12, num_train_epochs=2)
    config = sft_config(model_dir, sft_file, tmp_path / "run", callbacks=[StopAfter(1)], **values)
    with pytest.raises(KeyboardInterrupt):
        BaseTrainer(config).train()
    progress = json.loads((tmp_path / "run" / "checkpoint-1" / "progress.json").read_text())["trainer"]
    assert progress["token_budget"] == fitting.FULL_BUDGET  # more than a step has
    assert progress["recomputed"] in (1, 2)
    line = next(message for message in caplog.messages if "layers recomputed" in message)
    assert f"token_budget {progress['token_budget']:,}, {progress['recomputed']} of 2 layers recomputed: " in line

    caplog.clear()
    config.callbacks = []
    trainer = BaseTrainer(config)
    trainer.train()
    assert not any("layers recomputed" in message for message in caplog.messages)
    assert trainer.trainer.token_budget == progress["token_budget"]
    assert trainer.trainer.get_train_dataloader().collate_fn.token_budget == progress["token_budget"]
    recomputes = [layer.gradient_checkpointing for layer in decoder_layers(trainer.model)]
    assert recomputes == [number < progress["recomputed"] for number in range(2)]


@pytest.mark.parametrize("before", [True, False])
def test_auto_counts_when_it_is_set_later(model_dir, sft_file, tmp_path, small_gpu, caplog, before):
    """After a run that was out of memory, as one may be told."""
    caplog.set_level(logging.INFO)
    values = dict(save_steps=1, evaluation_strategy="no", load_best_model_at_end=False)
    config = sft_config(model_dir, sft_file, tmp_path / "run", callbacks=[StopAfter(1)], **values)
    config.gradient_checkpointing = before
    with pytest.raises(KeyboardInterrupt):
        BaseTrainer(config).train()
    caplog.clear()
    config.gradient_checkpointing, config.callbacks = "auto", []
    trainer = BaseTrainer(config)
    trainer.train()
    assert any("layers recomputed" in message for message in caplog.messages)
    assert trainer.trainer.recomputed is not None


def test_a_small_model_takes_a_whole_step_at_once(model_dir, sft_file, tmp_path, small_gpu, monkeypatch):
    monkeypatch.setattr(fitting, "FULL_BUDGET", 50)
    values = dict(gradient_checkpointing=True, evaluation_strategy="no", per_device_train_batch_size=4)
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path / "run", max_steps=1, **values))
    trainer.train()
    lengths = sorted((group.num_tokens for group in trainer.dataset["train"].groups), reverse=True)
    assert trainer.trainer.token_budget == sum(lengths[:4]) > 50


def test_a_step_of_kto_is_counted_as_it_is_cut(model_dir, tmp_path, small_gpu, monkeypatch):
    """With each completion's mismatched one, as in `plan`."""
    monkeypatch.setattr(fitting, "FULL_BUDGET", 50)
    data = write_data("kto", tmp_path)
    config = preference_config("kto", model_dir, data, tmp_path, token_budget=None, max_steps=1)
    trainer = BaseTrainer(config)
    trainer.train()
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    lengths = sorted((group.num_budgeted for group in trainer.dataset["train"].groups), reverse=True)
    assert trainer.trainer.token_budget == sum(lengths[:rows]) == estimate.plan(config, ["H100"]).mix.step


def test_small_steps_need_little(model_dir, sft_file, tmp_path, small_gpu):
    values = dict(gradient_checkpointing="auto", evaluation_strategy="no", per_device_train_batch_size=1)
    trainer = BaseTrainer(sft_config(model_dir, sft_file, tmp_path / "run", max_steps=1, **values))
    trainer.train()
    assert trainer.trainer.token_budget == fitting.FULL_BUDGET
    assert trainer.trainer.recomputed == 0


def test_on_a_processor_auto_recomputes_nothing(model_dir, sft_file, tmp_path):
    config = sft_config(model_dir, sft_file, tmp_path / "run", gradient_checkpointing="auto", max_steps=1)
    trainer = BaseTrainer(config)
    trainer.train()
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(trainer.model))
    assert trainer.trainer.token_budget == fitting.PROCESSOR_BUDGET
