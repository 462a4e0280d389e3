"""A training example as token ids: a prompt and the completions that share it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Completion(NamedTuple):
    """Tokens that continue a prompt.

    Attributes:
        ids: [length] token ids.
        targets: [length] bool, which of them are learned.
        desirable: chosen or good, as opposed to rejected or bad.
    """

    ids: np.ndarray
    targets: np.ndarray
    desirable: bool = True


class Group(NamedTuple):
    """A prompt's token ids [length ≥ 1] and the completions that share it.

    Attributes:
        auxiliary: further completions of the prompt, which are scored without a gradient for what a method needs to know of
            the whole step: those of other prompts, for KTO's estimate of the divergence.
        reference: of each completion, then of each auxiliary one, the reference's log-probabilities of its targets, where
            they are precomputed.
        lengths: of each completion, as the data gives them, in any unit; for reports only.
        tag: 0, or which part of the set it is measured with too.
        row: where it comes from (:class:`~arabic_qwen.data.locations.RowLocations`); below 0: not known.
    """

    prompt: np.ndarray
    completions: tuple[Completion, ...]
    auxiliary: tuple[Completion, ...] = ()
    reference: tuple[np.ndarray, ...] | None = None
    lengths: tuple[float, ...] | None = None
    tag: int = 0
    row: int = -1

    @property
    def desirable(self) -> bool:
        """Of its first completion; a group without completions is desirable."""
        return not self.completions or self.completions[0].desirable

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in the stream: the prompt counts once."""
        return len(self.prompt) + sum(len(completion.ids) for completion in self.completions)

    @property
    def num_budgeted(self) -> int:
        """Tokens that count against a token budget: those of auxiliary completions too."""
        return self.num_tokens + sum(len(completion.ids) for completion in self.auxiliary)

    def scored(self) -> tuple[Completion, ...]:
        """All that the reference scores, in the order of `reference`."""
        return (*self.completions, *self.auxiliary)


def auxiliary_group(group: Group, own: bool) -> Group:
    """The prompt with its auxiliary completions, after its own ones or alone, as a group to be packed."""
    start = 0 if own else len(group.completions)
    reference = group.reference and group.reference[start:]
    return group._replace(completions=group.scored()[start:], auxiliary=(), reference=reference, lengths=None)
