"""Exceptions for users: each message says what is wrong, where, and what to do about it."""

from arabic_qwen.redaction import redact


class TrainingError(Exception):
    """Base of every error that this package raises on purpose; its message holds no secrets."""

    def __init__(self, message: str = ""):
        super().__init__(redact(message))


class ModelLoadError(TrainingError):
    """A model, adapter or tokenizer could not be loaded."""


class DatasetError(TrainingError):
    """A data file is missing or unreadable, or has rows that cannot be trained on."""


class ConfigurationError(TrainingError, ValueError):
    """A configuration has an unknown key, a bad value, or values that contradict each other."""


class OutputError(TrainingError):
    """Files cannot be written: the disk is full, or the folder is gone or read-only."""


class HostileTemplateError(TrainingError):
    """A chat template exceeds the limits of its sandbox or tries to leave it."""


def one_line(error: Exception) -> str:
    """The first line of what another library's error says, for a message of ours; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
