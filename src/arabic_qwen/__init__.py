"""Fine-tune Qwen models for Arabic: packed, exact and fast."""

import logging

# Said when peft imports bitsandbytes, of an optional kernel that is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
