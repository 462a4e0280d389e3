"""Which dialect of Arabic a text is in: a linear classifier of the character n-grams within words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text.normalization import fold
from arabic_qwen.text.rules import in_other_language
from arabic_qwen.text.spans import hide_spans

#: Modern standard, Egyptian, Levantine, Gulf, Maghrebi, Iraqi.
DIALECTS = ("MSA", "EGY", "LEV", "GLF", "MAG", "IRQ")
UNKNOWN = "unknown"

#: Of the texts that get a dialect, this share is meant to get the right one.
PRECISION = 0.9

_NGRAMS = (3, 5)  # characters, the spaces around a word included
_WHOLE = 3  # a whole word counts as much as so many n-grams
_BUCKETS = 2**17  # that n-grams are hashed into
_WORDS = (3, 200)  # Arabic words of a text: with fewer it is unknown, more are not looked at
_SURE = 0.6  # no dialect is named below it: texts of other kinds than those of the training are told less well
_FOLDS = 5
_CACHED_WORDS = 100_000
_WORD = re.compile("[ء-ي\u0671-\u06d3]+")
_LATIN_WORD = re.compile("[A-Za-z]{2,}")
_STRETCHED = re.compile(r"(.)\1{2,}")


class Prediction(NamedTuple):
    """The likeliest dialect, or "unknown" where its probability is below the classifier's threshold."""

    dialect: str
    confidence: float


def arabic_words(text: str) -> list[str]:
    """The Arabic words that tell a dialect, spelling folded; none where the text is mostly something else."""
    prose, _ = hide_spans(text[:20_000])
    prose = "\n".join(line for line in prose.split("\n") if not in_other_language(line))
    words = _WORD.findall(_STRETCHED.sub(r"\1", fold(prose)))
    enough = _WORDS[0] <= len(words) >= len(_LATIN_WORD.findall(prose))
    return words[: _WORDS[1]] if enough else []


class DialectClassifier:
    """Linear scores of a text's words, summed; as they are sums, each word is scored once and remembered.

    Args:
        labels: the dialects it knows.
        weights: float32 [labels, buckets].
        bias: float32 [labels].
        thresholds: float32 [labels], the probability from which each dialect is named.
    """

    def __init__(self, labels: Sequence[str], weights: np.ndarray, bias: np.ndarray, thresholds: np.ndarray):
        self.labels = tuple(labels)
        self.weights = weights
        self.bias = bias
        self.thresholds = thresholds
        self._scores: dict[str, np.ndarray] = {}

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction a text. "unknown": fewer than three Arabic words, another language, or no clear dialect."""
        words = [arabic_words(text) for text in texts]
        probabilities = _softmax(self._logits(words))
        best = probabilities.argmax(axis=1)
        predictions = []
        for found, row, place in zip(words, probabilities, best, strict=True):
            confidence = float(row[place]) if found else 0.0
            named = found and confidence >= self.thresholds[place]
            predictions.append(Prediction(self.labels[place] if named else UNKNOWN, confidence))
        return predictions

    def leaning(self, text: str, dialect: str, other: str) -> tuple[float, float]:
        """How much the word that speaks most for `dialect` does so, against `other`; and the one that does least.

        Raises:
            ValueError: the classifier does not know a dialect.
        """
        words = arabic_words(text)
        self._logits([words])  # scores the words
        sides = self.labels.index(dialect), self.labels.index(other)
        differences = [float(self._scores[word][sides[0]] - self._scores[word][sides[1]]) for word in words]
        return max(differences, default=0.0), min(differences, default=0.0)

    def _logits(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """[texts, labels] of lists of words."""
        new = sorted({word for words in texts for word in words} - self._scores.keys())
        if len(self._scores) + len(new) > _CACHED_WORDS:
            self._scores.clear()
            new = sorted({word for words in texts for word in words})
        if new:
            self._scores.update(zip(new, _ngrams(new) @ self.weights.T, strict=True))
        logits = np.zeros((len(texts), len(self.labels)), dtype=np.float64)
        for row, words in enumerate(texts):
            if words:
                logits[row] = sum(self._scores[word] for word in words) / _scale(len(words)) + self.bias
        return logits

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, weights as 8-bit integers with a scale a dialect."""
        from safetensors.numpy import save_file

        scale = np.abs(self.weights).max(axis=1) / 127
        tensors = {
            "weights": np.round(self.weights / scale[:, None]).astype(np.int8),
            "scale": scale.astype(np.float32),
            "bias": self.bias.astype(np.float32),
            "thresholds": self.thresholds.astype(np.float32),
        }
        save_file(tensors, path, {"dialects": json.dumps(self.labels)})


