import itertools
import math

import pytest
import torch

from arabic_qwen.methods.kto.loss import kto_kl, kto_loss
from tests.methods import trl_reference

LENGTHS = [5, 1, 9, 3, 2, 7]
LABEL = torch.tensor([True, False, False, True, True, False])
UNWEIGHTED = {"desirable_weight": 1.0, "undesirable_weight": 1.0}


@pytest.mark.parametrize("shift", [-4.0, 4.0])  # z is clamped, and is not
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.9)])
@pytest.mark.parametrize("label", [LABEL, torch.ones_like(LABEL), torch.zeros_like(LABEL)])
def test_equals_trl(label, weights, shift):
    options = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    logps, mask = trl_reference.completions(LENGTHS)
    reference = trl_reference.completions(LENGTHS, seed=1)[0].detach().sum(1)
    policy_kl = (torch.randn(6, generator=torch.Generator().manual_seed(2)) + shift).requires_grad_()
    reference_kl = torch.randn(6, generator=torch.Generator().manual_seed(3))
    theirs, their_kl = trl_reference.kto(logps, mask, reference, label, policy_kl, reference_kl, **options)

    kl = kto_kl((policy_kl - reference_kl).sum(), len(policy_kl))
    assert kl.item() == pytest.approx(their_kl, abs=1e-5)
    assert (kl > 0) == (shift > 0)
    ours = kto_loss(logps.sum(1), reference, label, kl, **options).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] * mask for loss in (ours, theirs)))


def test_closed_form():
    # β(Δ − z) = 0.5 (3 − 1) = 1 for the desirable one; β(z − Δ) = 0.5 (1 + 2) = 1.5 for the other
    loss = kto_loss(
        torch.tensor([-5.0, -9.0]),
        torch.tensor([-8.0, -7.0]),
        torch.tensor([1, 0]),
        torch.tensor(1.0),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert loss.tolist() == pytest.approx([2 / (1 + math.exp(1)), 3 / (1 + math.exp(1.5))])


def test_desirable_and_undesirable_are_mirror_images():
    gain, zeros = torch.linspace(-5, 5, 11), torch.zeros(11)
    desirable = kto_loss(gain, zeros, torch.ones(11), 0.0, beta=0.7, **UNWEIGHTED)
    undesirable = kto_loss(-gain, zeros, torch.zeros(11), 0.0, beta=0.7, **UNWEIGHTED)
    torch.testing.assert_close(desirable, undesirable)
    assert desirable.diff().lt(0).all()


def test_kl_has_no_gradient_and_is_never_negative():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = kto_kl((policy - torch.tensor([-4.0, -3.0])).sum(), 2)
    assert kl.item() == 2
    assert not kl.requires_grad
    assert kto_kl(policy.sum(), 2).item() == 0
    assert kto_kl(torch.zeros(()), torch.zeros(())).item() == 0  # a rank without rows
    loss = kto_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), policy.sum(), beta=0.1, **UNWEIGHTED)
    assert not loss.requires_grad


def test_small_losses_keep_their_digits():
    loss = kto_loss(torch.tensor([30.0]), torch.zeros(1), torch.ones(1), 0.0, beta=1.0, **UNWEIGHTED)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)


def test_gradients():
    tensors = [-torch.rand(6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    options = {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.7}
    assert torch.autograd.gradcheck(lambda *x: kto_loss(*x, LABEL, 0.2, **options), tensors)


def test_extreme_values_stay_finite():
    values = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=2))).T.clone().requires_grad_()
    for label, kl in itertools.product([0, 1], [0.0, 2e4]):
        loss = kto_loss(*values, torch.full((9,), label), kl, beta=0.5, **UNWEIGHTED)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), values)[0].isfinite().all()
