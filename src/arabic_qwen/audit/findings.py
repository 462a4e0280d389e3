"""What `arabic-qwen data check` can find, and how bad each is."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["error", "warning"]


class Finding(NamedTuple):
    """One thing found in one row. An error makes the row unusable for training; the rest is for a person to judge."""

    code: str  # a key of CODES
    level: Level
    file: str
    line: int  # or the row's number, where the format has no lines
    message: str
    example: str = ""  # the text that it is about, cut short


class Code(NamedTuple):
    """A kind of finding."""

    level: Level
    title: str  # for tables
    remedy: str
    fixed: bool = False  # whether `data fix` repairs it


CODES = {
    "broken_row": Code("error", "broken row", "correct or remove the row"),
    "empty_answer": Code("error", "empty answer", "write the answer or remove the row"),
    "placeholder_answer": Code("error", "placeholder instead of an answer", "write the answer or remove the row"),
    "stringified_messages": Code("warning", "messages stored as a string", "store a list of messages", True),
    "translated_role": Code("warning", "role name in Arabic or translated", "system, user, assistant", True),
    "swapped_roles": Code("error", "user and assistant swapped", "swap the roles, or add the answer"),
    "missing_end_of_turn": Code("error", "conversation without its last answer", "end it with an answer"),
    "equal_answers": Code("error", "chosen and rejected are the same", "remove the row"),
    "nearly_equal_answers": Code(
        "warning", "chosen and rejected are nearly the same", "see whether they differ in quality"
    ),
    "mojibake": Code("error", "text in a wrong encoding (Ø§Ù„)", "decode it again", True),
    "duplicate": Code("warning", "duplicate", "keep one of them", True),
    "near_duplicate": Code("warning", "nearly a duplicate", "keep one of them"),
    "duplicate_across_files": Code("warning", "in two files", "remove it from the training set"),
    "near_duplicate_across_files": Code("warning", "nearly the same in two files", "remove it from the training set"),
    "template_tokens": Code("warning", "tokens of a chat template in the text", "remove them", True),
    "code_fence": Code("warning", "translated or broken code fence", "restore the code"),
    "html": Code("warning", "raw HTML", "convert it to text or Markdown", True),
    "presentation_forms": Code("warning", "glyph codes instead of letters", "normalise", True),
    "tatweel": Code("warning", "tatweel", "normalise", True),
    "bidi_controls": Code("warning", "invisible direction marks", "normalise", True),
    "unk_token": Code("warning", "<unk> or a replacement character", "restore the text"),
    "wrong_script": Code("warning", "answer in another script than asked", "check the answer"),
    "little_arabic": Code("warning", "too little Arabic", "check whether the row belongs here"),
    "refusal": Code("warning", "refusal boilerplate", "check whether the refusal is meant"),
    "prompt_leak": Code("warning", "prompt repeated in the answer", "remove it from the answer"),
    "dialect_mismatch": Code("warning", "answer in another dialect than asked", "check the answer"),
}
