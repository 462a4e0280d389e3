"""Encoded examples: a set in memory, with what was done to fit them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from arabic_qwen.data.bad_rows import count
from arabic_qwen.data.locations import RowLocations
from arabic_qwen.packing.group import Completion, Group

_BY_RULE = "characters changed by "
_SHOWN_LETTERS = 400  # of each stretch of the example that is shown


@dataclasses.dataclass
class GroupDataset(Sequence):
    """Encoded examples and what was done to fit them."""

    groups: list[Group]
    rows: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    prompts_trimmed: int = 0
    rows_changed: int = 0  # by normalising
    changes: Counter[str] = dataclasses.field(default_factory=Counter)  # characters that it changed, by rule
    dialects: tuple[str, ...] = ()  # the groups' tags count through these, from 1
    places: RowLocations | None = None  # what the groups' rows mean

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index):
        return self.groups[index]

    @property
    def lengths(self) -> list[int]:
        return [group.num_tokens for group in self.groups]

    def counts(self) -> dict[str, int]:
        """Examples and tokens, and what was done to fit them."""
        return {
            "rows": self.rows,
            "examples": len(self),
            "tokens": sum(self.lengths),
            "learned": sum(int(c.targets.sum()) for group in self.groups for c in group.completions),
            "longest": max(self.lengths, default=0),
            "truncated": self.truncated,
            "tokens_cut": self.tokens_cut,
            "prompts_trimmed": self.prompts_trimmed,
            "rows_changed": self.rows_changed,
            **{f"{_BY_RULE}{rule}": characters for rule, characters in self.changes.items()},
        }

    def summary(self) -> str:
        """One line for the log and the model card."""
        return describe_counts(self.counts())


def describe_counts(counts: dict[str, int]) -> str:
    """One line on the counts of a set, or of parts of it added up."""
    text = count(counts["examples"], "example")
    if counts["rows"] != counts["examples"]:
        text += f" of {count(counts['rows'], 'row')}"
    text += (
        f", {count(counts['tokens'], 'token')}, {counts['learned']:,} of them learned, longest {counts['longest']:,}, "
    )
    if counts["truncated"]:
        text += f"{count(counts['truncated'], 'answer')} cut, {count(counts['tokens_cut'], 'token')} lost"
    else:
        text += "none cut"
    if counts["prompts_trimmed"]:
        text += f", {count(counts['prompts_trimmed'], 'prompt')} lost their beginning"
    changes = {name.removeprefix(_BY_RULE): number for name, number in counts.items() if name.startswith(_BY_RULE)}
    if changes:
        rules = ", ".join(f"{rule} {number:,}" for rule, number in Counter(changes).most_common())
        text += f"; normalised {count(sum(changes.values()), 'character')}"
        text += f" in {count(counts['rows_changed'], 'row')} ({rules})"
    return text


def show_group(tokenizer: PreTrainedTokenizerBase, group: Group) -> str:
    """The group's text as the model reads it; what is learned stands in ⟦ ⟧."""
    parts = [_shorten(str(tokenizer.decode(group.prompt)))]
    names = ["chosen", *["rejected"] * (len(group.completions) - 1)] if len(group.completions) > 1 else [""]
    for name, completion in zip(names, group.completions, strict=True):
        parts.append(f"\n{name}: " if name else "")
        parts.append(_show_completion(tokenizer, completion))
    return "".join(parts)


def _show_completion(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    borders = np.flatnonzero(np.diff(completion.targets)) + 1
    text = ""
    for ids, targets in zip(np.split(completion.ids, borders), np.split(completion.targets, borders), strict=True):
        stretch = _shorten(str(tokenizer.decode(ids)))
        text += f"⟦{stretch}⟧" if targets[0] else stretch
    return text


def _shorten(text: str) -> str:
    half = _SHOWN_LETTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"
