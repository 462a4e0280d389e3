"""Recognises the row layouts of preference data: a prompt and its answers."""

from __future__ import annotations

import math
from typing import Any

from arabic_qwen.data.bad_rows import RowError
from arabic_qwen.data.conversations import (
    Conversation,
    Message,
    check_answer,
    check_turns,
    field_text,
    read_messages,
    read_question,
    wrong_columns,
)
from arabic_qwen.data.layouts import canonical

_LABELS = {True: True, False: False, "desirable": True, "undesirable": False}  # 1 and 0 are True and False as keys


def to_pair(values: dict[str, Any], system_prompt: str | None = None) -> Conversation:
    """`prompt` (or `instruction`), `chosen`, `rejected`: strings or lists of messages.

    The prompt may be left out where chosen and rejected are whole conversations.

    Raises:
        RowError: a field is missing, empty or malformed, or chosen and rejected are the same.
    """
    _require(values, "chosen", "rejected")
    values, _ = canonical(values)
    rejected = values["rejected"]
    several = isinstance(rejected, list) and not (rejected and isinstance(rejected[0], dict))
    if several or values.get("hard_negatives"):
        key = "rejected" if several else "hard_negatives"
        raise RowError(f"{key}: only CPO learns from several rejected answers; give one, or use method cpo")
    return to_contrast({**values, "rejected": [rejected]}, system_prompt)


def to_measured_pair(values: dict[str, Any], system_prompt: str | None = None) -> Conversation:
    """As :func:`to_pair`; `chosen_length` and `rejected_length` may be there, in any unit.

    Raises:
        RowError: as :func:`to_pair`, or only one of the lengths is there, or one is no positive number.
    """
    pair = to_pair(values, system_prompt)
    given: dict[str, Any] = {name: values.get(name) for name in ("chosen_length", "rejected_length")}
    if all(length is None for length in given.values()):
        return pair
    for name, length in given.items():
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not 0 < length < math.inf:
            raise RowError(f"{name}: {length!r} is no positive number; give both lengths, or neither")
    return pair._replace(lengths=tuple(given.values()))


def to_contrast(values: dict[str, Any], system_prompt: str | None = None) -> Conversation:
    """`prompt`, `chosen`, and any number of negatives: `rejected` and `hard_negatives`, each one text or a list of them.

    One of the two columns is enough.

    Raises:
        RowError: as :func:`to_pair`.
    """
    _require(values, "chosen", *(["rejected"] if values.get("hard_negatives") is None else []))
    values, _ = canonical(values)
    negatives = _negatives(values, "rejected") + _negatives(values, "hard_negatives")
    prompt, chosen = _answer(values, values["chosen"], "chosen")
    check_answer(chosen, "chosen")
    answers = [chosen]
    for position, negative in enumerate(negatives):
        place = "rejected" if len(negatives) == 1 else f"negative {position + 1}"
        negative_prompt, answer = _answer(values, negative, place)
        if negative_prompt != prompt:
            raise RowError(f"chosen and {place} answer different prompts")
        if answer == chosen:
            raise RowError(f"chosen and {place} are the same", "equal_answers")
        answers.append(answer)
    desirable = (True, *[False] * len(negatives))
    return Conversation(_with_system(prompt, values, system_prompt), answers, desirable)


def _negatives(values: dict[str, Any], column: str) -> list[Any]:
    """Answers to avoid: none, one, or a list of them; a list of messages is one answer."""
    given = values.get(column)
    if column == "hard_negatives" and not isinstance(given or [], (list, str)):
        raise RowError(f"hard_negatives: must be a text or a list of texts, found a {type(given).__name__}")
    if not given and (column == "hard_negatives" or values.get("hard_negatives")):
        return []
    return given if isinstance(given, list) and not (given and isinstance(given[0], dict)) else [given]


def to_feedback(values: dict[str, Any], system_prompt: str | None = None) -> Conversation:
    """`prompt`, `completion` and `label`: true, 1 or "desirable" for good answers, false, 0 or "undesirable" for bad.

    Raises:
        RowError: a field is missing, empty or malformed.
    """
    _require(values, "completion", "label")
    values, _ = canonical(values)
    label = values["label"]
    if not isinstance(label, (bool, int, str)) or label not in _LABELS:
        raise RowError(f"label: {label!r} is no label; use true or false")
    prompt, answer = _answer(values, values["completion"], "completion")
    if _LABELS[label]:
        check_answer(answer, "completion")
    return Conversation(_with_system(prompt, values, system_prompt), [answer], (_LABELS[label],))


def _require(values: dict[str, Any], *columns: str) -> None:
    missing = [column for column in columns if column not in values]
    if missing:
        raise wrong_columns(values, f"prompt, {', '.join(columns)}")


def _answer(values: dict[str, Any], given: Any, place: str) -> tuple[list[Message], str]:
    """The prompt's messages and the answer's text, from text or from messages that end with the answer."""
    before = _prompt(values)
    if not isinstance(given, list):
        if not before:
            raise RowError("prompt: is missing")
        text = field_text({place: given}, place, role="assistant")
        check_turns([*before, {"role": "assistant", "content": text}])
        return before, text
    messages = read_messages(given, place)
    repeats = messages[: len(before)] == before or (
        len(before) == 1 and messages[:-1][-1:] == before  # after a system message, say
    )
    if not repeats:
        messages = [*before, *messages]
    check_turns(messages)
    return messages[:-1], messages[-1]["content"]


def _prompt(values: dict[str, Any]) -> list[Message]:
    column = "prompt" if values.get("prompt") is not None else "instruction"
    return read_question(values, column) if values.get(column) is not None else []


def _with_system(prompt: list[Message], values: dict[str, Any], system_prompt: str | None) -> list[Message]:
    if prompt[0]["role"] == "system":
        return prompt
    system = field_text(values, "system") if values.get("system") else system_prompt
    return [{"role": "system", "content": system}, *prompt] if system else prompt
