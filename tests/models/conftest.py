import pytest
import torch

from arabic_qwen.models import precision


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a machine with or without CUDA, and with or without bfloat16 (an Ampere GPU, or a Volta)."""

    def pretend(cuda: bool, bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if bf16 else (7, 0))
        monkeypatch.setattr(precision, "_processor_has_bf16", lambda: bf16)

    return pretend
