"""The engine's loss, gradients and metrics of every method against one sequence at a time, however the step is cut."""

import contextlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.methods.objective import PAIRS, Losses, Scores, join_scores
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.bins import micro_batches
from tests.preference_runs import (
    divergence,
    gradients_of,
    length,
    logp,
    losses,
    mean,
    move_adapters,
    naive_loss,
    naive_rewards,
    preference_config,
    ready,
    relative_difference,
    run,
    train_on_two_processes,
    trainable,
    write_data,
)

pytestmark = pytest.mark.engine

CASES = {
    "dpo": ("dpo", {"beta": 0.3}),
    "dpo-smoothed": ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    "dpo-sft": ("dpo", {"loss_type": "sft"}),
    "dpo-aot": ("dpo", {"loss_type": "aot", "beta": 0.3}),
    "dpo-aot_unpaired": ("dpo", {"loss_type": "aot_unpaired", "beta": 0.3, "label_smoothing": 0.1}),
    "ipo": ("ipo", {"tau": 0.5, "label_smoothing": 0.1}),
    "kto": ("kto", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
    "cpo": ("cpo", {"beta": 0.3, "cpo_alpha": 0.7}),
    "cpo-hinge": ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    "cpo-ipo": ("cpo", {"loss_type": "ipo", "beta": 0.5}),
    "cpo-softmax": ("cpo", {"negatives": "softmax", "beta": 0.3, "cpo_alpha": 0.0}),
    "dpo-discopop": ("dpo", {"loss_type": "discopop", "beta": 0.3, "discopop_tau": 0.5}),
    "cpo-simpo": ("cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
    "simpo": ("simpo", {"label_smoothing": 0.1}),
    "orpo": ("orpo", {"beta": 0.3}),
}
ONE_EACH = ["dpo", "dpo-aot", "ipo", "kto", "cpo", "simpo", "orpo"]


@pytest.fixture
def data(tmp_path):
    """Method -> its data; CPO's rows have no to five negatives."""
    return lambda method: write_data(method, tmp_path)


@pytest.fixture
def preference_file(data):
    return data("dpo")


@pytest.fixture
def trainer(model_dir, data, tmp_path):
    """Name of a case, values -> a trainer that is ready, its policy away from the reference."""

    def build(case, **values):
        method, settings = CASES[case]
        return ready(preference_config(method, model_dir, data(method), tmp_path, **(settings | values)))

    return build


def engine_step(trainer, groups):
    """Loss, gradients and metrics of one step."""
    engine = trainer.trainer
    engine._sums = {}
    with gradients_of(trainer.model) as gradients:
        loss = engine.training_step(trainer.model, engine._collate([[group] for group in groups]))
    sums = {name: float(value) for name, value in engine._sums.items()}
    return loss.item(), gradients, engine.objective.metrics.derive(sums, loss.item())


def step_groups(trainer, count=7):
    return trainer.dataset["train"].groups[:count]


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 0
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=2e-5 * scale, rtol=1e-4), name


def test_every_method_is_tested():
    assert {method for method, _ in CASES.values()} == set(METHODS) - {"sft"}
    assert {CASES[case][0] for case in ONE_EACH} == set(METHODS) - {"sft"}


@pytest.mark.parametrize("case", CASES)
def test_step_equals_one_sequence_at_a_time(case, trainer):
    ours = trainer(case)
    groups = step_groups(ours)
    loss, gradients, _ = engine_step(ours, groups)
    model = ours.model.eval()
    with gradients_of(model) as expected:
        naive = naive_loss(ours.config, model, groups)
        naive.backward()
    assert loss == pytest.approx(naive.item(), abs=2e-5)
    close(gradients, expected)


@pytest.mark.parametrize("case", ONE_EACH)
def test_step_does_not_depend_on_the_token_budget(case, trainer):
    ours = trainer(case)
    groups = step_groups(ours)
    found = []
    for budget in (100_000, 200, 1):
        ours.trainer.token_budget = budget
        found.append((len(micro_batches(groups, budget)), *engine_step(ours, groups)))
    counts, values, gradients, metrics = zip(*found, strict=True)
    assert counts[0] == 1 < counts[1] < counts[2] == len(groups)
    for other in (1, 2):
        assert values[other] == pytest.approx(values[0], abs=1e-5)
        close(gradients[other], gradients[0])
        assert metrics[other] == pytest.approx(metrics[0], abs=1e-4)


@pytest.mark.parametrize("case", ["dpo", "dpo-aot", "kto", "cpo"])
def test_training_does_not_depend_on_the_token_budget(case, model_dir, data, tmp_path):
    method, settings = CASES[case]

    def train(name, budget, **values):
        config = preference_config(
            method, model_dir, data(method), tmp_path / name, token_budget=budget, **(settings | values)
        )
        return (*run(config), config)

    whole, trainer, config = train("whole", 100_000)
    cut, other, _ = train("cut", 1)
    start = trainable(add_lora(AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32), config))
    assert relative_difference(cut, whole, start) < 1e-3
    assert losses(other) == pytest.approx(losses(trainer), abs=1e-5)
    accumulated, third, _ = train("accumulated", 300, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert relative_difference(accumulated, whole, start) < 1e-3
    assert losses(third) == pytest.approx(losses(trainer), abs=1e-5)


class TestDivergence:
    """KTO's z."""

    @pytest.fixture
    def positive(self, trainer):
        """A trainer whose policy finds the mismatched completions likelier than the reference does."""
        ours = trainer("kto")
        groups = step_groups(ours)
        for seed in range(20):
            move_adapters(ours.model, seed)
            if divergence(ours.model.eval(), groups) > 0.1:
                return ours, groups
        raise AssertionError("no seed gives a positive divergence")

    def test_positive(self, positive):
        ours, groups = positive
        loss, gradients, metrics = engine_step(ours, groups)
        model = ours.model.eval()
        assert metrics["kl"] == pytest.approx(divergence(model, groups), abs=1e-4)
        with gradients_of(model) as expected:
            naive_loss(ours.config, model, groups).backward()
        assert loss == pytest.approx(naive_loss(ours.config, model, groups).item(), abs=2e-5)
        close(gradients, expected)

    def test_is_of_the_whole_step(self, positive):
        ours, groups = positive
        whole = engine_step(ours, groups)
        ours.trainer.token_budget = 1
        cut = engine_step(ours, groups)
        assert cut[2]["kl"] == pytest.approx(whole[2]["kl"], abs=1e-4)
        close(cut[1], whole[1])

    def test_before_training_is_zero(self, trainer):
        ours = trainer("kto")
        with torch.no_grad():
            for name, parameter in ours.model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        groups = step_groups(ours)
        loss, _, metrics = engine_step(ours, groups)
        assert metrics["kl"] == 0
        assert loss == pytest.approx(mean(0.75 if g.desirable else 0.25 for g in groups), abs=1e-6)


def reference_passes(trainer, monkeypatch):
    """Tokens of each forward pass of the reference from now on."""
    seen = []
    reference = trainer.trainer.reference

    @contextlib.contextmanager
    def counted(model):
        with reference(model) as frozen:
            yield lambda packed: (seen.append(len(packed.input_ids)), frozen(packed=packed))[1]

    monkeypatch.setattr(trainer.trainer, "reference", counted)
    return seen


def test_the_references_prompts_are_computed_once(trainer, monkeypatch):
    """KTO's own and mismatched completions share their prompt in the reference's pass."""
    ours = trainer("kto")
    groups = step_groups(ours)
    seen = reference_passes(ours, monkeypatch)
    engine_step(ours, groups)
    assert sum(seen) == sum(group.num_tokens + len(group.auxiliary[0].ids) for group in groups)


def test_the_reference_is_computed_once_where_the_loss_needs_the_whole_step(trainer, monkeypatch):
    ours = trainer("dpo-aot")
    engine = ours.trainer
    engine.token_budget = 60
    seen = reference_passes(ours, monkeypatch)
    step = engine._collate([[group] for group in step_groups(ours)])
    engine.training_step(ours.model, step)
    assert len(seen) == len(step.batches) > 1


def test_length_bias_compares_the_lengths_that_the_data_gives(trainer):
    ours = trainer("ipo")
    groups = [g._replace(lengths=(float(n), 1.0)) for n, g in enumerate(step_groups(ours))]
    found = engine_step(ours, groups)[2]["length_bias"]
    margins = [r[0] - r[1] for r in naive_rewards(ours.config, ours.model.eval(), groups)]
    assert found == pytest.approx(np.corrcoef(margins, range(len(groups)))[0, 1], abs=1e-3)


class TestLengthBias:
    def correlation(self, margins, longer):
        """Of pairs with these margins and length differences, by the engine's sums."""
        completions = 2 * len(margins)
        scores = Scores(
            logps=torch.tensor([v for m in margins for v in (m, 0.0)]),
            reference_logps=None,
            target_completion=torch.arange(completions),
            completion_group=torch.arange(completions) // 2,
            chosen=torch.arange(0, completions, 2),
            rejected=torch.arange(1, completions, 2),
            num_targets=torch.ones(completions, dtype=torch.int64),
            lengths=torch.tensor([float(v) for d in longer for v in (d, 0)]),
            tags=torch.zeros(len(margins), dtype=torch.int64),
            mean_chosen_length=1.0,
        )
        sums = PAIRS.sums(scores, Losses(torch.zeros(len(margins)), scores.policy))
        return PAIRS.derive({name: float(value) for name, value in sums.items()}, 0.0)["length_bias"]

    def test_small_spread_around_a_large_mean(self):
        rng = np.random.default_rng(0)
        longer = rng.integers(-40, 40, 2000)
        margins = np.float32(20 + 0.01 * (longer / 40 + rng.normal(size=2000)))
        assert self.correlation(margins.tolist(), longer) == pytest.approx(np.corrcoef(margins, longer)[0, 1], abs=1e-4)

    def test_without_spread(self):
        assert self.correlation([20.1] * 7, range(7)) == 0
        assert self.correlation([20.1, 3.0], [5, 5]) == 0
        assert self.correlation([1.7], [3]) == 0

    def test_stays_in_its_range(self):
        assert self.correlation([0.1, 0.2, 0.3], [1, 2, 3]) == pytest.approx(1)
        assert self.correlation([0.1, 0.2], [1, 2]) == 0  # of two pairs it says nothing
        assert -1 <= self.correlation([0.3, 0.2, 0.1], [1, 2, 3]) <= 1


class TestOneClass:
    """KTO where all rows have one label."""

    def test_metrics_of_the_other_are_left_out(self, trainer):
        ours = trainer("kto")
        groups = [group for group in ours.dataset["train"].groups if group.desirable][:4]
        metrics = engine_step(ours, groups)[2]
        assert "rewards/chosen" in metrics and "kl" in metrics
        assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & set(metrics)


class TestOnePrompt:
    """KTO where the rows have no other prompt to take a mismatched completion from."""

    def test_evaluation(self, trainer):
        ours = trainer("kto")
        row = {"prompt": "سؤال", "completion": "جواب", "label": True}
        assert ours.evaluate([row])["eval_kl"] == 0

    def test_one_held_out_prompt(self, trainer):
        ours = trainer("kto", validation_split=0.01)
        assert len({group.prompt.tobytes() for group in ours.dataset["validation"]}) == 1
        assert all(group.auxiliary for group in ours.dataset["validation"])
        assert ours.evaluate()["eval_loss"] > 0


class TestNegatives:
    """CPO with no to five rejected completions."""

    def test_all_numbers_are_there(self, trainer):
        assert {len(g.completions) - 1 for g in trainer("cpo").dataset["train"].groups} == {0, 2, 3, 5}

    @pytest.mark.parametrize("case", ["cpo", "cpo-ipo"])
    def test_any_mixture(self, case, trainer):
        ours = trainer(case)
        ragged = [g._replace(completions=g.completions[: 1 + n]) for n, g in enumerate(step_groups(ours, 6))]
        widest = next(g for g in ours.dataset["train"].groups if len(g.completions) == 6)
        for groups in ([*ragged, widest], [widest], ragged[:1]):
            loss, gradients, _ = engine_step(ours, groups)
            model = ours.model.eval()
            with gradients_of(model) as expected:
                naive = naive_loss(ours.config, model, groups)
                naive.backward()
            assert loss == pytest.approx(naive.item(), abs=2e-5)
            close(gradients, expected)

    def test_a_step_without_any_and_without_nll_does_nothing(self, trainer):
        ours = trainer("cpo-hinge")
        groups = [g._replace(completions=g.completions[:1]) for g in step_groups(ours, 3)]
        loss, gradients, metrics = engine_step(ours, groups)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients.values())
        assert all(np.isfinite(value) for value in metrics.values())


