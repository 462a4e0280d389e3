import math

import pytest
import torch

from arabic_qwen.methods.margins import at_least_float32, hinge, length_average, logistic, squared


def test_closed_forms():
    margin = torch.tensor([0.0, 2.0, -2.0])
    softplus = [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))]
    assert logistic(margin).tolist() == pytest.approx(softplus)
    assert hinge(margin).tolist() == [1, 0, 3]
    assert squared(margin, 1).tolist() == [1, 1, 9]


@pytest.mark.parametrize("loss", [logistic, hinge, lambda margin, epsilon=0.0: squared(margin, 0.7, epsilon)])
def test_label_smoothing_mixes_the_two_labels(loss):
    margin = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(loss(margin, 0.2), 0.8 * loss(margin) + 0.2 * loss(-margin))
    torch.testing.assert_close(loss(margin, 0.5), loss(-margin, 0.5))
    assert not torch.allclose(loss(margin, 0.2), loss(margin))


def test_length_average_of_an_empty_completion_is_zero():
    logps = torch.tensor([-6.0, 0.0], requires_grad=True)
    average = length_average(logps, torch.tensor([3, 0]))
    average.sum().backward()
    assert average.tolist() == [-2, 0]
    assert logps.grad.isfinite().all()


def test_half_precision_becomes_float32():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    assert [at_least_float32(torch.zeros(1, dtype=dtype)).dtype for dtype in dtypes] == [torch.float32] * 3 + [
        torch.float64
    ]
