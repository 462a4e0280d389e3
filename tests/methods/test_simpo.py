import itertools
import math

import pytest
import torch

from arabic_qwen.methods.simpo.loss import simpo_loss
from tests.methods import trl_reference

LENGTHS = [5, 1, 9, 3, 2, 7, 7, 4]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("beta", "gamma_beta_ratio"), [(2.0, 0.5), (0.5, 1.6)])
def test_equals_trl(beta, gamma_beta_ratio, label_smoothing):
    pairs = trl_reference.PairLogits(LENGTHS)
    theirs = pairs.loss(
        trl_reference.cpo_trainer(
            "simpo", beta=beta, simpo_gamma=beta * gamma_beta_ratio, label_smoothing=label_smoothing
        )
    )
    lengths = pairs.lengths.chunk(2)
    options = {"beta": beta, "gamma_beta_ratio": gamma_beta_ratio, "label_smoothing": label_smoothing}
    ours = simpo_loss(*pairs.logps.chunk(2), *lengths, **options).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pairs.logits)[0] for loss in (ours, theirs)))


def test_closed_form():
    # 2 (−4/2 + 9/3) − 1 = 1
    arguments = [torch.tensor([x]) for x in (-4.0, -9.0, 2, 3)]
    loss = simpo_loss(*arguments, beta=2.0, gamma_beta_ratio=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    smoothed = simpo_loss(*arguments, beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1)))


def test_length_does_not_matter_where_averages_are_equal():
    loss = simpo_loss(
        torch.tensor([-2.0, -20.0]),
        torch.tensor([-3.0, -3.0]),
        torch.tensor([2, 20]),
        torch.tensor([1, 1]),
        beta=2.0,
        gamma_beta_ratio=0.5,
    )
    assert loss[0] == loss[1]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradients(label_smoothing):
    tensors = [-torch.rand(6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    lengths = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([3, 3, 1, 9, 2, 2])
    options = {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": label_smoothing}
    assert torch.autograd.gradcheck(lambda *x: simpo_loss(*x, *lengths, **options), tensors)


def test_extreme_and_empty_completions_stay_finite():
    tensors = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=2))).T.clone().requires_grad_()
    for length in (0, 1, 1000):
        lengths = torch.full((tensors.shape[1],), length)
        loss = simpo_loss(*tensors, lengths, lengths, beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.1)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), tensors)[0].isfinite().all()
