"""What does not fit into memory is halved until it does."""

import os
import platform

import numpy as np
import pytest
import torch

from arabic_qwen.data.packing import Completion, Group
from arabic_qwen.errors import TrainingError
from arabic_qwen.models.memory_limit import let_segments_grow, within_memory


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


@pytest.mark.parametrize(
    ("variables", "system", "release", "settings"),
    [
        ({}, "Linux", "6.8.0", ["True"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "Linux", "6.8.0", []),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "Linux", "6.8.0", []),
        ({}, "Linux", "5.15.167.4-microsoft-standard-WSL2", []),
        ({}, "Windows", "11", []),
        ({}, "Linux", "virtual", ["True", "False"]),
    ],
)
def test_segments_grow_where_they_can_and_nothing_else_is_chosen(variables, system, release, settings, monkeypatch):
    told = []

    def take(*args, **kwargs):
        if release == "virtual":
            raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "empty", take)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    let_segments_grow()
    assert told == [f"expandable_segments:{setting}" for setting in settings]
