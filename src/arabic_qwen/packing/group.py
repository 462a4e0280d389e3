"""A training example as token ids: a prompt and the completions that share it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Completion(NamedTuple):
    """Token ids [length] that continue a prompt, and which of them are targets [length, bool]."""

    ids: np.ndarray
    targets: np.ndarray


class Group(NamedTuple):
    """A prompt's token ids [length ≥ 1] and the completions that share it: the chosen one first, then the rejected.

    Attributes:
        label: whether the completion is desirable, for methods that learn from single completions.
        mismatched: a completion of another prompt, for KTO's estimate of the divergence.
        reference: the reference's log-probability of each completion (and of `mismatched`), where it is precomputed.
        lengths: of each completion, as the data gives them, in any unit; for reports only.
        tag: 0, or which part of the set it is measured with too.
        row: where it comes from (:class:`~arabic_qwen.data.locations.RowLocations`); below 0: not known.
    """

    prompt: np.ndarray
    completions: tuple[Completion, ...]
    label: bool = True
    mismatched: Completion | None = None
    reference: tuple[float, ...] | None = None
    lengths: tuple[float, ...] | None = None
    tag: int = 0
    row: int = -1

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in the stream: the prompt counts once."""
        return len(self.prompt) + sum(len(completion.ids) for completion in self.completions)

    @property
    def num_budgeted(self) -> int:
        """Tokens that count against a token budget: `mismatched` too."""
        return self.num_tokens + (len(self.mismatched.ids) if self.mismatched else 0)


def with_mismatched(group: Group, own: bool) -> Group:
    """The group's prompt with the mismatched completion, after its own one or alone."""
    assert group.mismatched is not None
    completions, reference = (*group.completions, group.mismatched), group.reference
    start = 0 if own else len(group.completions)
    return group._replace(completions=completions[start:], reference=reference and reference[start:], lengths=None)
