"""Which groups share a training sequence, and which a micro-batch."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

from arabic_qwen.packing.group import Group


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into few bins of `capacity`: longest first, each into the fullest bin that still has room.

    Returns the items' indices by bin; an item longer than `capacity` gets a bin of its own.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins
    rooms: list[int] = []  # the keys of by_room, ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        position = bisect.bisect_left(rooms, lengths[item])
        if position < len(rooms):
            room = rooms[position]
            index = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[position]
        else:
            room, index = max(capacity, lengths[item]), len(bins)
            bins.append([])
        bins[index].append(item)
        room -= lengths[item]
        if room not in by_room:
            by_room[room] = []
            bisect.insort(rooms, room)
        by_room[room].append(index)
    return bins


def micro_batches(groups: Sequence[Group], token_budget: int) -> list[list[Group]]:
    """Cut groups into few batches of at most `token_budget` tokens, auxiliary ones too; a longer group stands alone."""
    bins = budget_bins([group.num_budgeted for group in groups], token_budget)
    return [[groups[i] for i in sorted(members)] for members in bins]


def budget_bins(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of the groups of each micro-batch, by the tokens of a group that count against the budget.

    Where that keeps the budget they are about equally large, for a small last one would leave a GPU idle.
    """
    bins = best_fit_decreasing(lengths, token_budget)
    even = _longest_to_emptiest(lengths, len(bins))
    kept = all(len(members) == 1 or sum(lengths[i] for i in members) <= token_budget for members in even)
    return even if kept else bins


def _longest_to_emptiest(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of the items in `count` bins of about equal sums (Graham 1969, longest processing time first)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    sums = [(0, index) for index in range(count)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, index = sums[0]
        bins[index].append(item)
        heapq.heapreplace(sums, (total + lengths[item], index))
    return bins
