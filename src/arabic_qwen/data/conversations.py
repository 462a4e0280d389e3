"""A row as a conversation: what is asked, and what the assistant answers; and rows of supervised data in any layout."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from arabic_qwen.data.bad_rows import RowError
from arabic_qwen.data.layouts import LAYOUTS, MESSAGE_COLUMNS, canonical, recognise, role_of
from arabic_qwen.text.encoding import MOSTLY, mojibake_share
from arabic_qwen.text.normalization import normalize

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class Conversation(NamedTuple):
    """What a method learns of a row.

    Attributes:
        prompt: the messages before the answers; the last is the user's.
        answers: of the assistant: one, or several to the same prompt.
        desirable: of each answer, whether it is chosen or good, as opposed to rejected or bad.
        lengths: of the answers, as the row gives them.
        learns_turns: whether what the assistant says in the prompt is learned too.
    """

    prompt: list[Message]
    answers: list[str]
    desirable: tuple[bool, ...] = (True,)
    lengths: tuple[float, ...] | None = None
    learns_turns: bool = False

    @property
    def messages(self) -> list[Message]:
        """With the first answer, which is the chosen one where there are several."""
        return [*self.prompt, {"role": "assistant", "content": self.answers[0]}]

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]


_NEEDED = " or ".join(" + ".join(layout.columns) for layout in LAYOUTS if layout.kind == "conversation")

# Answers that are none, in the spelling of profile `compare`. Short, and without what may be an answer: لا, لا يوجد, NA,
# and None, null, nan, undefined or - to a question about code or data.
_PLACEHOLDERS = {
    *("n/a", "todo", "tbd", "placeholder", "...", "--", "---"),
    *("lorem ipsum", "lorem ipsum dolor sit amet"),
    *("لا يوجد رد", "لا توجد اجابه", "لا توجد استجابه", "بدون اجابه", "بدون رد"),
    *(
        f"{opening}{word}{closing}"
        for word in ("answer", "response", "output", "your answer here", "اجابه", "الاجابه", "جواب", "الجواب", "الرد")
        for opening, closing in ("[]", "<>", "{}")
    ),
}
_TO_BE_WRITTEN = re.compile(
    r"""
    (?:todo|tbd)\W+(?:write|add|fill|insert)\b.*\b(?:answer|response|output)
  | (?:write|enter|insert|add|put)\ (?:your|the|an)\ (?:answer|response)\ here
  | (?:ادخل|اكتب|ضع|اضف)\ (?:اجابت|الاجاب|جواب|الجواب|رد|الرد)\w{0,2}\ هنا
    """,
    re.VERBOSE,
)
_LONGEST_PLACEHOLDER = 40

_SURROGATE = re.compile("[\ud800-\udfff]")


def to_conversation(values: dict[str, Any], system_prompt: str | None = None) -> list[Message]:
    """The row's messages in order, ending with an assistant turn.

    `arabic_qwen.data.layouts.LAYOUTS` lists the layouts. A `system` column, or else `system_prompt`, is
    put before a conversation that does not start with a system message.

    Raises:
        RowError: no such layout, a field is missing, empty or no string, or turns do not alternate.
    """
    layout = recognise(values, "conversation")
    if layout is None:
        raise wrong_columns(values, _NEEDED)
    values, _ = canonical(values)
    if len(layout.columns) == 1:
        messages = read_messages(values[layout.columns[0]], layout.columns[0])
    else:
        question, answer = layout.columns
        messages = _history(values.get("history") or []) if question == "instruction" else []
        messages += read_question(values, question) + _turn(values, answer, "assistant")
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            place = f"[{position}]" if len(layout.columns) == 1 else ""
            check_answer(message["content"], layout.columns[-1] + place)
    if messages and messages[0]["role"] != "system":
        system = field_text(values, "system") if values.get("system") else system_prompt
        if system:
            messages.insert(0, {"role": "system", "content": system})
    check_turns(messages)
    return messages


def read_conversation(values: dict[str, Any], system_prompt: str | None = None) -> Conversation:
    """The row's conversation, all of whose answers are learned.

    Raises:
        RowError: as :func:`to_conversation`.
    """
    messages = to_conversation(values, system_prompt)
    return Conversation(messages[:-1], [messages[-1]["content"]], learns_turns=True)


_KINDS = {
    "conversation": "a conversation, for method sft",
    "pair": "a preference, for method dpo and its relatives",
    "contrast": "a preference with answers to avoid, for method cpo",
    "feedback": "a labelled answer, for method kto",
}


def wrong_columns(values: dict[str, Any], needed: str) -> RowError:
    """What to say of a row that lacks columns."""
    layout = recognise(values)
    hint = "name yours in column_map (`arabic-qwen data layouts` shows all)"
    if layout:
        hint = f"such a row is {_KINDS[layout.kind]}"
    return RowError(f"has the columns {', '.join(values) or '(none)'}, but needs {needed}; {hint}")


def _history(pairs: Any) -> list[Message]:
    """Earlier turns as LLaMA-Factory writes them: [[question, answer], …]."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("history: must be a list of [question, answer] pairs")
    sides = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": field_text({"history": text}, "history", role=role)} for role, text in sides]


