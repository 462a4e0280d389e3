"""Normalises the texts of rows as a run's configuration says, before their layout is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.conversations import Message
from arabic_qwen.data.layouts import COLUMNS, canonical
from arabic_qwen.data.readers import Row
from arabic_qwen.text.normalization import normalize, normalize_counted
from arabic_qwen.text.rules import OFF, Setting

# Columns of questions: where `diacritics` by column names one of them, it says how all questions are read.
_QUESTION_TEXTS = ("instruction", "prompt", "inputs")
_QUESTIONS = (*_QUESTION_TEXTS, "messages", "conversations")
_MESSAGE_TEXTS = ("content", "value")


class Normalizer:
    """Applies `normalize` and `diacritics`.

    Args:
        config: with these settings.
    """

    def __init__(self, config: Any):
        self.diacritics: Any = config.diacritics
        self._rules = {} if config.normalize else OFF
        by_column = config.diacritics if isinstance(config.diacritics, dict) else {}
        self._question = next((by_column[column] for column in _QUESTIONS if column in by_column), "keep")
        self._columns: dict[str, None] = {}  # met so far, in order

    def rows(self, rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The rows with their texts normalised: those of columns that training reads."""
        return (self._row(row) if isinstance(row, Row) else row for row in rows)

    def _row(self, row: Row) -> Row:
        self._columns.update(dict.fromkeys(column for column in row.values if column in COLUMNS))
        changes: Counter[str] = Counter()
        try:
            given, _ = canonical(row.values)  # in messages that are stored as text, letters may be escaped
        except RowError:
            return row  # which reading it will say
        values = dict(given)
        for column in filter(COLUMNS.__contains__, given):
            values[column] = _map_texts(given[column], self._function(self._setting(column), changes))
        return row._replace(values=values, given=row.values, changes=changes) if changes else row

    def prompt(self, messages: list[Message]) -> list[Message]:
        """A conversation to be answered, with what the user says normalised as questions are in the run's data."""
        setting = self._question if isinstance(self.diacritics, dict) else self.diacritics
        return [
            {**message, "content": normalize(message["content"], **{**self._rules, "diacritics": setting})}
            if message["role"] == "user"
            else message
            for message in messages
        ]

    def missing_columns(self) -> str:
        """What to say where `diacritics` names columns that no row so far has, or that training does not read."""
        missing = self.diacritics.keys() - self._columns.keys() if isinstance(self.diacritics, dict) else ()
        if not missing:
            return ""
        return (
            f"diacritics: no row has {', '.join(sorted(missing))}; "
            f"the columns that training reads of them are {', '.join(self._columns) or '(none)'}"
        )

    def _setting(self, column: str) -> Setting:
        if not isinstance(self.diacritics, dict):
            return self.diacritics
        return self.diacritics.get(column, self._question if column in _QUESTION_TEXTS else "keep")

    def _function(self, diacritics: Setting, changes: Counter[str]) -> Callable[[str], str]:
        rules = {**self._rules, "diacritics": diacritics}
        return lambda text: normalize_counted(text, changes, **rules)


def _map_texts(value: Any, function: Callable[[str], str]) -> Any:
    """The value with the function applied to its texts: itself, the items of lists, what messages say."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_texts(item, function) for item in value]
    if isinstance(value, dict):
        return value | {key: _map_texts(value[key], function) for key in _MESSAGE_TEXTS if key in value}
    return value
