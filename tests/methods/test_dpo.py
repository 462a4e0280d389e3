import itertools
import math
import re

import pytest
import torch

from arabic_qwen.methods.dpo import LABEL_SMOOTHED
from arabic_qwen.methods.dpo.loss import DPO_LOSSES, STEP_COUPLED, Pairs, dpo_loss, implicit_rewards
from tests.methods import trl_reference

CHOSEN_LENGTHS, REJECTED_LENGTHS = [5, 1, 9, 3, 6, 2, 8], [2, 7, 7, 4, 1, 9, 3]
TRL_SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}  # the others ignore label_smoothing
SMOOTHING_OF = {name: 0.1 if name in LABEL_SMOOTHED else 0.0 for name in DPO_LOSSES}


def needs(loss_type, chosen_length, rejected_length):
    """The keyword arguments that a loss type cannot do without, but for label_smoothing."""
    if loss_type in ("ipo", "sigmoid_norm"):
        return {"chosen_length": chosen_length, "rejected_length": rejected_length}
    if loss_type == "sft":
        return {"mean_chosen_length": chosen_length.double().mean().clamp(min=1)}
    return {}


def random_pairs(num_pairs=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logps = [-10 * torch.rand(num_pairs, generator=generator, dtype=dtype) for _ in range(4)]
    return logps, *torch.randint(1, 20, (2, num_pairs), generator=generator)


def one_pair(chosen, rejected):
    """Log-probabilities with the log ratios given."""
    return [torch.tensor([x]) for x in (chosen - 4.0, rejected - 6.0, -4.0, -6.0)]


@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_equals_trl(loss_type, beta):
    logps, mask = trl_reference.completions(CHOSEN_LENGTHS + REJECTED_LENGTHS)
    reference = trl_reference.completions(CHOSEN_LENGTHS + REJECTED_LENGTHS, seed=1)[0].detach().sum(1)
    label_smoothing = TRL_SMOOTHED.get(loss_type, 0.0)
    theirs = trl_reference.dpo(loss_type, logps, mask, reference, beta=beta, label_smoothing=label_smoothing)
    ours = dpo_loss(
        *logps.sum(1).chunk(2),
        *reference.chunk(2),
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        **needs(loss_type, *mask.sum(1).chunk(2)),
    )
    assert ours.shape == (len(CHOSEN_LENGTHS),)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(loss, logps)[0] * mask for loss in (ours.mean(), theirs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", sorted(DPO_LOSSES.keys() - STEP_COUPLED))
def test_each_pair_equals_trl(loss_type):
    logps, mask = trl_reference.completions(CHOSEN_LENGTHS + REJECTED_LENGTHS)
    reference = trl_reference.completions(CHOSEN_LENGTHS + REJECTED_LENGTHS, seed=1)[0].detach().sum(1)
    label_smoothing = TRL_SMOOTHED.get(loss_type, 0.0)
    lengths = mask.sum(1).chunk(2)
    for i in range(len(CHOSEN_LENGTHS)):
        pair = [i, i + len(CHOSEN_LENGTHS)]
        theirs = trl_reference.dpo(
            loss_type, logps[pair], mask[pair], reference[pair], beta=0.4, label_smoothing=label_smoothing
        )
        ours = dpo_loss(
            *logps[pair].sum(1).chunk(2),
            *reference[pair].chunk(2),
            beta=0.4,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            **needs(loss_type, *(length[i : i + 1] for length in lengths)),
        )
        torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)


def test_has_every_loss_type_of_trl():
    logps, mask = trl_reference.completions([1, 1])
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_reference.dpo("none such", logps, mask, torch.zeros(2), beta=0.1)
    assert set(re.findall(r"'(\w+)'", str(error.value))) == DPO_LOSSES.keys()


@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
def test_smoothed_sigmoid_equals_that_of_trl_cpo(label_smoothing):
    logps, _, _ = random_pairs()
    ours = dpo_loss(*logps, beta=0.4, label_smoothing=label_smoothing)
    trainer = trl_reference.cpo_trainer("sigmoid", beta=0.4, label_smoothing=label_smoothing)
    theirs = trainer.cpo_loss(logps[0] - logps[2], logps[1] - logps[3])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def softplus(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# One pair with Δ_c = 2, Δ_r = −1, β = 0.5, lengths 4 and 2: β(Δ_c − Δ_r) = 1.5, βΔ_c = 1, βΔ_r = −0.5
CLOSED_FORMS = {
    "sigmoid": softplus(-1.5),
    "hinge": 0.0,
    "ipo": (2 / 4 + 1 / 2 - 1) ** 2,
    "robust": (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8,
    "exo_pair": sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
    "nca_pair": softplus(-1) + 0.5 * softplus(1) + 0.5 * softplus(-0.5),
    "sppo_hard": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "bco_pair": softplus(-1) + softplus(-0.5),
    "aot": softplus(-1.5),
    "aot_unpaired": softplus(-1.5),
    "apo_zero": sigmoid(-1) + sigmoid(-0.5),
    "apo_down": sigmoid(1) + sigmoid(-1.5),
    "discopop": softplus(-1.5) * sigmoid(-1.5 / 0.5) + math.exp(-1.5) * sigmoid(1.5 / 0.5),
    "sigmoid_norm": softplus(-0.5),
    "sft": 2 / 4,  # log π(y_c) = 2 − 4
}


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_closed_form(loss_type):
    pairs = Pairs(
        *one_pair(2.0, -1.0),
        beta=0.5,
        label_smoothing=TRL_SMOOTHED.get(loss_type, 0.0) and 0.1,
        **needs(loss_type, torch.tensor([4]), torch.tensor([2])),
        discopop_tau=0.5,
    )
    if loss_type in STEP_COUPLED:
        pairs = Pairs(*one_pair(2.0, -1.0), beta=0.5)
    assert DPO_LOSSES[loss_type](pairs).item() == pytest.approx(CLOSED_FORMS[loss_type], abs=1e-6)


def test_policy_equal_to_its_reference():
    logps, chosen_length, rejected_length = random_pairs()
    logps[2:] = logps[:2]
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "apo_zero": 1.0, "bco_pair": 2 * math.log(2)}
    expected |= {"ipo": 25.0, "aot": math.log(2), "sppo_hard": 50.0, "sigmoid_norm": math.log(2)}
    for loss_type, value in expected.items():
        options = needs(loss_type, chosen_length, rejected_length)
        loss = dpo_loss(*logps, beta=0.1, loss_type=loss_type, **options)
        torch.testing.assert_close(loss, torch.full_like(loss, value))


@pytest.mark.parametrize("loss_type", sorted(set(LABEL_SMOOTHED) - {"robust", "exo_pair"}))
def test_label_smoothing_is_the_mixture_of_both_labels(loss_type):
    logps, chosen_length, rejected_length = random_pairs()
    options = {"beta": 0.4, "loss_type": loss_type}
    right = dpo_loss(*logps, **options, **needs(loss_type, chosen_length, rejected_length))
    swapped = [logps[i] for i in (1, 0, 3, 2)]
    wrong = dpo_loss(*swapped, **options, **needs(loss_type, rejected_length, chosen_length))
    if loss_type == "aot":
        wrong = wrong.flip(0)  # its margins change sign before they are sorted
    smoothed = dpo_loss(*logps, **options, label_smoothing=0.2, **needs(loss_type, chosen_length, rejected_length))
    torch.testing.assert_close(smoothed, 0.8 * right + 0.2 * wrong)
    assert not torch.allclose(smoothed, right)


def test_robust_is_unbiased_under_wrong_labels():
    logps, _, _ = random_pairs()
    options = {"beta": 0.4, "loss_type": "robust", "label_smoothing": 0.2}
    expectation = 0.8 * dpo_loss(*logps, **options) + 0.2 * dpo_loss(*(logps[i] for i in (1, 0, 3, 2)), **options)
    torch.testing.assert_close(expectation, dpo_loss(*logps, beta=0.4))


def test_exo_is_least_at_the_smoothed_label():
    margin = math.log(0.9 / 0.1)
    policy = torch.tensor([margin], requires_grad=True)
    zeros = torch.zeros(1)
    loss = dpo_loss(policy, zeros, zeros, zeros, beta=1.0, loss_type="exo_pair", label_smoothing=0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert policy.grad.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_only_step_coupled_types_depend_on_the_other_pairs(loss_type):
    logps, chosen_length, rejected_length = random_pairs()
    options = {"beta": 0.4, "loss_type": loss_type, "label_smoothing": SMOOTHING_OF[loss_type]}
    mean_length = {"mean_chosen_length": chosen_length.double().mean()} if loss_type == "sft" else {}

    def loss(rows):
        lengths = needs(loss_type, chosen_length[rows], rejected_length[rows]) | mean_length
        return dpo_loss(*(logp[rows] for logp in logps), **options, **lengths)

    parts = torch.cat([loss(slice(0, 3)), loss(slice(3, 8))])
    assert torch.allclose(parts, loss(slice(0, 8))) == (loss_type not in STEP_COUPLED)


@pytest.mark.parametrize("loss_type", sorted(STEP_COUPLED))
def test_sorting_is_over_values_not_rows(loss_type):
    logps, _, _ = random_pairs()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = [logp[order] for logp in logps]
    options = {"beta": 0.4, "loss_type": loss_type}
    torch.testing.assert_close(dpo_loss(*shuffled, **options), dpo_loss(*logps, **options))


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_gradients(loss_type):
    logps, chosen_length, rejected_length = random_pairs(dtype=torch.float64)
    options = {"beta": 0.4, "loss_type": loss_type, "label_smoothing": SMOOTHING_OF[loss_type], "discopop_tau": 0.5}
    options |= needs(loss_type, chosen_length, rejected_length)
    policy = [logp.requires_grad_() for logp in logps[:2]]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, *logps[2:], **options), policy)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_extreme_values_stay_finite(loss_type, beta):
    logps = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=4))).T.clone().requires_grad_()
    options = {"beta": beta, "loss_type": loss_type, "label_smoothing": SMOOTHING_OF[loss_type]}
    for length in (0, 1, 1000):
        lengths = torch.full((2, logps.shape[1]), length)
        loss = dpo_loss(*logps, **options, **needs(loss_type, *lengths))
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), logps)[0].isfinite().all()


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_half_precision_inputs_give_float32_losses_and_stay_as_they_were(loss_type):
    logps, chosen_length, rejected_length = random_pairs()
    halves = [logp.bfloat16() for logp in logps]
    copies = [half.clone() for half in halves]
    options = {"beta": 0.4, "loss_type": loss_type, "label_smoothing": SMOOTHING_OF[loss_type]}
    options |= needs(loss_type, chosen_length, rejected_length)
    loss = dpo_loss(*halves, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dpo_loss(*(half.float() for half in halves), **options))
    assert all(torch.equal(*both) for both in zip(halves, copies, strict=True))


def test_refusals():
    logps, _, _ = random_pairs()
    with pytest.raises(ValueError, match=r"'sigmod'.*sigmoid, hinge, ipo.*sft"):
        dpo_loss(*logps, beta=0.1, loss_type="sigmod")
    with pytest.raises(ValueError, match=r"label_smoothing: set it above 0"):
        dpo_loss(*logps, beta=0.1, loss_type="exo_pair")
    with pytest.raises(ValueError, match=r"in \[0, 0.5\), got 0.5"):
        dpo_loss(*logps, beta=0.1, loss_type="robust", label_smoothing=0.5)
    for loss_type in DPO_LOSSES.keys() - set(LABEL_SMOOTHED):
        with pytest.raises(ValueError, match=f"'{loss_type}' has no label smoothing: set label_smoothing to 0"):
            dpo_loss(*logps, beta=0.1, loss_type=loss_type, label_smoothing=0.1)


def test_implicit_rewards():
    policy = torch.tensor([-3.0, -8.0], requires_grad=True)
    rewards = implicit_rewards(policy, torch.tensor([-5.0, -4.0]), beta=0.5)
    assert rewards.tolist() == [1, -2]
    assert not rewards.requires_grad
