import pytest
import torch

from arabic_qwen.methods.sft.loss import chosen_nll


def test_mean_over_rows_is_the_token_mean_of_cross_entropy():
    torch.manual_seed(0)
    lengths = [7, 1, 12]
    logits, targets = torch.randn(20, 11, requires_grad=True), torch.randint(11, (20,))
    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    rows = torch.stack([part.sum() for part in logps.split(lengths)])
    ours = chosen_nll(rows, mean_length=20 / 3).mean()
    exact = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(ours, exact)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, exact)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mean_length", [2.0, torch.tensor(2.0)])
def test_it_does_not_matter_how_a_step_is_cut(mean_length):
    policy = torch.tensor([-3.0, -8.0, 0.0, -1.0])  # 8 tokens in 4 rows
    parts = [chosen_nll(part, mean_length=mean_length) for part in policy.split([1, 0, 3])]
    assert torch.cat(parts).mean().item() == pytest.approx(12 / 8)


def test_gradient_is_the_same_for_every_row():
    policy = torch.tensor([-1.0, -2.0, -30.0, 0.0], requires_grad=True)
    chosen_nll(policy, mean_length=2.0).mean().backward()
    assert policy.grad.tolist() == [-1 / 8] * 4
