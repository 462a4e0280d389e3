"""The packed batch: groups of one prompt and its completions, laid end to end without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from arabic_qwen.packing.group import Group


@dataclasses.dataclass
class PackedBatch:
    """One token stream of N tokens with S attention segments, T targets, C completions and G groups.

    A group of one completion is one segment. A group of several has a segment for the prompt and one for each
    completion, whose keys and values are the prompt's followed by its own (`kv_index`). Two groups, of a prompt `p q r` with
    completions `a b` and `x y z`, and of a prompt `s` with the completion `t u`:

        stream          p q r  a b  x y z  s t u     query_lengths 3 2 3 3
        position_ids    0 1 2  3 4  3 4 5  0 1 2     a completion continues its prompt's positions
        p q r   sees    p q r                        key_lengths 3 5 6 3
        a b     sees    p q r  a b                   each up to itself: causal, aligned at the end
        x y z   sees    p q r       x y z            the prompt's keys are gathered again, not computed again
        s t u   sees                       s t u
        targets                a b  x y z    t u     what is predicted …
        target_index           r a  r x y    s t     … and the token whose hidden state predicts it
        target_completion      0 0  1 1 1    2 2
    """

    input_ids: torch.Tensor  # [N] int64
    position_ids: torch.Tensor  # [N] int64; each completion continues its prompt's positions
    query_lengths: list[int]  # S lengths that add up to N
    key_lengths: list[int]  # S lengths that add up to M
    cu_seqlens_q: torch.Tensor  # [S + 1] int32, cumulative query_lengths
    cu_seqlens_k: torch.Tensor  # [S + 1] int32, cumulative key_lengths
    max_query: int  # at least the longest of query_lengths
    max_key: int  # at least the longest of key_lengths
    kv_index: torch.Tensor | None  # [M] int64: stream position of each key; None where keys are the stream itself
    target_index: torch.Tensor  # [T] int64: stream position whose hidden state predicts the target
    target_ids: torch.Tensor  # [T] int64
    target_completion: torch.Tensor  # [T] int64 in [0, C): the completion that the target belongs to
    completion_group: torch.Tensor  # [C] int64 in [0, G): the group that the completion belongs to
    chosen: torch.Tensor  # int64 in [0, C): the desirable completions
    rejected: torch.Tensor  # int64 in [0, C): the others
    num_targets: torch.Tensor  # [C] int64
    lengths: torch.Tensor  # [C] float32: as the data gives them, else num_targets
    tags: torch.Tensor  # [G] int64
    reference: torch.Tensor | None  # [T] float32: the reference's log-probabilities, where all are known

    @property
    def num_completions(self) -> int:
        return len(self.num_targets)

    def _map_tensors(self, function) -> PackedBatch:
        tensors = {k: function(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device | str) -> PackedBatch:
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self._map_tensors(lambda tensor: tensor.pin_memory())


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay groups end to end."""
    assert groups and all(len(group.prompt) for group in groups)
    ids, positions, kv_index, target_index, target_ids, target_completion = [], [], [], [], [], []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    start = completion_number = 0
    for prompt, completions, *_ in groups:
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        prompt_span = np.arange(start, start + len(prompt))
        shared = len(completions) != 1
        if shared:
            query_lengths.append(len(prompt))
            key_lengths.append(len(prompt))
            kv_index.append(prompt_span)
        start += len(prompt)
        for completion in completions:
            length = len(completion.ids)
            ids.append(completion.ids)
            positions.append(np.arange(len(prompt), len(prompt) + length))
            span = np.arange(start, start + length)
            if length or not shared:
                query_lengths.append(length if shared else len(prompt) + length)
                key_lengths.append(len(prompt) + length)
                kv_index += [prompt_span, span]
            predicted_from = np.append(prompt_span[-1], span[:-1])[:length]
            target_index.append(predicted_from[completion.targets])
            target_ids.append(completion.ids[completion.targets])
            target_completion.append(np.full(int(completion.targets.sum()), completion_number))
            start += length
            completion_number += 1

    def long(parts: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts or [np.empty(0)]).astype(np.int64))

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))

    counts = [len(group.completions) for group in groups]
    desirable = np.array([completion.desirable for group in groups for completion in group.completions], dtype=bool)
    num_targets = [int(c.targets.sum()) for group in groups for c in group.completions]
    given = [length for group in groups for length in group.lengths or [np.nan] * len(group.completions)]
    return PackedBatch(
        input_ids=long(ids),
        position_ids=long(positions),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        cu_seqlens_q=cumulative(query_lengths),
        cu_seqlens_k=cumulative(key_lengths),
        max_query=_rounded_up(max(query_lengths)),
        max_key=_rounded_up(max(key_lengths)),
        kv_index=long(kv_index) if query_lengths != key_lengths else None,
        target_index=long(target_index),
        target_ids=long(target_ids),
        target_completion=long(target_completion),
        completion_group=torch.from_numpy(np.repeat(np.arange(len(groups)), counts)),
        chosen=torch.from_numpy(np.flatnonzero(desirable)),
        rejected=torch.from_numpy(np.flatnonzero(~desirable)),
        num_targets=torch.tensor(num_targets),
        lengths=torch.from_numpy(np.where(np.isnan(given), num_targets, given).astype(np.float32)),
        tags=torch.tensor([group.tag for group in groups]),
        reference=_reference(groups),
    )


def _rounded_up(length: int) -> int:
    """To a multiple of 256: compiled layers see few different numbers, and flash attention needs no exact one."""
    return -(-length // 256) * 256


def _reference(groups: Sequence[Group]) -> torch.Tensor | None:
    known = [group.reference[: len(group.completions)] for group in groups if group.reference is not None]
    if len(known) < len(groups):
        return None
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(logps for values in known for logps in values)]))
