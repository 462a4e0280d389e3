"""Data loaders: from a file to the groups that the packed engine trains on, split and counted."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.conversations import Message, to_conversation
from arabic_qwen.data.packing import Completion, Group
from arabic_qwen.data.preferences import to_contrast, to_feedback, to_measured_pair, to_pair
from arabic_qwen.data.readers import Row, raise_problems, read_rows
from arabic_qwen.data.templates import Piece, encode_pieces, render_answer, render_pieces, render_prompt
from arabic_qwen.errors import ConfigurationError, DatasetError

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time
_REMEDY = "correct or remove these rows"


@dataclasses.dataclass
class GroupDataset(Sequence):
    """Encoded examples and what was done to fit them."""

    groups: list[Group]
    truncated: int = 0  # answers cut at the longest length
    tokens_cut: int = 0
    prompts_trimmed: int = 0  # prompts that lost their beginning at max_prompt_length

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index):
        return self.groups[index]

    @property
    def lengths(self) -> list[int]:
        return [group.num_tokens for group in self.groups]

    def summary(self) -> str:
        """One line for the log and the model card."""
        cut = f"{self.truncated} answers cut, {self.tokens_cut:,} tokens lost" if self.truncated else "none cut"
        if self.prompts_trimmed:
            cut += f", {self.prompts_trimmed} prompts lost their beginning"
        return f"{len(self):,} examples, {sum(self.lengths):,} tokens, longest {max(self.lengths):,}, {cut}"


class Draft(NamedTuple):
    """A group before it is tokenised: the pieces of each completion, which begin with the same prompt."""

    completions: list[list[Piece]]
    label: bool = True
    lengths: tuple[float, ...] | None = None


class DataLoader:
    """Reads, checks, splits and encodes; a subclass says how a row becomes drafts.

    Args:
        config: paths, split, template and length settings.
        tokenizer: with the chat template to train on.
    """

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase):
        self.config = config
        self.tokenizer = tokenizer
        self._length_key = "max_length" if getattr(config, "max_length", None) else "max_seq_length"
        self.max_tokens: int = getattr(config, self._length_key)

    def _drafts(self, values: dict[str, Any], dataset: GroupDataset) -> list[Draft]:
        """The row's groups. Raises ValueError where the row cannot be used."""
        raise NotImplementedError

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        """The row's conversation before its last answer. Raises ValueError where the row cannot be used."""
        raise NotImplementedError

    def _split_key(self, row: Row) -> str:
        """Rows with the same key are held out together."""
        return row.where

    def _finish(self, dataset: GroupDataset) -> None:
        """What needs the whole split."""

    def load(self) -> dict[str, GroupDataset]:
        """Read, check, encode and split: {"train": …, "validation": …}, without the latter where it has no rows.

        Raises:
            DatasetError: a file cannot be read, or has rows that cannot be trained on (each is named).
        """
        problems: list[str] = []
        encoded = {name: self._encode(rows, problems) for name, rows in self.split().items()}
        raise_problems(problems, _REMEDY)
        for name, dataset in encoded.items():
            logger.info("%s: %s", name, dataset.summary())
            if dataset.truncated:
                logger.warning("%s: raise %s to keep whole answers", name, self._length_key)
        return encoded

    def split(self) -> dict[str, list[Row]]:
        """The rows of each split as they stand in the files."""
        rows = read_rows(self.config.dataset_path)
        if self.config.eval_dataset_path:
            return {"train": rows, "validation": read_rows(self.config.eval_dataset_path)}
        train, validation = split_rows(
            rows, self.config.validation_split, data_seed(self.config), [self._split_key(row) for row in rows]
        )
        return {"train": train} | ({"validation": validation} if validation else {})

    def encode(self, rows: Iterable[Row | Mapping[str, Any]] | str | os.PathLike) -> GroupDataset:
        """Encode rows, plain dicts (a `datasets.Dataset` too), or a file.

        Raises:
            DatasetError: some rows cannot be trained on (each is named).
        """
        given: Iterable = read_rows(rows) if isinstance(rows, (str, os.PathLike)) else rows
        numbered = [r if isinstance(r, Row) else Row(f"row {i}", dict(r)) for i, r in enumerate(given)]
        problems: list[str] = []
        dataset = self._encode(numbered, problems)
        raise_problems(problems, _REMEDY)
        return dataset

    def _encode(self, rows: list[Row], problems: list[str]) -> GroupDataset:
        """Encode what can be encoded; say in `problems` why the rest cannot."""
        dataset = GroupDataset([])
        show_bar = len(rows) > _CHUNK and sys.stderr.isatty()
        for start in track(range(0, len(rows), _CHUNK), "Tokenising", disable=not show_bar, transient=True):
            places: list[str] = []
            drafts: list[Draft] = []
            for where, values in rows[start : start + _CHUNK]:
                try:
                    new = self._drafts(values, dataset)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
                    continue
                drafts += new
                places += [where] * len(new)
            encoded = iter(encode_pieces(self.tokenizer, [c for draft in drafts for c in draft.completions]))
            for where, draft in zip(places, drafts, strict=True):
                parts = [next(encoded) for _ in draft.completions]
                completions = tuple(part.completions[0] for part in parts)
                group = Group(parts[0].prompt, completions, draft.label, lengths=draft.lengths)
                problem = self._fit(group, dataset)
                if problem:
                    problems.append(f"{where}: {problem}")
        if not problems:
            self._finish(dataset)
        return dataset

    def _fit(self, group: Group, dataset: GroupDataset) -> str | None:
        """Add the group to the dataset, completions cut to the longest length; or say why it cannot be used."""
        room = self.max_tokens - len(group.prompt)
        kept, lost = [], []
        for ids, targets in group.completions:
            if room <= 0 or not targets[:room].any():
                return (
                    f"the prompt has {len(group.prompt)} tokens and leaves no room for an answer in "
                    f"{self._length_key}={self.max_tokens}"
                )
            if len(ids) > room:
                lost.append(len(ids) - room)
            kept.append(Completion(ids[:room], targets[:room]))
        if any(np.array_equal(kept[0].ids, other.ids) for other in kept[1:]):
            return f"chosen and rejected are the same once they are cut at {self._length_key}={self.max_tokens}"
        dataset.truncated += len(lost)
        dataset.tokens_cut += sum(lost)
        dataset.groups.append(group._replace(completions=tuple(kept)))
        return None


