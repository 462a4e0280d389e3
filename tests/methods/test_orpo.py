import itertools
import math

import pytest
import torch

from arabic_qwen.methods.orpo.loss import log_odds, orpo_loss
from arabic_qwen.methods.sft.loss import chosen_nll
from tests.methods import trl_reference

LENGTHS = [5, 1, 9, 3, 2, 7, 7, 4]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_with_chosen_nll_equals_trl(beta):
    pairs = trl_reference.PairLogits(LENGTHS)
    theirs = pairs.loss(trl_reference.orpo_trainer(beta=beta))
    policy_chosen, policy_rejected = pairs.logps.chunk(2)
    lengths = pairs.lengths.chunk(2)
    nll = chosen_nll(policy_chosen, mean_length=lengths[0].float().mean())
    ours = (nll + orpo_loss(policy_chosen, policy_rejected, *lengths, beta=beta)).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pairs.logits)[0] for loss in (ours, theirs)))


def test_each_pair_equals_trl():
    chosen, rejected = -3 * torch.rand(2, 50).add_(0.01)
    theirs = -trl_reference.orpo_trainer(beta=0.3).odds_ratio_loss(chosen, rejected)[0]
    ones = torch.ones(50, dtype=torch.int64)
    torch.testing.assert_close(orpo_loss(chosen, rejected, ones, ones, beta=0.3), theirs, rtol=1e-5, atol=1e-5)


def test_closed_form():
    # Averages are probabilities of 3/4 and 1/2: odds 3 and 1, and −log σ(log 3) = log(4/3).
    chosen, rejected = 4 * torch.tensor([0.75]).log(), 2 * torch.tensor([0.5]).log()
    loss = orpo_loss(chosen, rejected, torch.tensor([4]), torch.tensor([2]), beta=0.5)
    assert loss.item() == pytest.approx(0.5 * math.log(4 / 3))


def test_log_odds_near_certainty_are_exact():
    # log(p / (1 − p)) in float64, to float32's precision, where 1 − exp(x) would round to 0
    averages = torch.tensor([-1e-6, -1e-4, -0.01, -0.693, -1.0, -20.0, -200.0])
    exact = averages.double() - torch.log(-torch.expm1(averages.double()))
    torch.testing.assert_close(log_odds(averages), exact.float(), rtol=1e-6, atol=1e-6)


def test_certainty_is_finite():
    policy = torch.zeros(2, requires_grad=True)
    ones = torch.ones(1, dtype=torch.int64)
    for rejected in (policy[1:], policy[1:] - 5):
        loss = orpo_loss(policy[:1], rejected, ones, ones, beta=0.1)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), policy)[0].isfinite().all()


def test_gradients():
    tensors = [(-torch.rand(6, dtype=torch.float64) - 0.01).requires_grad_() for _ in range(2)]
    lengths = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([3, 3, 1, 9, 2, 2])
    assert torch.autograd.gradcheck(lambda *x: orpo_loss(*x, *lengths, beta=0.3), tensors)


def test_extreme_and_empty_completions_stay_finite():
    values = [-1e4, -1.0, -1e-7, -1e-8, -1e-30, 0.0, 1e4]
    tensors = torch.tensor(list(itertools.product(values, repeat=2))).T.clone().requires_grad_()
    for length in (0, 1, 1000):
        lengths = torch.full((tensors.shape[1],), length)
        loss = orpo_loss(*tensors, lengths, lengths, beta=0.1)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), tensors)[0].isfinite().all()
