"""Data loaders: from a file to the groups that the packed engine trains on, split and counted."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.conversations import to_conversation
from arabic_qwen.data.packing import Completion, Group
from arabic_qwen.data.readers import Row, raise_problems, read_rows
from arabic_qwen.data.templates import encode_pieces, render_pieces
from arabic_qwen.errors import ConfigurationError

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time
_REMEDY = "correct or remove these rows"


@dataclasses.dataclass
class GroupDataset(Sequence):
    """Encoded examples and what was done to fit them."""

    groups: list[Group]
    truncated: int = 0  # examples cut at max_seq_length
    tokens_cut: int = 0

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index):
        return self.groups[index]

    @property
    def lengths(self) -> list[int]:
        return [group.num_tokens for group in self.groups]

    def summary(self) -> str:
        """One line for the log and the model card."""
        cut = f"{self.truncated} cut, {self.tokens_cut:,} tokens lost" if self.truncated else "none cut"
        return f"{len(self):,} examples, {sum(self.lengths):,} tokens, longest {max(self.lengths):,}, {cut}"


class SFTDataLoader:
    """Conversations for supervised fine-tuning.

    Args:
        config: paths, split, template and length settings.
        tokenizer: with the chat template to train on.
    """

    def __init__(self, config: BaseConfig, tokenizer: PreTrainedTokenizerBase):
        self.config = config
        self.tokenizer = tokenizer

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
                logger.warning("%s: raise max_seq_length to keep whole examples", name)
        return encoded

    def split(self) -> dict[str, list[Row]]:
        """The rows of each split as they stand in the files."""
        rows = read_rows(self.config.dataset_path)
        if self.config.eval_dataset_path:
            return {"train": rows, "validation": read_rows(self.config.eval_dataset_path)}
        train, validation = split_rows(rows, self.config.validation_split, data_seed(self.config))
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
            places, conversations = [], []
            for where, values in rows[start : start + _CHUNK]:
                try:
                    messages = to_conversation(values, getattr(self.config, "system_prompt", None))
                    pieces = render_pieces(self.tokenizer, messages)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
                    continue
                conversations += pieces
                places += [where] * len(pieces)
            for where, group in zip(places, encode_pieces(self.tokenizer, conversations), strict=True):
                problem = self._fit(group, dataset)
                if problem:
                    problems.append(f"{where}: {problem}")
        return dataset

    def _fit(self, group: Group, dataset: GroupDataset) -> str | None:
        """Add the group to the dataset, its completion cut at max_seq_length; or say why it cannot be used."""
        ((ids, targets),) = group.completions
        excess = group.num_tokens - self.config.max_seq_length
        if excess > 0:
            room = self.config.max_seq_length - len(group.prompt)
            if room <= 0 or not targets[:room].any():
                return (
                    f"the prompt has {len(group.prompt)} tokens and leaves no room for an answer in "
                    f"max_seq_length={self.config.max_seq_length}"
                )
            group = Group(group.prompt, (Completion(ids[:room], targets[:room]),))
            dataset.truncated += 1
            dataset.tokens_cut += excess
        dataset.groups.append(group)
        return None


#: The data loader of each method.
DATA_LOADERS = {"sft": SFTDataLoader}


def data_seed(config: BaseConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def split_rows(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation): a seeded choice of `share` of the rows, at least one where share > 0, in file order.

    Raises:
        ConfigurationError: nothing would be left to train on.
    """
    held_out = max(1, round(len(rows) * share)) if share else 0
    if held_out >= len(rows):
        raise ConfigurationError(
            f"validation_split: {share} of {len(rows)} rows leaves none to train on; add rows or set validation_split to 0"
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), held_out))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def to_padded(dataset: GroupDataset, pad_token_id: int, length_column: str) -> datasets.Dataset:
    """`input_ids`, `attention_mask` and `labels` padded to one length, for a plain `transformers.Trainer`."""
    longest = max(dataset.lengths)
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], length_column: []}
    for prompt, ((ids, targets),) in dataset.groups:
        length = len(prompt) + len(ids)
        padding = longest - length
        labels = [int(i) if target else -100 for i, target in zip(ids, targets, strict=True)]
        columns["input_ids"].append([*prompt.tolist(), *ids.tolist(), *[pad_token_id] * padding])
        columns["attention_mask"].append([1] * length + [0] * padding)
        columns["labels"].append([-100] * len(prompt) + labels + [-100] * padding)
        columns[length_column].append(length)
    return datasets.Dataset.from_dict(columns)
