"""Rows that are there twice, or nearly: in one file, or in two."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasketch import MinHash

from arabic_qwen.data.layouts import COLUMNS
from arabic_qwen.text.normalization import fold
from arabic_qwen.text.spans import hide_spans, restore_spans

#: Rows whose word trigrams have at least this Jaccard similarity, as their MinHash signatures estimate it.
SIMILAR = 0.8
_PERMUTATIONS = 64
_BANDS = 16  # of 4 values: two rows with similarity 0.8 share one with probability 1 - (1 - 0.8⁴)¹⁶ = 0.9998
# Trigrams that so many of these rows' prompts share are a template ("ترجم إلى العربية: …"), which says nothing about a
# row. Answers have none: what many answers share makes them copies.
_ROWS, _TEMPLATE_SHARE, _TEMPLATE_ROWS = 1000, 0.05, 20
_FEWEST_TRIGRAMS = 20  # fewer have too little text for one other word not to be another question
_ANSWER_BITS = 256
_SIMILAR_ANSWERS = 0.6  # Jaccard similarity of the answers' words: one long text may be asked about twice


_CACHED_WORDS = 100_000
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xFF51AFD7ED558CCD], np.uint64)  # odd, so that no bit is lost


def exact_key(values: dict[str, Any]) -> int:
    """Equal for rows of which training reads the same, to the letter; 64 bits. `values`: as `canonical` gives them."""
    return _hash(json.dumps({name: values[name] for name in sorted(COLUMNS & values.keys())}, default=str))


class Text(NamedTuple):
    """What is compared of a row, folded outside code: `Text.of` makes it."""

    prompt: str
    answers: str
    kind: str  # rows of different kinds are no copies of each other

    @classmethod
    def of(cls, prompt: str, answers: str, kind: str = "") -> Text:
        return cls(_fold(prompt), _fold(answers), kind)

    def key(self) -> int:
        """Equal for equal rows; 64 bits."""
        return _hash("\0".join(self))


def _fold(text: str) -> str:
    prose, spans = hide_spans(text)
    return restore_spans(fold(prose), spans)


class Copy(NamedTuple):
    """A row that is a copy of an earlier one; both by their number in the order in which they were added."""

    row: int
    original: int
    similarity: float  # 1.0: equal after folding; 0.0: only the prompts are equal
    exact: bool = False  # equal as they are


class Duplicates:
    """Finds copies among rows that are added in batches, with about 600 bytes a row.

    Texts are compared after profile `compare`: spelling variants, diacritics and digits make no difference.
    """

    def __init__(self) -> None:
        self._files = array("H")
        self._exact = array("Q")  # hash of the whole row as it is
        self._keys = array("Q")  # hash of the whole row after folding
        self._prompts = array("Q")
        self._kinds = array("Q")
        self._signatures: list[
            np.ndarray
        ] = []  # uint32 [rows, _PERMUTATIONS] a batch, zeros where there is too little text
        self._answers: list[np.ndarray] = []  # bool, packed: [rows, _ANSWER_BITS / 8] a batch, the words by hash
        self._words: dict[str, int] = {}
        self._templates = np.zeros(0, np.uint64)
        self._waiting: list[Text] = []  # for their signatures: always so many together, however rows are added
        self._minhash = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)

    def add(self, file: int, rows: Sequence[Text], exact: Sequence[int]) -> None:
        """Rows of a file, and their `exact_key`."""
        self._files.extend([file] * len(rows))
        self._exact.extend(exact)
        self._keys.extend(map(Text.key, rows))
        self._prompts.extend(_hash(row.prompt) for row in rows)
        self._kinds.extend(_hash(row.kind) for row in rows)
        self._waiting += rows
        while len(self._waiting) >= _ROWS:
            self._sign(self._waiting[:_ROWS])
            del self._waiting[:_ROWS]

    def _sign(self, rows: Sequence[Text]) -> None:
        answers = np.zeros((len(rows), _ANSWER_BITS), bool)
        asked, answered = [], []  # trigrams
        for number, row in enumerate(rows):
            said = self._ids(row.answers)
            answers[number, said % np.uint64(_ANSWER_BITS)] = True
            asked.append(_trigrams(self._ids(row.prompt)))
            answered.append(_trigrams(said))
        self._learn_templates(asked)
        signatures = np.zeros((len(rows), _PERMUTATIONS), np.uint32)
        for number, (prompt, answer) in enumerate(zip(asked, answered, strict=True)):
            own = np.union1d(np.setdiff1d(prompt, self._templates, assume_unique=True), answer)
            if len(own) >= _FEWEST_TRIGRAMS:
                self._minhash.clear()
                self._minhash.update_batch(own.tolist())
                signatures[number] = self._minhash.hashvalues
        self._signatures.append(signatures)
        self._answers.append(np.packbits(answers, axis=1))

    def _ids(self, text: str) -> np.ndarray:
        """64-bit hashes of the words."""
        known = self._words
        words = text.split()
        for word in words:
            if word not in known:
                known[word] = _hash(word)
        ids = np.array([known[word] for word in words], np.uint64)
        if len(known) > _CACHED_WORDS:
            known.clear()
        return ids

    def _learn_templates(self, rows: list[np.ndarray]) -> None:
        distinct = {grams.tobytes(): grams for grams in rows}  # equal prompts are no template
        grams, counts = np.unique(np.concatenate([*distinct.values(), self._templates[:0]]), return_counts=True)
        common = grams[counts >= max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * len(rows))]
        self._templates = np.union1d(self._templates, common)

    def inside(self) -> list[Copy]:
        """Copies of rows of the same file, equal ones first; each row once, with the earliest row that it is like."""
        return self._find(False)

    def across(self) -> list[Copy]:
        """Copies of rows of an earlier file, each row once; rows with an equal prompt too."""
        return self._find(True)

    def _find(self, across: bool) -> list[Copy]:
        self._sign(self._waiting)
        self._waiting = []
        files = np.array(self._files)
        found: dict[int, Copy] = {}

        def keep(keys: array[int], similarity: float, exact: bool = False) -> None:
            for row, original in _equal(np.array(keys), files, across):
                found.setdefault(row, Copy(row, original, similarity, exact))

        keep(self._exact, 1.0, exact=True)
        keep(self._keys, 1.0)
        if across:
            keep(self._prompts, 0.0)
        for pair in self._similar(files, across):
            found.setdefault(pair.row, pair)
        return list(found.values())

    def _similar(self, files: np.ndarray, across: bool) -> Iterator[Copy]:
        if not self._signatures:
            return
        signatures, answers = np.concatenate(self._signatures), np.concatenate(self._answers)
        rows = np.flatnonzero(signatures.any(axis=1))
        for band in np.split(signatures[rows], _BANDS, axis=1):
            values = np.ascontiguousarray(band).view(np.uint64)  # 4 values of 32 bits are 2 of 64
            keys = values[:, 0] * _MIX[0] ^ values[:, 1]
            for i, j in _equal(keys, files[rows], across):
                row, original = int(rows[i]), int(rows[j])
                similarity = float((signatures[row] == signatures[original]).mean())
                if (
                    similarity >= SIMILAR
                    and self._kinds[row] == self._kinds[original]
                    and _jaccard(answers[row], answers[original]) >= _SIMILAR_ANSWERS
                ):
                    yield Copy(row, original, min(similarity, 0.99))  # an estimate of 1 does not make them equal


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two packed sets of bits."""
    return float(np.unpackbits(a & b).sum() / max(1, np.unpackbits(a | b).sum()))


def _trigrams(ids: np.ndarray) -> np.ndarray:
    """Distinct 32-bit hashes of three words in a row, in order."""
    mixed = (ids[:-2] * _MIX[0]) ^ (ids[1:-1] * _MIX[1]) ^ ids[2:]
    return np.unique((mixed * _MIX[2]) >> np.uint64(32))


def _equal(keys: np.ndarray, files: np.ndarray, across: bool) -> Iterator[tuple[int, int]]:
    """(row, first row with its key): of its own file, or of an earlier one."""
    _, groups, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    firsts: dict[tuple[int, int], int] = {}
    for row in np.flatnonzero(sizes[groups] > 1).tolist():
        first = firsts.setdefault((groups[row], -1 if across else files[row]), row)
        if (files[first] != files[row]) if across else (first != row):
            yield row, first


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
