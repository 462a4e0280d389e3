import pytest
import torch

from arabic_qwen.losses.sft import chosen_nll, sft_loss


def test_closed_form():
    logps = torch.tensor([0.5, 0.25, 0.125]).log()
    assert sft_loss(logps, num_tokens=3).item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())


def test_is_the_token_mean_of_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(20, 11), torch.randint(11, (20,))
    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(sft_loss(logps, num_tokens=20), torch.nn.functional.cross_entropy(logits, targets))


@pytest.mark.parametrize("num_tokens", [7, torch.tensor(7)])
def test_parts_add_up_to_the_whole(num_tokens):
    torch.manual_seed(0)
    logps = -torch.rand(7)
    whole = sft_loss(logps, num_tokens=num_tokens)
    parts = [sft_loss(part, num_tokens=num_tokens) for part in logps.split([3, 0, 4])]
    torch.testing.assert_close(sum(parts), whole)
    assert whole.shape == ()


def test_gradient_is_the_same_for_every_token():
    logps = torch.tensor([-1.0, -2.0, -30.0, 0.0], requires_grad=True)
    sft_loss(logps, num_tokens=8).backward()
    assert logps.grad.tolist() == [-1 / 8] * 4


def test_no_targets_cost_nothing():
    logps = torch.zeros(0, requires_grad=True)
    loss = sft_loss(logps, num_tokens=5)
    loss.backward()
    assert loss.item() == 0


def test_mean_of_chosen_nll_over_rows_is_the_token_mean_however_the_step_is_cut():
    policy, lengths = torch.tensor([-3.0, -8.0, 0.0, -1.0], requires_grad=True), torch.tensor([2, 5, 0, 1])
    mean_length = lengths.sum() / len(lengths)
    parts = [chosen_nll(part, mean_length=mean_length) for part in policy.split([1, 3])]
    assert torch.cat(parts).mean().item() == pytest.approx(12 / 8)
    torch.testing.assert_close(torch.cat(parts).mean(), sft_loss(policy, num_tokens=8))
