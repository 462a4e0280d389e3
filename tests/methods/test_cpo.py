import itertools
import math

import pytest
import torch

from arabic_qwen.methods.cpo.loss import CPO_LOSSES, cpo_loss
from tests.methods import trl_reference

LENGTHS = [5, 1, 9, 3, 2, 7, 7, 4]
VARIANTS = [(loss_type, "mean") for loss_type in CPO_LOSSES] + [("sigmoid", "softmax")]


def ragged(dtype=torch.float32):
    """Rows with 0 … 5 negatives, in mixed order; the first and the last have none."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 3, 1, 5, 2, 4, 0])
    group = torch.arange(7).repeat_interleave(counts)
    group = group[torch.randperm(len(group), generator=generator)]
    chosen, rejected = (-10 * torch.rand(size, generator=generator, dtype=dtype) for size in (7, len(group)))
    lengths = [torch.randint(1, 20, (size,), generator=generator) for size in (7, len(group))]
    return chosen, rejected, group, *lengths


@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize(
    ("loss_type", "negatives", "label_smoothing"),
    # TRL ignores label_smoothing for hinge and ipo
    [(*variant, 0.0) for variant in VARIANTS]
    + [("sigmoid", "mean", 0.2), ("sigmoid", "softmax", 0.2), ("simpo", "mean", 0.2)],
)
def test_one_negative_equals_trl(loss_type, negatives, label_smoothing, cpo_alpha):
    options = {"beta": 0.6, "cpo_alpha": cpo_alpha, "simpo_gamma": 0.8, "label_smoothing": label_smoothing}
    pairs = trl_reference.PairLogits(LENGTHS)
    theirs = pairs.loss(trl_reference.cpo_trainer(loss_type, **options))
    lengths = pairs.lengths.chunk(2)
    ours = cpo_loss(
        *pairs.logps.chunk(2),
        torch.arange(4),
        *lengths,
        loss_type=loss_type,
        negatives=negatives,
        mean_chosen_length=lengths[0].float().mean(),
        **options,
    ).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pairs.logits)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("loss_type", CPO_LOSSES)
def test_many_negatives_equal_the_mean_of_trl_over_them(loss_type):
    chosen, rejected, group, chosen_length, rejected_length = ragged()
    ours = cpo_loss(
        chosen, rejected, group, chosen_length, rejected_length, beta=0.6, simpo_gamma=0.8, loss_type=loss_type
    )
    if loss_type in ("ipo", "simpo"):  # TRL averages before it calls its loss
        chosen, rejected = chosen / chosen_length, rejected / rejected_length
    trainer = trl_reference.cpo_trainer(loss_type, beta=0.6, simpo_gamma=0.8)
    for row in range(7):
        negatives = rejected[group == row]
        theirs = trainer.cpo_loss(chosen[row].expand(len(negatives)), negatives)[0]
        expected = theirs.mean() if len(negatives) else torch.tensor(0.0)
        torch.testing.assert_close(ours[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("loss_type", "negatives"), VARIANTS)
def test_ragged_rows_equal_rows_alone(loss_type, negatives, label_smoothing):
    chosen, rejected, group, chosen_length, rejected_length = ragged()
    options = {"beta": 0.6, "loss_type": loss_type, "negatives": negatives, "label_smoothing": label_smoothing}
    together = cpo_loss(chosen, rejected, group, chosen_length, rejected_length, **options)
    for row in range(7):
        mine = group == row
        alone = cpo_loss(
            chosen[row : row + 1],
            rejected[mine],
            torch.zeros(int(mine.sum()), dtype=torch.int64),
            chosen_length[row : row + 1],
            rejected_length[mine],
            **options,
        )
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_softmax_is_the_cross_entropy_of_the_row(label_smoothing):
    chosen, rejected, group, *_ = ragged()
    options = {"beta": 0.6, "negatives": "softmax", "label_smoothing": label_smoothing}
    loss = cpo_loss(chosen, rejected, group, **options)
    for row in range(7):
        logits = 0.6 * torch.cat([chosen[row : row + 1], rejected[group == row]])
        target = torch.full_like(logits, label_smoothing / max(len(logits) - 1, 1))
        target[0] = 1 - label_smoothing if len(logits) > 1 else 1
        torch.testing.assert_close(loss[row], torch.nn.functional.cross_entropy(logits, target))


def test_closed_form():
    # margins 2 and −1 in the first row, 3 in the third, none in the second
    chosen, rejected = torch.tensor([-4.0, -1.0, -5.0]), torch.tensor([-6.0, -8.0, -3.0])
    group = torch.tensor([0, 2, 0])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    mean = cpo_loss(chosen, rejected, group, beta=0.5)
    assert mean.tolist() == pytest.approx([(softplus(-1) + softplus(0.5)) / 2, 0, softplus(-1.5)])
    softmax = cpo_loss(chosen, rejected, group, beta=0.5, negatives="softmax")
    assert softmax.tolist() == pytest.approx([math.log(1 + math.exp(-1) + math.exp(0.5)), 0, softplus(-1.5)])
    hinge = cpo_loss(chosen, rejected, group, beta=0.5, loss_type="hinge")
    assert hinge.tolist() == pytest.approx([(0 + 1.5) / 2, 0, 0])
    ones = torch.ones(3, dtype=torch.int64)
    ipo = cpo_loss(chosen, rejected, group, ones, ones, beta=0.5, loss_type="ipo")
    assert ipo.tolist() == pytest.approx([(1 + 4) / 2, 0, 4])
    simpo = cpo_loss(chosen, rejected, group, ones, ones, beta=0.5, loss_type="simpo", simpo_gamma=0.25)
    assert simpo.tolist() == pytest.approx([(softplus(-0.75) + softplus(0.75)) / 2, 0, softplus(-1.25)])


@pytest.mark.parametrize(("loss_type", "negatives"), VARIANTS)
def test_label_smoothing_changes_the_loss(loss_type, negatives):
    arguments = ragged()
    options = {"beta": 0.6, "loss_type": loss_type, "negatives": negatives}
    plain, smoothed = (cpo_loss(*arguments, **options, label_smoothing=epsilon) for epsilon in (0.0, 0.2))
    has_negatives = torch.bincount(arguments[2], minlength=7) > 0
    assert torch.equal(plain != smoothed, has_negatives)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_nll_is_the_token_mean_however_the_step_is_cut(cut):
    chosen, rejected, group, chosen_length, _ = ragged()
    options = {"beta": 0.6, "cpo_alpha": 0.4, "mean_chosen_length": chosen_length.sum() / 7}
    parts = []
    for rows, first in ((slice(0, cut), 0), (slice(cut, 7), cut)):
        mine = (group >= rows.start) & (group < rows.stop)
        parts.append(cpo_loss(chosen[rows], rejected[mine], group[mine] - first, **options))
    preference = cpo_loss(chosen, rejected, group, beta=0.6)
    expected = preference.mean() - 0.4 * chosen.sum() / chosen_length.sum()
    torch.testing.assert_close(torch.cat(parts).sum() / 7, expected)


def test_only_the_nll_counts_without_negatives():
    chosen = torch.tensor([-4.0, -1.0], requires_grad=True)
    nothing = torch.zeros(0, requires_grad=True)
    group = torch.zeros(0, dtype=torch.int64)
    for negatives in ("mean", "softmax"):
        options = {"beta": 0.5, "negatives": negatives}
        loss = cpo_loss(chosen, nothing, group, **options)
        assert loss.tolist() == [0, 0]
        assert torch.autograd.grad(loss.sum(), chosen)[0].tolist() == [0, 0]
        loss = cpo_loss(chosen, nothing, group, cpo_alpha=2.0, mean_chosen_length=4.0, **options)
        assert loss.tolist() == [2, 0.5]
        assert torch.autograd.grad(loss.sum(), chosen)[0].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(("loss_type", "negatives"), VARIANTS)
def test_gradients(loss_type, negatives):
    chosen, rejected, *rest = ragged(torch.float64)
    options = {"beta": 0.6, "loss_type": loss_type, "negatives": negatives, "label_smoothing": 0.2}
    options |= {"cpo_alpha": 0.3, "mean_chosen_length": 5.0}
    policy = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: cpo_loss(*x, *rest, **options), policy)


@pytest.mark.parametrize(("loss_type", "negatives"), VARIANTS)
def test_extreme_values_stay_finite(loss_type, negatives):
    values = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=3)))
    chosen, rejected = values[:, 0].clone().requires_grad_(), values[:, 1:].flatten().requires_grad_()
    group = torch.arange(len(values)).repeat_interleave(2)
    options = {"beta": 2.0, "loss_type": loss_type, "negatives": negatives, "label_smoothing": 0.1}
    for length in (0, 1, 1000):
        lengths = torch.full_like(chosen, length), torch.full_like(rejected, length)
        loss = cpo_loss(chosen, rejected, group, *lengths, cpo_alpha=1.0, mean_chosen_length=3.0, **options)
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), (chosen, rejected)))


def test_half_precision_inputs_give_float32_losses():
    chosen, rejected, group, *_ = ragged()
    for negatives in ("mean", "softmax"):
        assert (
            cpo_loss(chosen.bfloat16(), rejected.bfloat16(), group, beta=0.1, negatives=negatives).dtype
            == torch.float32
        )


def test_refusals():
    arguments = ragged()
    with pytest.raises(ValueError, match=r"'sigmod'.*sigmoid, hinge, ipo, simpo"):
        cpo_loss(*arguments, beta=0.1, loss_type="sigmod")
    with pytest.raises(ValueError, match=r"'max'.*mean, softmax"):
        cpo_loss(*arguments, beta=0.1, negatives="max")
    with pytest.raises(ValueError, match=r"needs loss_type 'sigmoid', got 'simpo'"):
        cpo_loss(*arguments, beta=0.1, negatives="softmax", loss_type="simpo")
