"""Data loaders: from a file to the groups that the packed engine trains on, split and counted."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from arabic_qwen.config.data import data_sources, describe
from arabic_qwen.data.bad_rows import BAD_ROWS_FILE, BadRow, BadRows
from arabic_qwen.data.conversations import Message, to_conversation
from arabic_qwen.data.dataset import Example, GroupDataset, repeat, show_group
from arabic_qwen.data.locations import RowLocations
from arabic_qwen.data.normalization import Normalizer
from arabic_qwen.data.preferences import Preference, to_contrast, to_feedback, to_measured_pair, to_pair
from arabic_qwen.data.readers import Row, Rows
from arabic_qwen.data.sources import data_seed, identity, read_rows
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.data.templates import Piece, encode_pieces, render_answer, render_pieces, render_prompt
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.packing.group import Completion, Group

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time

T = TypeVar("T")


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

    Attributes:
        check_columns: whether the columns that `diacritics` names must be there; not where an earlier run named them.
    """

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase):
        self.config = config
        self.tokenizer = tokenizer
        self._length_key: str = config.length_key
        self.max_tokens: int = getattr(config, self._length_key)
        self.bad_rows = BadRows()  # those that load() left out
        self.check_columns = True
        self._places = RowLocations()
        self._normalizer = Normalizer(config)
        self._reported = False

    def check_length(self, model: str, positions: int) -> None:
        """Warn where examples may be longer than what `model` was made for, in tokens."""
        if self.max_tokens > positions:
            logger.warning(
                "%s: %s was made for %d tokens, and longer examples come out wrong; lower it to that",
                self._length_key,
                model,
                positions,
            )

    def _drafts(self, values: dict[str, Any], example: Example) -> list[Draft]:
        """The groups of a row whose texts are normalised. Raises ValueError where the row cannot be used."""
        raise NotImplementedError

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        """The row's conversation before its last answer. Raises ValueError where the row cannot be used."""
        raise NotImplementedError

    def _split_key(self, row: Row) -> str:
        """Rows with the same key are held out together."""
        return row.where

    def _finish(self, dataset: GroupDataset) -> None:
        """What needs the whole split."""

    def load(self) -> dict[str, Any]:
        """Read, check, encode and split: {"train": …, "validation": …}, without the latter where it has no rows.

        Each is a :class:`GroupDataset`; when streaming, "train" is a :class:`GroupStream`, which nothing is held out
        of. Rows that cannot be trained on go to `bad_rows.jsonl` in the output folder.

        Raises:
            ConfigurationError: `diacritics` names columns that no row has; when streaming, a warning of the first rows.
            DatasetError: a file cannot be read, or more than `max_bad_rows` rows cannot be trained on.
        """
        config = self.config
        self.bad_rows = BadRows(config.max_bad_rows, Path(config.resolved_output_dir, BAD_ROWS_FILE))
        train = [] if config.streaming else self._read(config.dataset_path)
        validation = self._read(config.eval_dataset_path) if config.eval_dataset_path else []
        if not config.streaming and self.check_columns and (problem := self._normalizer.missing_columns()):
            raise ConfigurationError(problem)
        self.bad_rows.check()
        if not config.eval_dataset_path and not config.streaming:
            train, validation = self._hold_out(train, [example.key for example in train])
        splits: dict[str, Any] = {}
        if config.streaming:
            identify = partial(identity, config, config.dataset_path)
            splits["train"] = GroupStream(self._stream_rows, self._encode_window, self.bad_rows, identify)
        else:
            splits["train"] = self._train_set(train)
            if not len(splits["train"]):
                raise DatasetError(f"{describe(config.dataset_path)}: no rows are left to train on")
            self._report("train", splits["train"])
        if len(held_out := GroupDataset.of(validation, self._places)):
            self._finish(held_out)
            splits["validation"] = held_out
            self._report("validation", held_out)
        if len(self.bad_rows):
            logger.warning("bad rows: %s", self.bad_rows.summary())
        return splits

    def _train_set(self, examples: list[Example]) -> GroupDataset:
        weights = [source.weight for source in data_sources(self.config.dataset_path)]
        dataset = GroupDataset.of(repeat(examples, weights, data_seed(self.config)), self._places)
        if len(dataset):
            self._finish(dataset)
        return dataset

    def _stream_rows(self) -> Rows:
        return read_rows(self.config, self.config.dataset_path, stream=True)

    def _encode_window(self, rows: list[Row | BadRow], carried: Any) -> tuple[GroupDataset, Any]:
        """The window, and what the next one needs of those before, as JSON can hold it."""
        examples = list(self._examples(self._normalizer.rows(rows), self.bad_rows))
        if self.check_columns and (problem := self._normalizer.missing_columns()):
            logger.warning("%s (so far; later rows may have others)", problem)
        self.check_columns = False  # once
        self.bad_rows.check()
        dataset = self._train_set(examples)
        if not self._reported and len(dataset):
            self._report("train, the first rows", dataset)
        return dataset, None

    def _report(self, name: str, dataset: GroupDataset) -> None:
        logger.info("%s: %s", name, dataset.summary())
        if dataset.truncated:
            logger.warning("%s: raise %s to keep whole answers", name, self._length_key)
        if not self._reported:
            shown = show_group(self.tokenizer, dataset[0])
            logger.info("first training example, what is learned in ⟦ ⟧:\n%s", shown)
            self._reported = True

    def _read(self, dataset_path: Any) -> list[Example]:
        """Rows are encoded as they are read, and not kept."""
        examples = self._examples(self._rows(dataset_path), self.bad_rows)
        return list(track(examples, "Tokenising", disable=not sys.stderr.isatty(), transient=True))

    def _rows(self, dataset_path: Any) -> Rows:
        return self._normalizer.rows(read_rows(self.config, dataset_path))

    def split(self) -> dict[str, list[Row]]:
        """The rows of each split, normalised; when streaming, of the validation data only."""
        train: list[Row | BadRow] = []
        if not self.config.streaming:
            train = list(self._rows(self.config.dataset_path))
        validation: list[Row | BadRow] = []
        if self.config.eval_dataset_path:
            validation = list(self._rows(self.config.eval_dataset_path))
        elif train:
            train, validation = self._hold_out(train, [self._key(row) for row in train])
        splits = {"train": train} | ({"validation": validation} if validation else {})
        return {name: [row for row in rows if isinstance(row, Row)] for name, rows in splits.items()}

    def _hold_out(self, rows: list[T], keys: list[str]) -> tuple[list[T], list[T]]:
        return split_rows(rows, self.config.validation_split, data_seed(self.config), keys)

    def _key(self, row: Row | BadRow) -> str:
        return self._split_key(row) if isinstance(row, Row) else row.where

    def encode(self, rows: Iterable[Row | Mapping[str, Any]] | str | os.PathLike) -> GroupDataset:
        """Encode rows, plain dicts (a `datasets.Dataset` too), or what a path or hub id names.

        Raises:
            DatasetError: some rows cannot be trained on.
        """
        given: Iterable[Any] = read_rows(self.config, rows) if isinstance(rows, (str, os.PathLike)) else rows
        numbered = (
            row if isinstance(row, (Row, BadRow)) else Row(f"row {i}", dict(row)) for i, row in enumerate(given)
        )
        bad_rows = BadRows()
        dataset = GroupDataset.of(list(self._examples(self._normalizer.rows(numbered), bad_rows)), self._places)
        bad_rows.check()
        self._finish(dataset)
        return dataset

    def _examples(self, rows: Iterable[Row | BadRow], bad_rows: BadRows) -> Iterator[Example]:
        """Encode what can be encoded; the rest goes to `bad_rows` and comes as examples without groups."""
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            yield from self._encode(chunk, bad_rows)

    def _encode(self, rows: list[Row | BadRow], bad_rows: BadRows) -> list[Example]:
        examples = [
            Example(self._key(row), row.source, changes=row.changes) if isinstance(row, Row) else Example(row.where)
            for row in rows
        ]
        drafted: list[tuple[Row | BadRow, list[Draft]]] = []
        for row, example in zip(rows, examples, strict=True):
            drafts: list[Draft] = []
            if isinstance(row, Row):
                try:
                    drafts = self._drafts(row.values, example)
                except ValueError as error:
                    row = _bad_row(row, error)
            drafted.append((row, drafts))
        pieces = [completion for _, drafts in drafted for draft in drafts for completion in draft.completions]
        encoded = iter(encode_pieces(self.tokenizer, pieces))
        for (row, drafts), example in zip(drafted, examples, strict=True):
            place = self._places.encode(row.where)
            groups = [_join(draft, [next(encoded) for _ in draft.completions], place) for draft in drafts]
            try:
                for group in groups:
                    self._fit(group, example)
            except ValueError as error:
                example.groups = []
                row = _bad_row(row, error)
            if isinstance(row, BadRow):
                bad_rows.add(row)
        return examples

    def _fit(self, group: Group, example: Example) -> None:
        """Add the group to the example, completions cut to the longest length. Raises ValueError where it cannot be."""
        room = self.max_tokens - len(group.prompt)
        kept, lost = [], []
        for ids, targets in group.completions:
            if room <= 0 or not targets[:room].any():
                raise ValueError(
                    f"the prompt has {len(group.prompt)} tokens and leaves no room for an answer in "
                    f"{self._length_key}={self.max_tokens}"
                )
            if len(ids) > room:
                lost.append(len(ids) - room)
            kept.append(Completion(ids[:room], targets[:room]))
        if any(np.array_equal(kept[0].ids, other.ids) for other in kept[1:]):
            raise ValueError(
                f"chosen and rejected are the same once they are cut at {self._length_key}={self.max_tokens}"
            )
        example.truncated += len(lost)
        example.tokens_cut += sum(lost)
        example.groups.append(group._replace(completions=tuple(kept)))