def read_question(values: dict[str, Any], column: str) -> list[Message]:
    """The turns before the answer: text or a list of messages; an `instruction` may have an `input`."""
    messages = _turn(values, column, "user")
    if column == "instruction" and values.get("input") and str(values["input"]).strip():
        messages[-1]["content"] += "\n\n" + field_text(values, "input")
    return messages


def _turn(values: dict[str, Any], column: str, role: str) -> list[Message]:
    if isinstance(values[column], list) and column in MESSAGE_COLUMNS:
        return read_messages(values[column], column)
    return [{"role": role, "content": field_text(values, column, role=role)}]


def read_messages(items: Any, column: str) -> list[Message]:
    """The messages of a list, with our names of the roles."""
    if not isinstance(items, list):
        raise RowError(f"{column}: must be a list of messages, found a {type(items).__name__}")
    messages = []
    for position, item in enumerate(items):
        place = f"{column}[{position}]"
        if not isinstance(item, dict):
            raise RowError(f"{place}: must be an object with role and content, found a {type(item).__name__}")
        role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
        name = item.get(role_key)
        role = role_of(name)[0] if isinstance(name, str) else None
        if role is None:
            raise RowError(f"{place}.{role_key}: {name!r} is no role; use system, user or assistant")
        messages.append({"role": role, "content": field_text(item, text_key, f"{place}.", role)})
    return messages


def field_text(values: dict[str, Any], key: str, place: str = "", role: str = "") -> str:
    """The text in a field, which says something; `role`: whose text it is."""
    text = values.get(key)
    if not isinstance(text, str):
        raise RowError(f"{place}{key}: must be text, found {'nothing' if text is None else type(text).__name__}")
    if not text.strip():
        raise RowError(f"{place}{key}: is empty", "empty_answer" if role == "assistant" else "broken_row")
    if _SURROGATE.search(text):
        raise RowError(f"{place}{key}: has half of a surrogate pair (a broken \\u escape), which is no character")
    return text


def check_answer(text: str, place: str) -> None:
    """Raises RowError where an answer to learn is only a placeholder for one, or cannot be read."""
    if mojibake_share(text) > MOSTLY:
        raise RowError(f"{place}: was read in a wrong encoding; `arabic-qwen data fix` decodes it again", "mojibake")
    if len(text) > _LONGEST_PLACEHOLDER:
        return
    folded = normalize(text, "compare").casefold()
    bare = folded.strip(" .!()[]{}<>")
    if folded in _PLACEHOLDERS or folded.rstrip(" .!") in _PLACEHOLDERS or _TO_BE_WRITTEN.fullmatch(bare):
        raise RowError(f"{place}: is a placeholder ({text.strip()}); write the answer", "placeholder_answer")


def check_turns(messages: list[Message]) -> None:
    """Raises RowError where user and assistant do not alternate, from a question to an answer."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns and turns == ["assistant", "user"] * (len(turns) // 2):
        raise RowError(
            "starts with the assistant and ends with the user: the roles are swapped, or the answer is missing",
            "swapped_roles",
        )
    if turns[-1:] != ["assistant"]:
        raise RowError("does not end with an answer of the assistant", "missing_end_of_turn")
    for position, role in enumerate(turns):
        if role != ("user", "assistant")[position % 2]:
            raise RowError(f"turn {position + 1} is by {role}; user and assistant must alternate, the user first")