@lru_cache
def load_classifier(path: str | None = None) -> DialectClassifier:
    """The classifier in a file that `data fit-dialects` wrote; default: the one that comes with the package.

    Raises:
        ConfigurationError: the file cannot be read or holds no classifier.
    """
    from safetensors import SafetensorError, safe_open

    file = path or str(files("arabic_qwen") / "assets" / "dialects.safetensors")
    try:
        with safe_open(file, "np") as stored:
            labels = json.loads((stored.metadata() or {})["dialects"])
            weights, scale, bias, thresholds = map(stored.get_tensor, ("weights", "scale", "bias", "thresholds"))
        if weights.shape != (len(labels), _BUCKETS):
            raise ValueError(f"weights of shape {weights.shape}")
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ConfigurationError(f"{file}: {reason}; give a file that `arabic-qwen data fit-dialects` wrote") from None
    except (SafetensorError, KeyError, ValueError):
        raise ConfigurationError(
            f"{file}: holds no dialect classifier; give a file that `arabic-qwen data fit-dialects` wrote"
        ) from None
    return DialectClassifier(labels, weights.astype(np.float32) * scale[:, None], bias, thresholds)


def fit(
    texts: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
) -> DialectClassifier:
    """A classifier of these labelled texts, the same for the same input; each dialect counts the same.

    Probabilities are calibrated (one temperature), and thresholds chosen for 90 % precision, on texts held out in five
    folds. A dialect that does not reach it is never named.

    Args:
        labels: one of :data:`DIALECTS` for each text.
        groups: texts of one group (a source, a topic) are held out together; default: each by itself.

    Raises:
        DatasetError: no text with three Arabic words, only one dialect, or a label that is no dialect.
    """
    strange = sorted(set(labels) - set(DIALECTS))
    if strange:
        raise DatasetError(f"{strange[0]!r} is no dialect; label the texts {', '.join(DIALECTS)}")
    words = [arabic_words(text) for text in texts]
    used = [place for place, found in enumerate(words) if found]
    present = [dialect for dialect in DIALECTS if any(labels[place] == dialect for place in used)]
    if not used:
        raise DatasetError("there is no text of three Arabic words or more to learn from")
    if len(present) < 2:
        raise DatasetError(f"all texts are {present[0]}; a classifier needs two dialects or more")

    features = _features([words[place] for place in used])
    target = np.array([present.index(labels[place]) for place in used])
    weight = (len(used) / len(present) / np.bincount(target))[target]
    held_out = _held_out_logits(features, target, weight, None if groups is None else [groups[p] for p in used])
    temperature = _temperature(held_out, target, weight)
    thresholds = _thresholds(_softmax(held_out / temperature), target, weight)
    coefficients, bias = _regression(features, target, weight)
    return DialectClassifier(present, coefficients / temperature, bias / temperature, thresholds)


def held_out_predictions(
    texts: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
) -> list[Prediction]:
    """What classifiers that have seen neither a text nor its group say of it: five folds, arguments as :func:`fit`.

    Where the other groups are all of one dialect, there is no such classifier: unknown.

    Raises:
        DatasetError: as :func:`fit`, of any fold.
    """
    fold = _fold_of([str(place) for place in range(len(texts))] if groups is None else groups)
    predictions = [Prediction(UNKNOWN, 0.0)] * len(texts)
    for number in np.unique(fold):
        train, test = np.flatnonzero(fold != number).tolist(), np.flatnonzero(fold == number).tolist()
        if len({labels[place] for place in train}) < 2:
            continue
        classifier = fit(
            [texts[place] for place in train],
            [labels[place] for place in train],
            None if groups is None else [groups[place] for place in train],
        )
        for place, prediction in zip(test, classifier.predict([texts[place] for place in test]), strict=True):
            predictions[place] = prediction
    return predictions


class Score(NamedTuple):
    """How well texts of a dialect are recognised; "unknown" is a miss, but no false alarm."""

    dialect: str
    texts: int
    precision: float
    recall: float
    f1: float
    unknown: float  # share