class SFTDataLoader(DataLoader):
    """Conversations; every turn of the assistant is learned."""

    def _drafts(self, values: dict[str, Any], dataset: GroupDataset) -> list[Draft]:
        messages = to_conversation(values, self.config.system_prompt)
        return [Draft([pieces]) for pieces in render_pieces(self.tokenizer, messages)]

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        return to_conversation(values)[:-1]


class _PreferenceDataLoader(DataLoader):
    """A prompt and answers to it."""

    read = staticmethod(to_pair)

    def _drafts(self, values: dict[str, Any], dataset: GroupDataset) -> list[Draft]:
        prompt, answers, label, lengths = self.read(values, self.config.system_prompt)
        prompt = self._trim(prompt, dataset)
        return [Draft([render_answer(self.tokenizer, prompt, answer) for answer in answers], label, lengths)]

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        return self.read(values).prompt

    def _split_key(self, row: Row) -> str:
        """The prompt: a pair whose prompt is trained on in another pair is not unseen."""
        try:
            return json.dumps(self.prompt(row.values))
        except ValueError:
            return row.where

    def _trim(self, prompt: list[Message], dataset: GroupDataset) -> list[Message]:
        """The prompt within max_prompt_length tokens: its oldest text is cut from the left, turns that get empty go.

        The template's own tokens and the system prompt stay.
        """
        limit = self.config.max_prompt_length
        length = excess = self._prompt_length(prompt) - limit
        while excess > 0:
            system = prompt[:1] if prompt[0]["role"] == "system" else []
            turns = prompt[len(system) :]
            ids = self.tokenizer(turns[0]["content"], add_special_tokens=False).input_ids
            rest = str(self.tokenizer.decode(ids[excess:])).lstrip("\ufffd")  # a cut may fall within a letter
            if rest.strip():
                turns = [{**turns[0], "content": rest}, *turns[1:]]
            elif len(turns) > 1:
                turns = turns[2:]
            else:
                raise ValueError(f"prompt: its template alone fills max_prompt_length={limit}")
            prompt = [*system, *turns]
            excess = self._prompt_length(prompt) - limit
        if length > 0:
            dataset.prompts_trimmed += 1
        return prompt

    def _prompt_length(self, prompt: list[Message]) -> int:
        return len(self.tokenizer(render_prompt(self.tokenizer, prompt), add_special_tokens=False).input_ids)


