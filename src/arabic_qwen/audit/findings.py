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
    arabic: str  # the title on the page
    remedy: str
    fixed: bool = False  # whether `data fix` repairs it


CODES = {
    "broken_row": Code("error", "broken row", "صفّ معطوب", "correct or remove the row"),
    "empty_answer": Code("error", "empty answer", "إجابة فارغة", "write the answer or remove the row"),
    "placeholder_answer": Code(
        "error", "placeholder instead of an answer", "نصّ نائب بدل الإجابة", "write the answer or remove the row"
    ),
    "stringified_messages": Code(
        "warning", "messages stored as a string", "رسائل مخزّنة نصًّا", "store a list of messages", True
    ),
    "translated_role": Code(
        "warning", "role name in Arabic or translated", "اسم دور مترجم", "system, user, assistant", True
    ),
    "swapped_roles": Code("error", "user and assistant swapped", "دوران متبادلان", "swap the roles, or add the answer"),
    "missing_end_of_turn": Code(
        "error", "conversation without its last answer", "محادثة بلا إجابة أخيرة", "end it with an answer"
    ),
    "equal_answers": Code("error", "chosen and rejected are the same", "المختارة والمرفوضة سواء", "remove the row"),
    "nearly_equal_answers": Code(
        "warning",
        "chosen and rejected are nearly the same",
        "المختارة والمرفوضة متقاربتان",
        "see whether they differ in quality",
    ),
    "mojibake": Code("error", "text in a wrong encoding (Ø§Ù„)", "ترميز خاطئ", "decode it again", True),
    "duplicate": Code("warning", "duplicate", "مكرّر", "keep one of them", True),
    "near_duplicate": Code("warning", "nearly a duplicate", "شبه مكرّر", "keep one of them"),
    "duplicate_across_files": Code("warning", "in two files", "مكرّر بين ملفّين", "remove it from the training set"),
    "near_duplicate_across_files": Code(
        "warning", "nearly the same in two files", "شبه مكرّر بين ملفّين", "remove it from the training set"
    ),
    "template_tokens": Code(
        "warning", "tokens of a chat template in the text", "رموز قالب المحادثة في النصّ", "remove them", True
    ),
    "code_fence": Code("warning", "translated or broken code fence", "شيفرة مترجمة أو مكسورة", "restore the code"),
    "html": Code("warning", "raw HTML", "وسوم HTML", "convert it to text or Markdown", True),
    "presentation_forms": Code("warning", "glyph codes instead of letters", "أشكال عرض بدل الحروف", "normalise", True),
    "tatweel": Code("warning", "tatweel", "تطويل", "normalise", True),
    "bidi_controls": Code("warning", "invisible direction marks", "علامات اتّجاه خفيّة", "normalise", True),
    "unk_token": Code("warning", "<unk> or a replacement character", "رمز مجهول", "restore the text"),
    "wrong_script": Code("warning", "answer in another script than asked", "إجابة بكتابة أخرى", "check the answer"),
    "little_arabic": Code("warning", "too little Arabic", "عربيّة قليلة", "check whether the row belongs here"),
    "refusal": Code("warning", "refusal boilerplate", "عبارة رفض جاهزة", "check whether the refusal is meant"),
    "prompt_leak": Code(
        "warning", "prompt repeated in the answer", "السؤال مكرّر في الإجابة", "remove it from the answer"
    ),
    "dialect_mismatch": Code("warning", "answer in another dialect than asked", "إجابة بلهجة أخرى", "check the answer"),
}