def naive_metrics(config, model, groups):
    """Means over rows; several negatives of a row count by their mean."""
    rewards = naive_rewards(config, model, groups)
    with torch.no_grad():
        logps = [[logp(model, g, c).item() for c in g.completions] for g in groups]
    if config.method == "kto":
        good = [r[0] for r, g in zip(rewards, groups, strict=True) if g.desirable]
        bad = [r[0] for r, g in zip(rewards, groups, strict=True) if not g.desirable]
        return {
            "rewards/chosen": mean(good),
            "rewards/rejected": mean(bad),
            "rewards/margins": mean(good) - mean(bad),
            "rewards/accuracies": mean((r[0] > 0) == g.desirable for r, g in zip(rewards, groups, strict=True)),
            "logps/chosen": mean(p[0] for p, g in zip(logps, groups, strict=True) if g.desirable),
            "logps/rejected": mean(p[0] for p, g in zip(logps, groups, strict=True) if not g.desirable),
            "kl": divergence(model, groups),
        }
    pairs = [(r, p, g) for r, p, g in zip(rewards, logps, groups, strict=True) if len(r) > 1]
    margins = [r[0] - mean(r[1:]) for r, _, _ in pairs]
    longer = [length(g.completions[0]) - mean(length(c) for c in g.completions[1:]) for _, _, g in pairs]
    return {
        "rewards/chosen": mean(r[0] for r in rewards),
        "rewards/rejected": mean(mean(r[1:]) for r, _, _ in pairs),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean(mean(r[0] > other for other in r[1:]) for r, _, _ in pairs),
        "logps/chosen": mean(p[0] for p in logps),
        "logps/rejected": mean(mean(p[1:]) for _, p, _ in pairs),
        "length_bias": float(np.corrcoef(margins, longer)[0, 1]),
    }


