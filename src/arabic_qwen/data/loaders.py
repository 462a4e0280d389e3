"""Data loaders: from a file to the groups that the packed engine trains on, split and counted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from arabic_qwen.config.data import data_sources, describe
from arabic_qwen.data.auxiliary import Auxiliary, two_prompts
from arabic_qwen.data.bad_rows import BAD_ROWS_FILE, BadRow, BadRows
from arabic_qwen.data.conversations import Conversation, Message
from arabic_qwen.data.dataset import GroupDataset, show_group
from arabic_qwen.data.locations import RowLocations
from arabic_qwen.data.normalization import Normalizer
from arabic_qwen.data.readers import Row, Rows
from arabic_qwen.data.sources import data_seed, identity, read_rows
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.data.templates import Piece, encode_pieces, render_conversation, render_prompt
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.packing.group import Completion, Group

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time

T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class _EncodedRow:
    """A row as groups, none where it cannot be used, and what was done to it."""

    key: str  # rows with the same key are held out together
    source: int = 0  # which entry of dataset_path
    groups: list[Group] = dataclasses.field(default_factory=list)
    truncated: int = 0  # answers cut at the longest length
    tokens_cut: int = 0
    prompts_trimmed: int = 0  # prompts that lost their beginning at max_prompt_length
    changes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # characters that normalising changed, by rule


class DataLoader:
    """Reads, checks, splits and encodes.

    Args:
        config: paths, split, template and length settings.
        tokenizer: with the chat template to train on.
        reader: (a row's values, config) -> its conversations.
        auxiliary: gives groups their auxiliary completions; None: they get none.

    Attributes:
        check_columns: whether the columns that `diacritics` names must be there; not where an earlier run named them.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: PreTrainedTokenizerBase,
        reader: Callable[[dict[str, Any], Any], Sequence[Conversation]],
        auxiliary: Auxiliary | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self._length_key: str = config.length_key
        self.max_tokens: int = getattr(config, self._length_key)
        self.bad_rows = BadRows()  # those that load() left out
        self.check_columns = True
        self._places = RowLocations()
        self._normalizer = Normalizer(config)
        self._reported = False
        self._reader = reader
        self._auxiliary = auxiliary
        self._earlier: list[Group] = []  # of the windows before

    def check_length(self, model: str, positions: int) -> None:
        """Warn where examples may be longer than what `model` was made for, in tokens."""
        if self.max_tokens > positions:
            logger.warning(
                "%s: %s was made for %d tokens, and longer examples come out wrong; lower it to that",
                self._length_key,
                model,
                positions,
            )

    def prompt(self, values: dict[str, Any]) -> list[Message]:
        """The row's conversation before its last answer. Raises ValueError where the row cannot be used."""
        return self._reader(values, self.config)[0].prompt

    def _key(self, row: Row | BadRow) -> str:
        """Rows with the same key are held out together.

        Of preferences the prompt: a pair whose prompt is trained on in another pair is not unseen.
        """
        if isinstance(row, Row):
            with contextlib.suppress(ValueError):
                return _key_of(row, self._reader(row.values, self.config))
        return row.where

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
        if len(held_out := _dataset(validation, self._places)):
            self._add_auxiliary(held_out)
            splits["validation"] = held_out
            self._report("validation", held_out)
        if len(self.bad_rows):
            logger.warning("bad rows: %s", self.bad_rows.summary())
        return splits

    def _train_set(self, examples: list[_EncodedRow]) -> GroupDataset:
        weights = [source.weight for source in data_sources(self.config.dataset_path)]
        dataset = _dataset(_repeat(examples, weights, data_seed(self.config)), self._places)
        if len(dataset):
            self._add_auxiliary(dataset)
            if self._auxiliary and not dataset[0].auxiliary:
                raise DatasetError(
                    f"{describe(self.config.dataset_path)}: {self.config.method.upper()} compares answers with those to other "
                    "prompts, but all rows to train on have the same prompt; add rows with other prompts"
                )
        return dataset

    def _add_auxiliary(self, dataset: GroupDataset) -> None:
        if self._auxiliary:
            seed = data_seed(self.config)
            dataset.groups = self._auxiliary(dataset.groups, self._earlier, self.max_tokens, seed)
            self._earlier = two_prompts(dataset.groups)

    def _stream_rows(self) -> Rows:
        return read_rows(self.config, self.config.dataset_path, stream=True)

    def _encode_window(self, rows: list[Row | BadRow], carried: Any) -> tuple[GroupDataset, Any]:
        """The window, and what the next one needs of those before, as JSON can hold it."""
        if carried is not None:
            self._earlier = [
                Group(np.array(prompt, np.int32), (Completion(np.array(ids, np.int32), np.array(targets, bool)),))
                for prompt, ids, targets in carried
            ]
        examples = list(self._examples(self._normalizer.rows(rows), self.bad_rows))
        if self.check_columns and (problem := self._normalizer.missing_columns()):
            logger.warning("%s (so far; later rows may have others)", problem)
        self.check_columns = False  # once
        self.bad_rows.check()
        dataset = self._train_set(examples)
        if not self._reported and len(dataset):
            self._report("train, the first rows", dataset)
        answers = [(group.prompt, *group.completions[0][:2]) for group in self._earlier]
        return dataset, [[part.tolist() for part in answer] for answer in answers] or None

    def _report(self, name: str, dataset: GroupDataset) -> None:
        logger.info("%s: %s", name, dataset.summary())
        if dataset.truncated:
            logger.warning("%s: raise %s to keep whole answers", name, self._length_key)
        if not self._reported:
            shown = show_group(self.tokenizer, dataset[0])
            logger.info("first training example, what is learned in ⟦ ⟧:\n%s", shown)
            self._reported = True

    def _read(self, dataset_path: Any) -> list[_EncodedRow]:
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
        dataset = _dataset(list(self._examples(self._normalizer.rows(numbered), bad_rows)), self._places)
        bad_rows.check()
        self._add_auxiliary(dataset)
        return dataset

    def _examples(self, rows: Iterable[Row | BadRow], bad_rows: BadRows) -> Iterator[_EncodedRow]:
        """Encode what can be encoded; the rest goes to `bad_rows` and comes as examples without groups."""
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            yield from self._encode(chunk, bad_rows)

    def _encode(self, rows: list[Row | BadRow], bad_rows: BadRows) -> list[_EncodedRow]:
        encoded: list[_EncodedRow] = []
        rendered: list[list[tuple[Conversation, list[list[Piece]]]]] = []  # of each row, its groups
        problems: list[Row | BadRow] = list(rows)
        for number, row in enumerate(rows):
            encoded.append(_EncodedRow(row.where))
            rendered.append([])
            if isinstance(row, Row):
                encoded[-1].source, encoded[-1].changes = row.source, row.changes
                try:
                    conversations = self._reader(row.values, self.config)
                    encoded[-1].key = _key_of(row, conversations)
                    for conversation in conversations:
                        trimmed = self._trim(conversation, encoded[-1])
                        groups = render_conversation(self.tokenizer, trimmed)
                        rendered[-1] += [(conversation, completions) for completions in groups]
                except ValueError as error:
                    rendered[-1], problems[number] = [], _bad_row(row, error)
        pieces = [completion for groups in rendered for _, completions in groups for completion in completions]
        tokens = iter(encode_pieces(self.tokenizer, pieces))
        for number, (parts, result) in enumerate(zip(rendered, encoded, strict=True)):
            place = self._places.encode(rows[number].where)
            joined = [_join(conversation, [next(tokens) for _ in own], place) for conversation, own in parts]
            try:
                for group in joined:
                    self._fit(group, result)
            except ValueError as error:
                result.groups, problems[number] = [], _bad_row(rows[number], error)
            if isinstance(bad := problems[number], BadRow):
                bad_rows.add(bad)
        return encoded

    def _fit(self, group: Group, row: _EncodedRow) -> None:
        """Add the group to the row, completions cut to the longest length. Raises ValueError where it cannot be."""
        room = self.max_tokens - len(group.prompt)
        kept, lost = [], []
        for ids, targets, desirable in group.completions:
            if room <= 0 or not targets[:room].any():
                raise ValueError(
                    f"the prompt has {len(group.prompt)} tokens and leaves no room for an answer in "
                    f"{self._length_key}={self.max_tokens}"
                )
            if len(ids) > room:
                lost.append(len(ids) - room)
            kept.append(Completion(ids[:room], targets[:room], desirable))
        if any(np.array_equal(kept[0].ids, other.ids) for other in kept[1:]):
            raise ValueError(
                f"chosen and rejected are the same once they are cut at {self._length_key}={self.max_tokens}"
            )
        row.truncated += len(lost)
        row.tokens_cut += sum(lost)
        row.groups.append(group._replace(completions=tuple(kept)))

    def _trim(self, conversation: Conversation, row: _EncodedRow) -> Conversation:
        """The conversation with its prompt within max_prompt_length tokens: its oldest text is cut from the left, turns that get empty go.

        The template's own tokens and the system prompt stay.
        """
        limit = getattr(self.config, "max_prompt_length", None)
        if limit is None or conversation.learns_turns:
            return conversation
        prompt = conversation.prompt
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
            row.prompts_trimmed = 1
        return conversation._replace(prompt=prompt)

    def _prompt_length(self, prompt: list[Message]) -> int:
        return len(self.tokenizer(render_prompt(self.tokenizer, prompt), add_special_tokens=False).input_ids)


def _bad_row(row: Row | BadRow, error: ValueError) -> BadRow:
    """The row as it stands in its file, and why it cannot be used."""
    if isinstance(row, BadRow):
        return row
    return BadRow(row.where, f"{error}{' (once normalised)' if row.changes else ''}", row.given or row.values)


def _join(conversation: Conversation, parts: list[tuple[np.ndarray, Completion]], row: int) -> Group:
    """The completions of a conversation, which were encoded each with the same prompt, as one group."""
    answers = zip(parts, conversation.desirable, strict=True)
    completions = tuple(completion._replace(desirable=desirable) for (_, completion), desirable in answers)
    return Group(parts[0][0], completions, lengths=conversation.lengths, row=row)


def _key_of(row: Row, conversations: Sequence[Conversation]) -> str:
    if any(conversation.learns_turns for conversation in conversations):
        return row.where
    prompt = json.dumps(conversations[0].prompt)
    return hashlib.sha256(prompt.encode()).hexdigest()  # not the prompt itself, which may be long


def _dataset(rows: Iterable[_EncodedRow], places: RowLocations) -> GroupDataset:
    used = [row for row in rows if row.groups]
    changes: Counter[str] = Counter()
    for row in used:
        changes.update(row.changes)
    return GroupDataset(
        [group for row in used for group in row.groups],
        rows=len(used),
        truncated=sum(row.truncated for row in used),
        tokens_cut=sum(row.tokens_cut for row in used),
        prompts_trimmed=sum(row.prompts_trimmed for row in used),
        rows_changed=sum(bool(row.changes) for row in used),
        changes=changes,
        places=places,
    )


def _repeat(rows: Sequence[_EncodedRow], weights: Sequence[float], seed: int) -> list[_EncodedRow]:
    """Each source's rows `weight` times, in order: whole copies, and a seeded choice for the fraction."""
    if all(weight == 1 for weight in weights):
        return list(rows)
    times = [0] * len(rows)
    for number, weight in enumerate(weights):
        own = [position for position, row in enumerate(rows) if row.source == number]
        chosen = set(random.Random(seed).sample(own, round(len(own) * (weight % 1))))
        for position in own:
            times[position] = int(weight) + (position in chosen)
    return [row for row, copies in zip(rows, times, strict=True) for _ in range(copies)]


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
    for prompt, ((ids, targets, _),), *_ in dataset.groups:
        length = len(prompt) + len(ids)
        padding = longest - length
        labels = [int(i) if target else -100 for i, target in zip(ids, targets, strict=True)]
        columns["input_ids"].append([*prompt.tolist(), *ids.tolist(), *[pad_token_id] * padding])
        columns["attention_mask"].append([1] * length + [0] * padding)
        columns["labels"].append([-100] * len(prompt) + labels + [-100] * padding)
        columns[length_column].append(length)
    return datasets.Dataset.from_dict(columns)
