"""Rows that are there twice, or nearly: in one file, or in two."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasketch import MinHash

from arabic_qwen.text.normalization import normalize

#: Rows whose word trigrams have at least this Jaccard similarity, as their MinHash signatures estimate it.
SIMILAR = 0.8
_PERMUTATIONS = 64
_BANDS = 16  # of 4 values: two rows with similarity 0.8 share one with probability 1 - (1 - 0.8⁴)¹⁶ = 0.9998
# Trigrams that so many rows of a batch share are a template ("ترجم إلى العربية: …"), which says nothing about a row.
_TEMPLATE_SHARE, _TEMPLATE_ROWS = 0.05, 20
_FEWEST_TRIGRAMS = 8
_EXAMPLE = 60  # characters


class Copy(NamedTuple):
    """A row that is a copy of an earlier one; both by their number in the order in which they were added."""

    row: int
    original: int
    similarity: float  # 1.0: equal after folding; 0.0: only the prompts are equal


class Duplicates:
    """Finds copies among rows that are added in batches, with about 600 bytes a row.

    Texts are compared after profile `compare`: spelling variants, diacritics and digits make no difference.
    """

    def __init__(self) -> None:
        self.files = array("H")
        self._keys = array("Q")  # hash of the whole row
        self._prompts = array("Q")  # hash of the prompt
        self._signatures: list[np.ndarray] = []  # [rows, _PERMUTATIONS] a batch
        self._has_signature: list[np.ndarray] = []
        self._words: dict[str, int] = {}
        self._templates: set[int] = set()
        self._minhash = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)

    def add(self, file: int, prompts: Sequence[str], wholes: Sequence[str]) -> None:
        """Rows of a file: the prompt of each, and all of its text."""
        folded = [normalize(text, "compare") for text in wholes]
        self.files.extend([file] * len(wholes))
        self._keys.extend(map(_hash, folded))
        self._prompts.extend(_hash(normalize(text, "compare")) for text in prompts)
        trigrams = [self._trigrams(text) for text in folded]
        self._learn_templates(trigrams)
        signatures = np.zeros((len(wholes), _PERMUTATIONS), np.uint32)
        has = np.zeros(len(wholes), bool)
        for number, grams in enumerate(trigrams):
            own = [gram for gram in grams if gram not in self._templates] if self._templates else list(grams)
            if len(own) >= _FEWEST_TRIGRAMS:
                self._minhash.clear()
                self._minhash.update_batch(own)
                signatures[number], has[number] = self._minhash.hashvalues, True
        self._signatures.append(signatures)
        self._has_signature.append(has)

    def _trigrams(self, text: str) -> set[int]:
        """32-bit hashes of the text's word trigrams."""
        known = self._words
        words = text.split()
        for word in words:
            if word not in known:
                if len(known) > 1_000_000:
                    known.clear()
                known[word] = _hash(word)
        ids = np.array([known[word] for word in words], np.uint64)
        if len(ids) < 3:
            return set()
        mixed = (ids[:-2] * np.uint64(0x9E3779B97F4A7C15)) ^ (ids[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F)) ^ ids[2:]
        return set(((mixed * np.uint64(0xFF51AFD7ED558CCD)) >> np.uint64(32)).tolist())

    def _learn_templates(self, rows: list[set[int]]) -> None:
        counts: Counter[int] = Counter()
        for grams in set(map(frozenset, rows)):  # exact copies are no template
            counts.update(grams)
        enough = max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * len(rows))
        self._templates.update(gram for gram, count in counts.items() if count >= enough)

    def inside(self) -> list[Copy]:
        """Copies of rows of the same file, equal ones first; each row once, with the earliest row that it is like."""
        return self._find(False)

    def across(self) -> list[Copy]:
        """Copies of rows of an earlier file, each row once; rows with an equal prompt too."""
        return self._find(True)

    def _find(self, across: bool) -> list[Copy]:
        files = np.array(self.files)
        found: dict[int, Copy] = {}

        def keep(pairs: Iterator[tuple[int, int]], similarity: float) -> None:
            for row, original in pairs:
                found.setdefault(row, Copy(row, original, similarity))

        keep(_equal(np.array(self._keys), files, across), 1.0)
        if across:
            keep(_equal(np.array(self._prompts), files, across), 0.0)
        for pair in self._similar(files, across):
            found.setdefault(pair.row, pair)
        return list(found.values())

    def _similar(self, files: np.ndarray, across: bool) -> Iterator[Copy]:
        if not self._signatures:
            return
        signatures = np.concatenate(self._signatures)
        rows = np.flatnonzero(np.concatenate(self._has_signature))
        for band in np.split(signatures[rows], _BANDS, axis=1):
            values = np.ascontiguousarray(band).view(np.uint64)  # 4 values of 32 bits are 2 of 64
            keys = values[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ values[:, 1]
            for row, original in _equal(keys, files[rows], across):
                row, original = int(rows[row]), int(rows[original])
                similarity = float((signatures[row] == signatures[original]).mean())
                if similarity >= SIMILAR:
                    yield Copy(row, original, similarity)


def _equal(keys: np.ndarray, files: np.ndarray, across: bool) -> Iterator[tuple[int, int]]:
    """(row, first row with its key): of its own file, or of an earlier one."""
    order = np.lexsort((np.arange(len(keys)), keys))
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] ^ np.uint64(1))) if len(keys) else []
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        if end - start == 1:
            continue
        firsts: dict[int, int] = {}
        for row in map(int, order[start:end]):
            first = firsts.setdefault(int(files[row]), row)
            earliest = min(firsts.values())
            if across and files[earliest] != files[row]:
                yield row, earliest
            elif not across and first != row:
                yield row, first


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