@pytest.mark.parametrize("case", ONE_EACH)
def test_metrics_equal_those_computed_by_hand(case, trainer):
    ours = trainer(case)
    groups = step_groups(ours)
    metrics = engine_step(ours, groups)[2]
    expected = naive_metrics(ours.config, ours.model.eval(), groups)
    assert set(metrics) == set(expected) == set(ours.trainer.objective.metric_names)
    assert metrics == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("case", ONE_EACH)
def test_evaluation_equals_one_sequence_at_a_time(case, trainer):
    ours = trainer(case, validation_split=0.4, per_device_eval_batch_size=2, token_budget=60)
    metrics = ours.evaluate()
    groups = ours.dataset["validation"].groups
    assert len(groups) > 2
    model = ours.model.eval()
    with torch.no_grad():
        expected = {"loss": naive_loss(ours.config, model, groups).item()}
    expected |= naive_metrics(ours.config, model, groups)
    assert metrics == pytest.approx({f"eval_{name}": value for name, value in expected.items()}, abs=2e-4)


def test_metrics_are_logged_with_the_loss(model_dir, preference_file, tmp_path):
    config = preference_config("dpo", model_dir, preference_file, tmp_path, validation_split=0.25, eval_steps=1)
    _, trainer = run(config)
    logged = [entry for entry in trainer.trainer.state.log_history if "loss" in entry]
    names = set(trainer.trainer.objective.metric_names)
    assert len(logged) == 3
    assert all(names <= set(entry) for entry in logged)
    assert logged[0]["rewards/margins"] == logged[0]["rewards/accuracies"] == 0  # policy = reference
    assert logged[-1]["rewards/margins"] != 0
    assert {f"eval_{name}" for name in names} < set(trainer.metrics)


