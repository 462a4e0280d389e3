"""Fine-tune Qwen models for Arabic: packed, exact and fast."""

__version__ = "0.1.0"
