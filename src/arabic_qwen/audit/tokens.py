"""What Arabic text costs in tokens: by dialect, by diacritics, and what normalising would save."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arabic_qwen.audit.statistics import diacritic_kinds
from arabic_qwen.errors import ModelLoadError, one_line
from arabic_qwen.models.safety import check_files
from arabic_qwen.models.sources import locate_on_hub, resolve_model_name
from arabic_qwen.text.dialects import DialectClassifier, load_classifier
from arabic_qwen.text.normalization import normalize
from arabic_qwen.text.rules import OFF, TRAIN, Setting

#: Texts tokenised at a time.
_BATCH = 1000

#: What may be done to the texts, by the name that tables give it: each default rule of `train` by itself, all of them,
#: and all of them with diacritics removed.
CHANGES: dict[str, dict[str, Setting]] = {
    **{rule.name: {**OFF, rule.name: True} for rule in TRAIN if rule.default is True},
    "train": {},
    "train, diacritics=partial": {"diacritics": "partial"},
    "train, diacritics=strip": {"diacritics": "strip"},
}

_WORD = re.compile(r"[\u0620-\u065f\u0670-\u06d3\u0750-\u077f\ufb50-\ufdcf\ufe70-\ufefc]{2,}")
_WORST = 15


class Saving(NamedTuple):
    """What a change of the texts would do."""

    texts: int  # that it changes
    tokens: int  # that it saves; negative where it costs some


class BrokenWord(NamedTuple):
    """A word that is cut into small pieces."""

    word: str
    times: int
    pieces: tuple[str, ...]
    tokens: int


@dataclass
class Count:
    """Some texts and their tokens."""

    texts: int = 0
    words: int = 0  # between white space
    characters: int = 0
    tokens: int = 0

    def add(self, text: str, tokens: int) -> None:
        self.texts += 1
        self.words += len(text.split())
        self.characters += len(text)
        self.tokens += tokens

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "per_word": self.tokens / self.words if self.words else None,
            "per_character": self.tokens / self.characters if self.characters else None,
        }


@dataclass
class TokenCost:
    """What texts cost with one tokenizer."""

    total: Count = field(default_factory=Count)
    dialects: dict[str, Count] = field(default_factory=dict)
    diacritics: dict[str, Count] = field(default_factory=dict)
    savings: dict[str, Saving] = field(default_factory=dict)  # by CHANGES
    worst: list[BrokenWord] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            **self.total.as_dict(),
            "dialects": {name: count.as_dict() for name, count in self.dialects.items()},
            "diacritics": {name: count.as_dict() for name, count in self.diacritics.items()},
            "savings": {
                name: {**saving._asdict(), "share": saving.tokens / max(1, self.total.tokens)}
                for name, saving in self.savings.items()
            },
            "worst": [word._asdict() for word in self.worst],
        }


def load_any_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, of any kind of model: nothing but the tokenizer need be there.

    Raises:
        ModelLoadError: it cannot be found or read.
    """
    path = resolve_model_name(name)
    if not Path(path).is_dir():
        path = locate_on_hub(name)
    try:
        check_files(name, path, ["tokenizer_config.json"])
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        reason = "its files are missing"
    except ModelLoadError:
        raise
    except Exception as error:
        tokenizer, reason = None, one_line(error)
    if not tokenizer or len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise ModelLoadError(
            f"{name}: the tokenizer cannot be loaded ({reason}); give a folder with tokenizer.json, or a hub id"
        )
    return tokenizer


def token_cost(
    texts: Sequence[str],
    tokenizers: dict[str, PreTrainedTokenizerBase],
    classifier: DialectClassifier | None = None,
) -> dict[str, TokenCost]:
    """The cost of the texts with each tokenizer, without chat template and special tokens.

    Args:
        texts: all of them, in memory.
        tokenizers: by the name that the result gives them.
        classifier: of dialects; default: the one that comes with the package.
    """
    classifier = classifier or load_classifier()
    dialects = [prediction.dialect for batch in _batches(texts) for prediction in classifier.predict(batch)]
    diacritics = [kind for batch in _batches(texts) for kind in diacritic_kinds(batch)]
    # What one rule changes, all of them change too.
    places = [place for place, _ in _changes(texts, range(len(texts)), CHANGES["train, diacritics=strip"])]
    changed = {name: list(_changes(texts, places, rules)) for name, rules in CHANGES.items()}
    words = Counter(word for text in texts for word in _WORD.findall(text))
    costs = {}
    for name, tokenizer in tokenizers.items():
        cost = costs[name] = TokenCost(worst=_worst_words(words, tokenizer))
        lengths = list(token_counts(texts, tokenizer))
        for text, tokens, dialect, kind in zip(texts, lengths, dialects, diacritics, strict=True):
            for count in (
                cost.total,
                cost.dialects.setdefault(dialect, Count()),
                cost.diacritics.setdefault(kind, Count()),
            ):
                count.add(text, tokens)
        for change, pairs in changed.items():
            after = sum(token_counts([text for _, text in pairs], tokenizer))
            cost.savings[change] = Saving(len(pairs), sum(lengths[place] for place, _ in pairs) - after)
    return costs


def token_counts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The number of tokens of each text."""
    for batch in _batches(texts):
        yield from map(len, tokenizer(batch, add_special_tokens=False, return_attention_mask=False).input_ids)


def _changes(texts: Sequence[str], places: Iterable[int], rules: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(place, text after) of those of the texts in these places that normalising with these rules changes."""
    for place in places:
        after = normalize(texts[place], **rules)
        if after != texts[place]:
            yield place, after


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH)):
        yield batch


def _worst_words(words: Counter[str], tokenizer: PreTrainedTokenizerBase) -> list[BrokenWord]:
    """The words of three tokens or more and at most two letters a token that take the most tokens in all."""
    known = sorted(words)
    # after a space, as in the middle of a line
    lengths = token_counts((f" {word}" for word in known), tokenizer)
    broken = [(word, tokens) for word, tokens in zip(known, lengths, strict=True) if 3 <= tokens >= len(word) / 2]
    broken.sort(key=lambda item: (-words[item[0]] * item[1], item[0]))
    return [BrokenWord(word, words[word], pieces(word, tokenizer), tokens) for word, tokens in broken[:_WORST]]


def pieces(word: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The word's tokens as text; a piece that is several tokens, parts of a letter each, says so: "ڤ×2"."""
    found, pending = [], []
    for token in tokenizer(f" {word}", add_special_tokens=False).input_ids:
        pending.append(token)
        text = str(tokenizer.decode(pending, clean_up_tokenization_spaces=False)).strip()
        if "\ufffd" not in text:
            found.append(text if len(pending) == 1 else f"{text}×{len(pending)}")
            pending = []
    return tuple(piece for piece in found if piece)
