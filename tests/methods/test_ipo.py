import itertools

import pytest
import torch

from arabic_qwen.methods.ipo.loss import ipo_loss
from tests.methods import trl_reference

LENGTHS = [5, 1, 9, 3, 2, 7, 7, 4]  # four chosen, four rejected completions


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_equals_trl(tau):
    logps, mask = trl_reference.completions(LENGTHS)
    reference = trl_reference.completions(LENGTHS, seed=1)[0].detach().sum(1)
    theirs = trl_reference.dpo("ipo", logps, mask, reference, beta=tau)
    ours = ipo_loss(*logps.sum(1).chunk(2), *reference.chunk(2), *mask.sum(1).chunk(2), tau=tau).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] * mask for loss in (ours, theirs)))


def test_closed_form():
    # h = (−4 + 6)/2 − (−9 + 6)/3 = 2; 1/(2τ) = 2.5
    tensors = [torch.tensor([x]) for x in (-4.0, -9.0, -6.0, -6.0)]
    lengths = torch.tensor([2]), torch.tensor([3])
    assert ipo_loss(*tensors, *lengths, tau=0.2).item() == pytest.approx(0.25)
    assert ipo_loss(*tensors, *lengths, tau=0.2, label_smoothing=0.1).item() == pytest.approx(0.9 * 0.25 + 0.1 * 20.25)


def test_is_least_where_the_margin_is_its_target():
    policy = torch.tensor([-10.0], requires_grad=True)
    others = torch.tensor([-12.0])
    loss = ipo_loss(policy, others, others, others, torch.tensor([1]), torch.tensor([1]), tau=0.25)
    loss.sum().backward()
    assert loss.item() == 0
    assert policy.grad.item() == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradients(label_smoothing):
    tensors = [-torch.rand(6, dtype=torch.float64).requires_grad_() for _ in range(4)]
    lengths = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([3, 3, 1, 9, 2, 2])
    assert torch.autograd.gradcheck(
        lambda *x: ipo_loss(*x, *lengths, tau=0.3, label_smoothing=label_smoothing), tensors
    )


def test_extreme_and_empty_completions_stay_finite():
    tensors = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=4))).T.clone().requires_grad_()
    for length in (0, 1, 1000):
        lengths = torch.full((tensors.shape[1],), length)
        loss = ipo_loss(*tensors, lengths, lengths.flip(0), tau=0.1, label_smoothing=0.1)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), tensors)[0].isfinite().all()
