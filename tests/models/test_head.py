import pytest
import torch

from arabic_qwen.models import head as logps
from arabic_qwen.models.head import token_logps

TOKENS, WIDTH, VOCABULARY = 13, 16, 50


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]


def inputs(dtype=torch.float32, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, targets, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(tokens, generator=generator)


@pytest.fixture(params=[1, 4, 5, TOKENS, 1000], ids=lambda rows: f"chunks of {rows}")
def chunk_rows(request, monkeypatch) -> int:
    monkeypatch.setattr(logps, "_chunks", lambda hidden, *_: range(0, len(hidden), request.param))
    return request.param


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def test_values_and_gradients(chunk_rows):
    hidden, weight, targets, upstream = inputs()
    result = token_logps(hidden, weight, targets)
    expected = naive(hidden, weight, targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(
        torch.autograd.grad(result, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        assert relative(gradient, other) < 1e-5


def test_bfloat16_is_close_to_the_exact_result(chunk_rows):
    hidden, weight, targets, upstream = inputs(torch.bfloat16)
    result = token_logps(hidden, weight, targets)
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    expected = naive(exact_hidden, exact_weight, targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=5e-2)
    gradients = torch.autograd.grad(result, (hidden, weight), upstream)
    exact = torch.autograd.grad(expected, (exact_hidden, exact_weight), upstream)
    for gradient, other in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient, other) < 2e-2


def test_autocast_computes_in_its_precision_and_keeps_the_masters():
    hidden, weight, targets, upstream = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = token_logps(hidden, weight, targets)
    torch.testing.assert_close(result, token_logps(hidden.bfloat16(), weight.bfloat16(), targets), rtol=0, atol=0)
    gradients = torch.autograd.grad(result, (hidden, weight), upstream)
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]


def test_large_logits_do_not_overflow():
    hidden, weight, targets, _ = inputs()
    result = token_logps(hidden * 1e4, weight, targets)
    torch.testing.assert_close(result, naive(hidden * 1e4, weight, targets))
    assert result.isfinite().all()


def test_weight_that_is_used_twice_gets_both_gradients(chunk_rows):
    _, weight, targets, upstream = inputs()
    inner = torch.arange(TOKENS) % VOCABULARY

    def gradient(function) -> torch.Tensor:
        hidden = torch.tanh(weight[inner])  # as a tied embedding
        return torch.autograd.grad(function(hidden, weight, targets), weight, upstream)[0]

    assert relative(gradient(token_logps), gradient(naive)) < 1e-5


def test_frozen_weight_gets_no_gradient(chunk_rows):
    hidden, weight, targets, upstream = inputs()
    (expected,) = torch.autograd.grad(naive(hidden, weight, targets), hidden, upstream)
    weight.requires_grad_(False)
    token_logps(hidden, weight, targets).backward(upstream)
    assert weight.grad is None
    assert relative(hidden.grad, expected) < 1e-5


def test_frozen_hidden_states_get_no_gradient(chunk_rows):
    hidden, weight, targets, upstream = inputs()
    (expected,) = torch.autograd.grad(naive(hidden, weight, targets), weight, upstream)
    hidden.requires_grad_(False)
    token_logps(hidden, weight, targets).backward(upstream)
    assert hidden.grad is None
    assert relative(weight.grad, expected) < 1e-5


def test_without_gradients_nothing_is_kept():
    hidden, weight, targets, _ = inputs()
    with torch.no_grad():
        assert token_logps(hidden, weight, targets).grad_fn is None


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary():
    hidden, weight, targets, _ = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        token_logps(hidden, weight, targets)
    assert kept
    assert (TOKENS, VOCABULARY) not in kept


def test_no_targets(chunk_rows):
    hidden, weight, targets, _ = inputs(tokens=0)
    result = token_logps(hidden, weight, targets)
    assert result.shape == (0,)
    result.sum().backward()
    assert hidden.grad.shape == (0, WIDTH)
    assert not weight.grad.any()


@pytest.mark.parametrize("vocabulary", [10, 151_936, 2**25])
def test_chunks_cover_every_row_within_memory(vocabulary):
    weight = torch.empty(vocabulary, 1, device="meta")
    hidden = torch.empty(1000, 1)
    rows = logps._chunks(hidden, weight)
    covered = [row for start in rows for row in range(1000)[start : start + rows.step]]
    assert covered == list(range(1000))
    assert rows.step == 1 or rows.step * vocabulary * 4 <= 2**26


def test_confident_tokens_in_half_precision():
    """Softmax minus one-hot is small where the model is sure; rounding the softmax first would leave noise."""
    torch.manual_seed(0)
    weight = torch.randn(500, 64)
    hidden = weight[:32] * 0.2 + torch.randn(32, 64) * 0.01
    targets = torch.arange(32)

    def gradient(dtype):
        h = hidden.to(torch.bfloat16).to(dtype).requires_grad_()
        logps = token_logps(h, weight.to(torch.bfloat16).to(dtype), targets)
        assert logps.exp().median() > 0.99
        logps.sum().backward()
        return h.grad.double()

    exact = gradient(torch.float64)
    assert ((gradient(torch.bfloat16) - exact).norm() / exact.norm()).item() < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 8192, 151_936])
def test_kernel_on_a_gpu(dtype, vocabulary):
    """Against float64, as the ordinary way is: with and without gradients, for confident tokens, and for no tokens."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, 64, device="cuda").to(dtype)
    targets = torch.randint(vocabulary, (3000,), device="cuda")  # more than a chunk
    hidden = (weight[targets] * torch.rand(3000, 1, device="cuda")).to(dtype)

    def run(inner, compiled):
        inner = inner.clone().requires_grad_()
        found = token_logps(inner, weight.to(inner.dtype), targets, compiled)
        found.sum().backward()
        with torch.no_grad():
            assert torch.equal(token_logps(inner, weight.to(inner.dtype), targets, compiled), found)
        return found, inner.grad

    exact = run(hidden.double(), compiled=False)
    for found, eager, true in zip(run(hidden, compiled=True), run(hidden, compiled=False), exact, strict=True):
        assert relative(found, true) < 1.1 * relative(eager, true) + 1e-6
    assert token_logps(hidden[:0], weight, targets[:0], compiled=True).shape == (0,)
