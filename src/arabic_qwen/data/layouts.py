"""The layouts of rows that training reads: which columns, of what kind, and which public sets use them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import regex

from arabic_qwen.data.bad_rows import RowError
from arabic_qwen.text.normalization import normalize

#: What rows are: a conversation to learn; a prompt with an answer to prefer and one to avoid; one with any number of them to
#: avoid; an answer with a label.
RowKind = Literal["conversation", "pair", "contrast", "feedback"]


class Layout(NamedTuple):
    """A kind of row, recognised by its columns; others that it does not name are ignored."""

    columns: tuple[str, ...]
    kind: RowKind
    example: dict[str, Any]
    optional: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()  # public Arabic sets that use it


_Q, _A, _B = "ما عاصمة الأردن؟", "عمّان", "إربد"

#: In the order in which they are tried: a row is read by the first that it has all columns of.
LAYOUTS = (
    Layout(
        ("messages",),
        "conversation",
        {"messages": [{"role": "user", "content": _Q}, {"role": "assistant", "content": _A}]},
        ("system",),
        ("MBZUAI-Paris/Egyptian-SFT-Mixture", "MBZUAI-Paris/Darija-SFT-Mixture"),
    ),
    Layout(
        ("conversations",),
        "conversation",
        {"conversations": [{"from": "human", "value": _Q}, {"from": "gpt", "value": _A}]},
        ("system",),
        ("2A2I/Arabic-OpenHermes-2.5", "FreedomIntelligence/alpaca-gpt4-arabic"),
    ),
    Layout(("completion", "label"), "feedback", {"prompt": _Q, "completion": _A, "label": True}, ("prompt", "system")),
    Layout(("prompt", "completion"), "conversation", {"prompt": _Q, "completion": _A}, ("system",)),
    Layout(
        ("instruction", "response"),
        "conversation",
        {"instruction": _Q, "response": _A},
        ("input", "history", "system"),
    ),
    Layout(
        ("instruction", "output"),
        "conversation",
        {"instruction": "ترجم إلى العربية", "input": "Hello", "output": "مرحبًا"},
        ("input", "history", "system"),
        ("arbml/CIDAR", "ClusterlabAi/InstAr-500k", "MBZUAI/Bactrian-X"),
    ),
    Layout(
        ("inputs", "targets"),
        "conversation",
        {"inputs": _Q, "targets": _A},
        ("system",),
        ("CohereLabs/aya_dataset", "CohereLabs/aya_collection", "2A2I/Arabic_Aya"),
    ),
    Layout(
        ("prompt", "chosen", "rejected"),
        "pair",
        {"prompt": _Q, "chosen": _A, "rejected": _B},
        ("hard_negatives", "chosen_length", "rejected_length", "system"),
        ("HeshamHaroon/arabic-dialect-dpo", "2A2I/Aya-Aya.23.8B-DPO", "2A2I/Aya-Command.R-DPO"),
    ),
    Layout(
        ("instruction", "chosen", "rejected"),
        "pair",
        {"instruction": _Q, "chosen": _A, "rejected": _B},
        ("input", "hard_negatives", "chosen_length", "rejected_length", "system"),
        ("FreedomIntelligence/Arabic-preference-data-RLHF",),
    ),
    Layout(
        ("prompt", "chosen", "hard_negatives"),
        "contrast",
        {"prompt": _Q, "chosen": _A, "hard_negatives": [_B]},
        ("system",),
    ),
    Layout(
        ("chosen", "rejected"),
        "pair",
        {
            side: [{"role": "user", "content": _Q}, {"role": "assistant", "content": answer}]
            for side, answer in (("chosen", _A), ("rejected", _B))
        },
        ("hard_negatives", "chosen_length", "rejected_length", "system"),
        ("2A2I/argilla-dpo-mix-7k-arabic",),
    ),
)

#: All columns that training reads.
COLUMNS = frozenset(name for layout in LAYOUTS for name in (*layout.columns, *layout.optional))

_TEXTS = ("prompt", "completion", "chosen", "rejected")

#: Columns that hold a list of messages, or may do so instead of text.
MESSAGE_COLUMNS = ("messages", "conversations", *_TEXTS)

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
}

# Without ال and in the spelling of profile `compare`.
_TRANSLATED_ROLES = {
    **dict.fromkeys(("نظام", "رساله نظام", "موجه نظام"), "system"),
    **dict.fromkeys(("مستخدم", "مستخدمه", "انسان", "بشر", "بشري", "سائل", "سائله", "عميل", "عميله"), "user"),
    **dict.fromkeys(
        ("مساعد", "مساعده", "مساعد ذكي", "ذكاء اصطناعي", "نموذج", "بوت", "روبوت", "مجيب", "مجيبه", "جي بي تي"),
        "assistant",
    ),
}


def recognise(columns: Iterable[str], kind: RowKind | None = None) -> Layout | None:
    """The layout of a row with these columns: of a kind, or of any."""
    names = set(columns)
    return next((x for x in LAYOUTS if names.issuperset(x.columns) and kind in (None, x.kind)), None)


@lru_cache(maxsize=1000)
def role_of(name: str) -> tuple[str | None, bool]:
    """What a role's name stands for (system, user, assistant; None: no role), and whether it is translated."""
    name = name.strip().casefold()
    if name in _ROLES:
        return _ROLES[name], False
    words = (word.removeprefix("ال") for word in normalize(name, "compare").split())
    role = _TRANSLATED_ROLES.get(" ".join(words))
    return role, role is not None


