"""Completions that a method scores beside those that it learns from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np

from arabic_qwen.packing.group import Completion, Group

#: (groups of a split or window, groups of those before, most tokens of a sequence, seed) -> the groups with their auxiliary
#: completions; without any where that cannot be.
Auxiliary = Callable[[Sequence[Group], Sequence[Group], int, int], list[Group]]


def mismatched(groups: Sequence[Group], earlier: Sequence[Group], max_tokens: int, seed: int) -> list[Group]:
    """Give each prompt a completion of another prompt, as KTO's estimate of the divergence needs.

    It is one of the same groups, or of earlier ones where these have a single prompt; none if those have it too.
    """
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    found = list(groups)
    for position, index in enumerate(order):
        group = groups[index]
        others = (groups[order[(position + step) % len(order)]] for step in range(1, len(order)))
        candidates = itertools.chain(others, earlier)
        stranger = next((other for other in candidates if not np.array_equal(other.prompt, group.prompt)), None)
        if stranger:
            ids, targets, desirable = stranger.completions[0]
            room = max_tokens - len(group.prompt)
            found[index] = group._replace(auxiliary=(Completion(ids[:room], targets[:room], desirable),))
    return found


def two_prompts(groups: Sequence[Group]) -> list[Group]:
    """Up to two of the groups, of different prompts: what the next window of a stream may need."""
    return [groups[0], *(group for group in groups if not np.array_equal(group.prompt, groups[0].prompt))][:2]