class DPODataLoader(_PreferenceDataLoader):
    """Pairs: `prompt`, `chosen`, `rejected`."""


class IPODataLoader(_PreferenceDataLoader):
    """Pairs with optional `chosen_length` and `rejected_length`, which `length_bias` then compares.

    The loss counts tokens itself.
    """

    read = staticmethod(to_measured_pair)


class CPODataLoader(_PreferenceDataLoader):
    """`prompt`, `chosen`, and any number of `rejected` and `hard_negatives`."""

    read = staticmethod(to_contrast)


class KTODataLoader(_PreferenceDataLoader):
    """Single answers with a label: `prompt`, `completion`, `label`."""

    read = staticmethod(to_feedback)

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        read = to_pair if self._is_pair(values) else to_feedback
        return read(values).prompt

    def _is_pair(self, values: dict[str, Any]) -> bool:
        return self.config.unpair_preferences and "chosen" in values

    def _drafts(self, values: dict[str, Any], dataset: GroupDataset) -> list[Draft]:
        if self._is_pair(values):
            prompt, answers, *_ = to_pair(values, self.config.system_prompt)
            prompt = self._trim(prompt, dataset)
            labelled = zip(answers, (True, False), strict=True)
            return [Draft([render_answer(self.tokenizer, prompt, answer)], label) for answer, label in labelled]
        return super()._drafts(values, dataset)

    def _finish(self, dataset: GroupDataset) -> None:
        """Give each prompt a completion of another prompt, for the estimate of the divergence."""
        groups = dataset.groups
        order = list(range(len(groups)))
        random.Random(data_seed(self.config)).shuffle(order)
        for position, index in enumerate(order):
            group = groups[index]
            others = (groups[order[(position + step) % len(order)]] for step in range(1, len(order)))
            stranger = next((other for other in others if not np.array_equal(other.prompt, group.prompt)), None)
            if stranger is None:
                raise DatasetError(
                    f"{self.config.dataset_path}: KTO compares answers with those to other prompts, so training and "
                    "validation rows need at least two different prompts each; add rows or change validation_split"
                )
            ids, targets = stranger.completions[0]
            room = self.max_tokens - len(group.prompt)
            groups[index] = group._replace(mismatched=Completion(ids[:room], targets[:room]))


def data_seed(config: BaseConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def split_rows(rows: list[Row], share: float, seed: int, keys: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """(train, validation) in file order: a seeded choice of `share` of the keys, at least one where share > 0.

    Raises:
        ConfigurationError: nothing would be left to train on.
    """
    distinct = list(dict.fromkeys(keys))
    held_out = max(1, round(len(distinct) * share)) if share else 0
    if held_out >= len(distinct):
        raise ConfigurationError(
            f"validation_split: {share} of {len(distinct)} different rows leaves none to train on; "
            "add rows or set validation_split to 0"
        )
    chosen = {distinct[i] for i in random.Random(seed).sample(range(len(distinct)), held_out)}
    paired = list(zip(rows, keys, strict=True))
    return [row for row, key in paired if key not in chosen], [row for row, key in paired if key in chosen]


def to_padded(dataset: GroupDataset, pad_token_id: int, length_column: str) -> datasets.Dataset:
    """`input_ids`, `attention_mask` and `labels` padded to one length, for a plain `transformers.Trainer`."""
    longest = max(dataset.lengths)
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], length_column: []}
    for prompt, ((ids, targets),), *_ in dataset.groups:
        length = len(prompt) + len(ids)
        padding = longest - length
        labels = [int(i) if target else -100 for i, target in zip(ids, targets, strict=True)]
        columns["input_ids"].append([*prompt.tolist(), *ids.tolist(), *[pad_token_id] * padding])
        columns["attention_mask"].append([1] * length + [0] * padding)
        columns["labels"].append([-100] * len(prompt) + labels + [-100] * padding)
        columns[length_column].append(length)
    return datasets.Dataset.from_dict(columns)