def _bad_row(row: Row | BadRow, error: ValueError) -> BadRow:
    """The row as it stands in its file, and why it cannot be used."""
    if isinstance(row, BadRow):
        return row
    return BadRow(row.where, f"{error}{' (once normalised)' if row.changes else ''}", row.given or row.values)


def _join(draft: Draft, parts: list[Group], row: int) -> Group:
    """The draft's completions, which were encoded each with the same prompt, as one group."""
    completions = tuple(part.completions[0] for part in parts)
    return Group(parts[0].prompt, completions, draft.label, lengths=draft.lengths, row=row)


class SFTDataLoader(DataLoader):
    """Conversations; every turn of the assistant is learned."""

    def _drafts(self, values: dict[str, Any], example: Example) -> list[Draft]:
        messages = to_conversation(values, self.config.system_prompt)
        return [Draft([pieces]) for pieces in render_pieces(self.tokenizer, messages)]

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        return to_conversation(values)[:-1]


class _PreferenceDataLoader(DataLoader):
    """A prompt and answers to it."""

    read = staticmethod(to_pair)

    def _drafts(self, values: dict[str, Any], example: Example) -> list[Draft]:
        prompt, answers, label, lengths = self.read(values, self.config.system_prompt)
        prompt = self._trim(prompt, example)
        return [Draft([render_answer(self.tokenizer, prompt, answer) for answer in answers], label, lengths)]

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        return self.read(values).prompt

    def _split_key(self, row: Row) -> str:
        """The prompt: a pair whose prompt is trained on in another pair is not unseen."""
        try:
            prompt = json.dumps(self.prompt(row.values))
            return hashlib.sha256(prompt.encode()).hexdigest()  # not the prompt itself, which may be long
        except ValueError:
            return row.where

    def _trim(self, prompt: list[Message], example: Example) -> list[Message]:
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
            example.prompts_trimmed += 1
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
    """Single answers with a label: `prompt`, `completion`, `label`; pairs too with `unpair_preferences`."""

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase):
        super().__init__(config, tokenizer)
        self._seen: list[Group] = []  # up to two groups of different prompts

    def read(self, values: dict[str, Any], system_prompt: str | None = None) -> Preference:
        if "chosen" not in values or "completion" in values:
            return to_feedback(values, system_prompt)
        if not self.config.unpair_preferences:
            raise ValueError("is a pair; set unpair_preferences to true to learn from each of its answers")
        return to_pair(values, system_prompt)

    def _drafts(self, values: dict[str, Any], example: Example) -> list[Draft]:
        (whole,) = super()._drafts(values, example)
        if len(whole.completions) == 1:
            return [whole]
        return [Draft([answer], label) for answer, label in zip(whole.completions, (True, False), strict=True)]

    def _finish(self, dataset: GroupDataset) -> None:
        """Give each prompt a completion of another prompt, for the estimate of the divergence.

        It is one of the same set, or of those read before where the set has a single prompt; none if these have it too.
        """
        groups = dataset.groups
        order = list(range(len(groups)))
        random.Random(data_seed(self.config)).shuffle(order)
        for position, index in enumerate(order):
            group = groups[index]
            others = (groups[order[(position + step) % len(order)]] for step in range(1, len(order)))
            candidates = itertools.chain(others, self._seen)
            stranger = next((other for other in candidates if not np.array_equal(other.prompt, group.prompt)), None)
            if stranger:
                ids, targets = stranger.completions[0]
                room = self.max_tokens - len(group.prompt)
                groups[index] = group._replace(mismatched=Completion(ids[:room], targets[:room]))
        self._seen = [groups[0], *(group for group in groups if not np.array_equal(group.prompt, groups[0].prompt))][:2]

    def _encode_window(self, rows: list[Row | BadRow], carried: Any) -> tuple[GroupDataset, Any]:
        if carried is not None:
            self._seen = [
                Group(np.array(prompt, np.int32), (Completion(np.array(ids, np.int32), np.array(targets, bool)),))
                for prompt, ids, targets in carried
            ]
        dataset, _ = super()._encode_window(rows, carried)
        answers = [(group.prompt, *group.completions[0]) for group in self._seen]
        return dataset, [[part.tolist() for part in answer] for answer in answers]

    def _train_set(self, examples: list[Example]) -> GroupDataset:
        dataset = super()._train_set(examples)
        if len(dataset) and dataset[0].mismatched is None:
            raise DatasetError(
                f"{describe(self.config.dataset_path)}: KTO compares answers with those to other prompts, but all rows "
                "to train on have the same prompt; add rows with other prompts"
            )
        return dataset


def split_rows(rows: list[T], share: float, seed: int, keys: Sequence[str]) -> tuple[list[T], list[T]]:
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
