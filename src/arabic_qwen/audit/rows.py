"""A row of any method as the doctor sees it: a conversation, and answers that are not to be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from arabic_qwen.audit.answer_checks import asked_dialect
from arabic_qwen.audit.duplicates import Text
from arabic_qwen.data.conversations import Message, to_conversation
from arabic_qwen.data.layouts import recognise
from arabic_qwen.data.preferences import Preference, to_contrast, to_feedback, to_measured_pair, to_pair
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.text.normalization import fold

_PREFERENCES: dict[str, Callable[[dict[str, Any]], Preference]] = {
    "dpo": to_pair,
    "ipo": to_measured_pair,
    "cpo": to_contrast,
    "simpo": to_pair,
    "orpo": to_pair,
    "kto": to_feedback,
}
_METHODS = ("sft", *_PREFERENCES)


class Conversation(NamedTuple):
    """A row as training reads it."""

    messages: list[Message]  # the last is the answer, the chosen one where there are several
    rejected: list[str]
    learned: bool  # whether the answer is to be learned: not with KTO's label false

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def text(self) -> Text:
        """What is compared to find duplicates. Rows with different system prompts are of different kinds."""
        system = self.messages[0]["content"] if self.messages[0]["role"] == "system" else ""
        before = "\n".join(message["content"] for message in self.messages[:-1] if message["role"] != "system")
        kind = f"{self.learned} {asked_dialect(self.question)} {fold(system)}"
        return Text.of(before, "\n".join([self.answer, *self.rejected]), kind)


def known_method(method: str) -> None:
    """Raise ConfigurationError where there is no such method; "" is fine."""
    if method and method not in _METHODS:
        raise ConfigurationError(f"--method {method}: unknown method; choose one of {', '.join(_METHODS)}")


def method_of(values: dict[str, Any]) -> str:
    """The method that rows of these columns are for, cpo for all pairs; "" where there is none."""
    layout = recognise(values)
    if layout is None:
        return ""
    return "cpo" if "cpo" in layout.methods else layout.methods[0]


def read_row(values: dict[str, Any], method: str) -> Conversation:
    """The row's conversation.

    Raises:
        RowError: the row cannot be trained on.
    """
    if method == "sft":
        return Conversation(to_conversation(values), [], True)
    preference = _PREFERENCES[method](values)
    answer = {"role": "assistant", "content": preference.answers[0]}
    return Conversation([*preference.prompt, answer], preference.answers[1:], preference.label)