def canonical(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row as we would write it, and the codes of what is unusual in it, each once.

    Lists of messages that are stored as text (JSON or a Python literal) become lists, translated role names ours, and
    lists of one text the text. Columns keep their names. The given row is not changed.

    Raises:
        RowError: a text looks like a list of messages and cannot be read as one.
    """
    changed: dict[str, Any] = {}
    codes = []
    for column in MESSAGE_COLUMNS:
        given = found = values.get(column)
        if isinstance(found, str) and found.lstrip()[:1] == "[":
            found = _read_list(found, column)
            if found is not given:
                codes.append("stringified_messages")
        if isinstance(found, list):
            if len(found) == 1 and isinstance(found[0], str) and column in ("chosen", "rejected"):
                found = found[0]
            elif any(_is_translated(item) for item in found):
                found = [_with_our_role(item) if _is_translated(item) else item for item in found]
                codes.append("translated_role")
        if found is not given:
            changed[column] = found
    return ({**values, **changed} if changed else values), list(dict.fromkeys(codes))


def are_messages(value: Any) -> bool:
    """Whether the value is a list of messages, whatever their roles."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
            for item in value
        )
    )


def _role_key(message: dict[str, Any]) -> str:
    return "from" if "from" in message else "role"


def _is_translated(item: Any) -> bool:
    role = item.get(_role_key(item)) if isinstance(item, dict) else None
    return isinstance(role, str) and role not in _ROLES and role_of(role)[1]


def _with_our_role(message: dict[str, Any]) -> dict[str, Any]:
    key = _role_key(message)
    return {**message, key: role_of(message[key])[0]}


# A text that begins so is no prose.
_MESSAGES = regex.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")

# Strings, numbers, names, brackets, but no operators: `ast.literal_eval` can then neither nest deeply nor run long.
_LITERAL = regex.compile(
    r"""(?:\s++|[\[\]{}:,]|'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+"|\d++(?:\.\d++)?|None|True|False)++"""
)

_BETWEEN = regex.compile(r"\}\s*\n\s*\{")  # how numpy, and so pandas' to_csv, separates them; strings have no line ends


def _read_list(text: str, column: str) -> Any:
    """The list of messages that a text holds; the text itself where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if column in _TEXTS and not _MESSAGES.match(text):
            return text
        try:
            if not _LITERAL.fullmatch(text):
                raise ValueError
            found = ast.literal_eval(_BETWEEN.sub("}, {", text.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(
                f"{column}: is a list of messages stored as text, which is broken; store a list of messages",
                "stringified_messages",
            ) from None
    return found if are_messages(found) else text