def test_logged_metrics_are_of_the_steps_since_the_last_line(model_dir, preference_file, tmp_path):
    config = preference_config("dpo", model_dir, preference_file, tmp_path / "each", num_train_epochs=1)
    each = run(config)[1].trainer.state.log_history
    config = preference_config("dpo", model_dir, preference_file, tmp_path / "all", logging_steps=3)
    (last, *_) = [entry for entry in run(config)[1].trainer.state.log_history if "loss" in entry]
    margins = [entry["rewards/margins"] for entry in each if "loss" in entry]
    assert last["rewards/margins"] == pytest.approx(mean(margins), abs=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto", "cpo", "orpo"])
def test_metric_for_best_model(method, model_dir, data, tmp_path):
    config = preference_config(
        method,
        model_dir,
        data(method),
        tmp_path / "run",
        validation_split=0.25,
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="eval_rewards/chosen",
    )
    _, trainer = run(config)
    evaluated = [e["eval_rewards/chosen"] for e in trainer.trainer.state.log_history if "eval_rewards/chosen" in e]
    assert trainer.trainer.state.best_metric == pytest.approx(max(evaluated))
    wrong = preference_config(
        method, model_dir, data(method), tmp_path / "no", validation_split=0.25, save_steps=500, eval_steps=500
    )
    wrong.metric_for_best_model = "eval_bleu"
    with pytest.raises(ConfigurationError, match=r"eval_bleu.*choose from eval_loss, eval_rewards/chosen"):
        run(wrong)


def test_scores_join_as_if_they_had_been_one(trainer):
    ours = trainer("cpo")
    engine, groups = ours.trainer, step_groups(ours)
    engine.model.eval()
    with torch.no_grad():
        whole = engine._score(engine.model, pack(groups), 1.0)
        parts = [engine._score(engine.model, pack([g]), 1.0) for g in groups]
    joined = join_scores(parts)
    for name in ("target_completion", "completion_group", "chosen", "rejected", "num_targets", "lengths", "tags"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert torch.allclose(joined.policy, whole.policy, atol=1e-4)
    assert joined.reference_logps is None


@pytest.mark.parametrize(
    ("case", "own"),
    [
        pytest.param("dpo", {}, id="dpo"),
        pytest.param("dpo-aot", {}, id="dpo-aot", marks=pytest.mark.slow),
        pytest.param("kto", {}, id="kto"),
        pytest.param("cpo", {}, id="cpo", marks=pytest.mark.slow),
        pytest.param("dpo", {"precompute_reference": True}, id="precomputed"),
    ],
)
def test_two_processes_equal_one(case, own, model_dir, data, tmp_path):
    """Batch 2 on one process equals batch 1 on two; in the last step the second process has no row."""
    method, settings = CASES[case]
    share = 0.125 if method == "kto" else 0.25  # leaves an odd number of rows
    values = settings | own | dict(max_steps=None, num_train_epochs=1, save_steps=100, validation_split=share)
    config = preference_config(
        method, model_dir, data(method), tmp_path / "one", per_device_train_batch_size=2, **values
    )
    one, trainer = run(config)
    assert len(trainer.dataset["train"]) % 2 == 1
    split = preference_config(
        method,
        model_dir,
        data(method),
        tmp_path / "two",
        per_device_train_batch_size=1,
        ddp_backend="gloo",
        **values,
    )
    two = train_on_two_processes(split)
    start = trainable(add_lora(AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32), config))
    assert relative_difference(two, one, start) < 1e-3

    logged = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    names = ["loss", *trainer.trainer.objective.metric_names]
    for key in (*names, *(f"eval_{name}" for name in names)):
        first, second = ([entry[key] for entry in entries if key in entry] for entries in logged)
        assert first
        assert second == pytest.approx(first, abs=2e-4), key
