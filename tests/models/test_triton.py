"""The kernels against float64. tests/models/test_head.py has the head's."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_head import relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def separate(gate, gate_a, gate_b, up, up_a, up_b):
    return F.silu(gate + gate_a @ gate_b.T) * (up + up_a @ up_b.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 96, 4), (33, 130, 1), (500, 4864, 16), (257, 18944, 64)])
def test_swiglu_of_base_and_adapters(rows, width, rank, dtype):
    from arabic_qwen.models.kernels.triton import lora_swiglu

    torch.manual_seed(0)
    sizes = [(rows, width), (rows, rank), (width, rank)] * 2
    inputs = [torch.randn(size, device="cuda").to(dtype) for size in sizes]
    upstream = torch.randn(rows, width, device="cuda").to(dtype)

    def run(function, to=None):
        given = [tensor.detach().clone().to(to).requires_grad_() for tensor in inputs]
        output = function(*given)
        output.backward(upstream.to(to))
        return [output, *(tensor.grad for tensor in given)]

    for ours, eager, exact in zip(run(lora_swiglu), run(separate), run(separate, torch.float64), strict=True):
        assert relative(ours, exact) < 1.2 * relative(eager, exact)
    compiled = torch.compile(lora_swiglu, dynamic=True, fullgraph=True)
    for ours, again in zip(run(compiled), run(lora_swiglu), strict=True):
        assert relative(ours, again.double()) < 1e-3  # sums in another order
