"""Recognises the row layouts of supervised data and turns each row into a conversation."""

from __future__ import annotations

from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}

LAYOUTS = "instruction + response, instruction + input + output, prompt + completion, messages, or conversations"


def to_conversation(values: dict[str, Any], system_prompt: str | None = None) -> list[Message]:
    """The row's messages in order, ending with an assistant turn.

    Layouts, by their columns: `instruction` + `response`; Alpaca's `instruction` + `input` + `output`, with
    `history` or without; `prompt` +
    `completion`, as strings or as lists of messages; `messages` of role/content; `conversations` of from/value. A
    `system` column, or else `system_prompt`, is put before a conversation that does not start with a system message.

    Raises:
        ValueError: the layout is not one of these, a field is missing, empty or no string, or turns do not alternate.
    """
    if "messages" in values:
        messages = read_messages(values["messages"], "messages")
    elif "conversations" in values:
        messages = read_messages(values["conversations"], "conversations")
    elif "prompt" in values and "completion" in values:
        messages = _turn(values, "prompt", "user") + _turn(values, "completion", "assistant")
    elif "instruction" in values and ("response" in values or "output" in values):
        answer = "response" if "response" in values else "output"
        question = field_text(values, "instruction")
        if values.get("input") and str(values["input"]).strip():
            question += "\n\n" + field_text(values, "input")
        messages = _history(values.get("history") or [])
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": field_text(values, answer)},
        ]
    else:
        raise wrong_columns(values, LAYOUTS)

    if messages and messages[0]["role"] != "system":
        system = field_text(values, "system") if values.get("system") else system_prompt
        if system:
            messages.insert(0, {"role": "system", "content": system})
    check_turns(messages)
    return messages


def wrong_columns(values: dict[str, Any], needed: str) -> ValueError:
    """What to say of a row that lacks columns."""
    if {"completion", "label"} <= values.keys():
        hint = "such rows are for method kto"
    elif {"chosen", "rejected"} <= values.keys():
        hint = "such rows are for methods dpo, ipo, cpo, simpo and orpo"
    else:
        hint = "name yours in column_map"
    return ValueError(f"has the columns {', '.join(values) or '(none)'}, but needs {needed}; {hint}")


def _history(pairs: Any) -> list[Message]:
    """Earlier turns as LLaMA-Factory writes them: [[question, answer], …]."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("history: must be a list of [question, answer] pairs")
    sides = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": field_text({"history": text}, "history")} for role, text in sides]


def _turn(values: dict[str, Any], column: str, role: str) -> list[Message]:
    if isinstance(values[column], list):
        return read_messages(values[column], column)
    return [{"role": role, "content": field_text(values, column)}]


def read_messages(items: Any, column: str) -> list[Message]:
    if not isinstance(items, list):
        raise ValueError(f"{column}: must be a list of messages, found a {type(items).__name__}")
    messages = []
    for position, item in enumerate(items):
        place = f"{column}[{position}]"
        if not isinstance(item, dict):
            raise ValueError(f"{place}: must be an object with role and content, found a {type(item).__name__}")
        role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
        role = item.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{place}.{role_key}: {role!r} is no role; use system, user or assistant")
        messages.append({"role": _ROLES[role], "content": field_text(item, text_key, f"{place}.")})
    return messages


def field_text(values: dict[str, Any], key: str, place: str = "") -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{place}{key}: must be text, found {'nothing' if text is None else type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{place}{key}: is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{place}{key}: has half of a surrogate pair (a broken \\u escape), which is no character")
    return text


def check_turns(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[-1:] != ["assistant"]:
        raise ValueError("does not end with an answer of the assistant")
    for position, role in enumerate(turns):
        if role != ("user", "assistant")[position % 2]:
            raise ValueError(f"turn {position + 1} is by {role}; user and assistant must alternate, the user first")
