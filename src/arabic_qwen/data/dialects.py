"""Which dialect the answers of a validation set are in, so that it is measured by dialect too."""

from __future__ import annotations

from collections import Counter

from transformers import PreTrainedTokenizerBase

from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.text.dialects import UNKNOWN, load_classifier

_MIN_ROWS = 5  # fewer make no mean


def tag_dialects(dataset: GroupDataset, tokenizer: PreTrainedTokenizerBase, classifier: str | None) -> None:
    """Tag the groups with the dialect of their first completion, where at least two dialects have five groups or more.

    Args:
        dataset: is changed.
        tokenizer: that it was encoded with.
        classifier: file of the classifier; None: the one that comes with the package.
    """
    answers = [group.completions[0] for group in dataset.groups]
    texts = tokenizer.batch_decode([answer.ids[answer.targets] for answer in answers], skip_special_tokens=True)
    found = [prediction.dialect for prediction in load_classifier(classifier).predict(texts)]
    counted = Counter(found)
    dialects = sorted(name for name, number in counted.items() if number >= _MIN_ROWS and name != UNKNOWN)
    if len(dialects) > 1:
        dataset.dialects = tuple(dialects)
        tags = {name: tag for tag, name in enumerate(dialects, 1)}
        dataset.groups = [g._replace(tag=tags.get(name, 0)) for g, name in zip(dataset.groups, found, strict=True)]
