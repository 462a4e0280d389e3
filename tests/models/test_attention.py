import numpy as np
import pytest
import torch

from arabic_qwen.models.attention import packed_attention_forward
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.group import Completion, Group


@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_the_precision_of_products(autocast):
    completions = tuple(Completion(np.array([1, 2]), np.array([True, True])) for _ in range(2))
    batch = pack([Group(np.array([1, 2, 3]), completions)])
    query = torch.randn(1, 4, len(batch.input_ids), 8)
    key, value = torch.randn(2, 1, 2, len(batch.input_ids), 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # DoRA on a quantised base gives float32 there
        output, _ = packed_attention_forward(None, query, key, value, None, packed=batch)
    assert output.dtype is (torch.bfloat16 if autocast else torch.float32)