def score(labels: Sequence[str], predictions: Sequence[Prediction]) -> list[Score]:
    """A score for each dialect that there is."""
    truth, named = np.array(labels), np.array([prediction.dialect for prediction in predictions])
    scores = []
    for dialect in (dialect for dialect in DIALECTS if (truth == dialect).any()):
        there, found = truth == dialect, named == dialect
        right, texts = int((there & found).sum()), int(there.sum())
        f1 = 2 * right / (texts + int(found.sum()))
        unknown = float((named[there] == UNKNOWN).mean())
        scores.append(Score(dialect, texts, right / max(1, int(found.sum())), right / texts, f1, unknown))
    return scores


def _features(texts: Sequence[Sequence[str]]):
    """Sparse [texts, buckets]: the sum of the words' n-grams over the root of their number."""
    from scipy.sparse import csr_matrix

    vocabulary = {word: place for place, word in enumerate(sorted({word for words in texts for word in words}))}
    columns = [vocabulary[word] for words in texts for word in words]
    values = [1 / _scale(len(words)) for words in texts for _ in words]
    starts = np.cumsum([0, *map(len, texts)])
    return csr_matrix((values, columns, starts), (len(texts), len(vocabulary))) @ _ngrams(list(vocabulary))


def _ngrams(words: Sequence[str]):
    """Sparse [words, buckets], rows of length one."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(analyzer=_word_ngrams, n_features=_BUCKETS, alternate_sign=False).transform(words)


def _word_ngrams(word: str) -> list[str]:
    padded = f" {word} "
    return [padded] * _WHOLE + [
        padded[start : start + size]
        for size in range(_NGRAMS[0], _NGRAMS[1] + 1)
        for start in range(len(padded) - size + 1)
    ]


def _scale(number_of_words: int) -> float:
    return float(number_of_words) ** 0.5


def _regression(features, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [labels, buckets] and [labels]: each dialect against the rest."""
    from sklearn.linear_model import LogisticRegression

    models = [
        LogisticRegression(C=3, solver="liblinear", tol=1e-3).fit(features, target == label, weight)
        for label in np.unique(target)
    ]
    bias = np.array([model.intercept_[0] for model in models], dtype=np.float32)
    return np.concatenate([model.coef_ for model in models]).astype(np.float32), bias


def _held_out_logits(features, target: np.ndarray, weight: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """[texts, labels]: of each text, by a model that has seen neither it nor its group."""
    fold = _fold_of([str(place) for place in range(len(target))] if groups is None else groups)
    logits = np.zeros((len(target), target.max() + 1))
    for number in range(_FOLDS):
        test = fold == number
        seen = np.unique(target[~test])
        if not test.any() or len(seen) < 2:
            continue
        coefficients, bias = _regression(features[~test], target[~test], weight[~test])
        logits[test] = -50  # a dialect that is only in this fold
        logits[np.ix_(test, seen)] = features[test] @ coefficients.T + bias
    return logits


def _fold_of(groups: Sequence[str]) -> np.ndarray:
    """The fold of each text: texts of a group have the same."""
    order = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    folds = np.random.default_rng(0).permutation(len(order)) % _FOLDS
    return np.array([folds[order[name]] for name in groups])


def _temperature(logits: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    """By which to divide the logits for the likeliest probabilities."""

    def loss(temperature: float) -> float:
        right = _softmax(logits / temperature)[np.arange(len(target)), target]
        return float(-(weight * np.log(right + 1e-12)).sum())

    return float(min(np.geomspace(0.1, 10, 81), key=loss))


def _thresholds(probabilities: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[labels]: the lowest probability from which PRECISION of a dialect's predictions are right; above one: never."""
    best = probabilities.argmax(axis=1)
    thresholds = np.full(probabilities.shape[1], 2.0)
    for label in range(len(thresholds)):
        named = np.flatnonzero(best == label)
        named = named[np.argsort(-probabilities[named, label], kind="stable")]
        right = np.cumsum(weight[named] * (target[named] == label)) / np.cumsum(weight[named])
        precise = np.flatnonzero(right >= PRECISION)
        if len(precise):
            thresholds[label] = max(_SURE, probabilities[named[precise[-1]], label])
    return thresholds


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return exponents / exponents.sum(axis=1, keepdims=True)
