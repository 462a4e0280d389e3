"""Exceptions for users: each message says what is wrong, where, and what to do about it."""


class TrainingError(Exception):
    """Base of every error that this package raises on purpose."""


class ModelLoadError(TrainingError):
    """A model, adapter or tokenizer could not be loaded."""


class DatasetError(TrainingError):
    """A data file is missing or unreadable, or has rows that cannot be trained on."""


class ConfigurationError(TrainingError, ValueError):
    """A configuration has an unknown key, a bad value, or values that contradict each other."""


class HostileTemplateError(TrainingError):
    """A chat template exceeds the limits of its sandbox or tries to leave it."""
