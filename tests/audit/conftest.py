import pytest

from arabic_qwen.audit import check
from arabic_qwen.text.dialects import Prediction


class StandardOnly:
    """A classifier for which all text is modern standard Arabic."""

    def predict(self, texts):
        return [Prediction("MSA", 0.99) for _ in texts]

    def leaning(self, text, dialect, other):
        return 10.0, 0.0


@pytest.fixture
def standard_only(monkeypatch):
    monkeypatch.setattr(check, "load_classifier", StandardOnly)
