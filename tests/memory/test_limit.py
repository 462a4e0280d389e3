"""What does not fit into memory is halved until it does."""

import numpy as np
import pytest
import torch

from arabic_qwen.errors import TrainingError
from arabic_qwen.memory.limit import within_memory
from arabic_qwen.packing.group import Completion, Group


def group(tokens):
    ids = np.zeros(tokens - 1, dtype=np.int32)
    return Group(np.zeros(1, dtype=np.int32), (Completion(ids, ids == 0),))


GROUPS = [group(n) for n in (30, 20, 10, 40)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_the_budget_is_halved(error, caplog):
    tried = []

    def compute(budget):
        tried.append(budget)
        if budget > 45:
            raise error
        return "done"

    assert within_memory(compute, 8192, GROUPS) == ("done", 40)
    assert tried == [8192, 50, 40]  # the groups have 100 tokens, the longest 40
    assert ["8192" in text and "50" in text for text in caplog.messages] == [True, False]


def test_the_longest_alone_must_fit():
    def compute(budget):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match=r"data:7 alone \(40 tokens\); lower max_seq_length.*load_in_4bit") as info:
        within_memory(compute, 64, GROUPS, lambda longest: "data:7")
    assert info.value.__cause__ is info.value.__context__ is None


def test_other_errors_are_not_taken():
    def compute(budget):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        within_memory(compute, 64, GROUPS)
