"""What can be wrong with a text by itself, whoever says it. Precision goes before recall."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from arabic_qwen.text.encoding import mojibake_share, repair_mojibake
from arabic_qwen.text.rules import INVISIBLE, MARKS, PRESENTATION, TATWEEL
from arabic_qwen.text.spans import PLACEHOLDER, hide_spans

_EXAMPLE = 70  # characters
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # a terminal would obey them


class Found(NamedTuple):
    """Something found in a text."""

    code: str
    message: str
    example: str
    level: str = ""  # where it is not the code's own


def around(text: str, start: int, end: int) -> str:
    """One line of the text around a place, cut with … ; code that was hidden is … too."""
    room = max(0, _EXAMPLE - (end - start)) // 2
    first, last = max(0, start - room), min(len(text), end + room, max(0, start - room) + 2 * _EXAMPLE)
    cut = " ".join(_CONTROL.sub(" ", text[first:last].replace(PLACEHOLDER, "…")).split())
    return ("… " if first else "") + cut + (" …" if last < len(text) else "")


_LETTER = "\u0620-\u063f\u0641-\u064a\u066e-\u06d3"
_GLYPHS = re.compile(f"[{''.join(map(re.escape, PRESENTATION))}]")
# Between two letters, or a run after one: a single one at a word's end is a prefix before a Latin word, or هـ.
_TATWEEL = re.compile(f"(?<=[{_LETTER}{MARKS}]){TATWEEL}(?:{TATWEEL}|(?=[{MARKS}]*[{_LETTER}]))")
#: Texts without any of these normalising leaves as long as they are.
NORMALISED = re.compile(f"[{TATWEEL}{INVISIBLE}{''.join(map(re.escape, PRESENTATION))}]")
_INVISIBLE = re.compile(f"[{INVISIBLE}]")
_UNKNOWN = re.compile("<unk>|\\[UNK\\]|\ufffd|(?:\\?{3,} ){2,}\\?{3,}")  # ????? ???? ????: letters that a file lost
_SUSPECT = re.compile(f"[<&#\\[?\ufffd{TATWEEL}{INVISIBLE}{''.join(map(re.escape, PRESENTATION))}]")

# Control tokens of chat templates. <s> is also HTML's strike-through, so it counts at the ends of a text only.
TEMPLATE_TOKENS = re.compile(
    r"""
    <\|(?:im_start|im_end|endoftext|end_of_text|begin_of_text|start_header_id|end_header_id|eot_id|eom_id
        |system|user|assistant|end|endofprompt|prompter)\|>
  | </?(?:start_of_turn|end_of_turn|bos|eos)> | \[/?INST\] | <</?SYS>>
  | \A\s*<s> | </s>\s*\Z
    """,
    re.VERBOSE,
)
# Headings of the Alpaca template. They are ordinary Markdown too, but hardly at a text's beginning, nor a question and
# its answer together.
_ASKED, _ANSWERED = "Instruction|Human|التعليمات|التعليمة", "Response|Assistant|الاستجابة|الإجابة|الرد"
TEMPLATE_HEADING = re.compile(rf"\A\s*\#{{2,3}} *(?:{_ASKED}|{_ANSWERED}|Input|المدخلات|المدخل) *: *$", re.MULTILINE)
WHOLE_TEMPLATE = re.compile(
    rf"^\#{{2,3}} *(?:{_ASKED}) *: *$.*?^\#{{2,3}} *(?:{_ANSWERED}) *: *$", re.MULTILINE | re.DOTALL
)

_LONG_TAGS = "div|span|strong|em|ul|ol|li|table|thead|tbody|tr|td|th|h[1-6]|img|font|center|blockquote|hr|br|script|style|ref|nowiki|iframe"
#: Tags and entities of HTML. Tags of one letter count in pairs only: a < b > c, List<T>.
HTML = re.compile(
    rf"""
    </?(?:{_LONG_TAGS})(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>
  | <p(?:\s+[\w:-]+\s*=[^<>]*)?> (?=.*</p>) | </p>
  | <([abiu])(?:\s+[\w:-]+\s*=[^<>]*)?> (?=.*</\1>) | </[abiu]>
  | &(?:nbsp|amp|lt|gt|quot|apos|raquo|laquo|ndash|mdash|hellip|zwnj|zwj|rlm|lrm|\#\d{{2,6}}|\#[xX][\da-fA-F]{{2,5}});
    """,
    re.VERBOSE | re.DOTALL,
)
_TRANSLATES = re.compile("ترجم|translat", re.IGNORECASE)
_ABOUT_HTML = re.compile(r"html|xml|css|svg|javascript|markup|\bweb|\btags?\b|ويب|وسم|وسوم", re.IGNORECASE)


def text_findings(text: str, speaker: str) -> Iterator[Found]:
    """What is wrong with the text of `speaker` ("answer", say)."""
    if (share := mojibake_share(text)) > 0:
        message = f"{share:.0%} of the {speaker} was read in a wrong encoding"
        yield Found("mojibake", message, around(text, 0, _EXAMPLE), "warning")
    if "`" in text or "~~~" in text:
        yield from _code(text, speaker)
    prose, _ = hide_spans(text)
    if not _SUSPECT.search(prose):
        return
    for code, pattern, message in (
        ("presentation_forms", _GLYPHS, "glyph codes in the {}"),
        ("tatweel", _TATWEEL, "tatweel in the {}"),
        ("bidi_controls", _INVISIBLE, "invisible characters in the {}, the first U+{:04X}"),
        ("unk_token", _UNKNOWN, "a character or word was lost in the {}"),
        ("template_tokens", TEMPLATE_TOKENS, "the {} holds a chat template's tokens"),
        ("template_tokens", TEMPLATE_HEADING, "the {} begins with a chat template's heading"),
        ("template_tokens", WHOLE_TEMPLATE, "the {} holds a chat template"),
    ):
        if match := pattern.search(prose):
            # The tokenizers of all models here have these, and training refuses rows with them.
            level = "error" if match[0] in ("<|im_start|>", "<|im_end|>", "<|endoftext|>") else ""
            yield Found(code, message.format(speaker, ord(match[0][0])), around(prose, *match.span()), level)


_ENCODING = re.compile(
    r"ترميز|يونيكود|encod|decod|charset|mojibake|unicode|\b(?:utf|latin|windows|iso)-?\d|\bcp-?125|\bascii\b",
    re.IGNORECASE,
)


def about_encoding(prompts: Iterable[str], answers: Iterable[str]) -> bool:
    """Whether wrongly decoded text in the prompts is meant: they ask about encodings, or the answer is the right text."""
    question = "\n".join(prompts)
    repaired = repair_mojibake(question)
    return repaired != question and (
        _ENCODING.search(question) is not None
        or any(text.strip() in repaired and text.strip() not in question for text in answers)
    )


def html_finding(texts: list[str]) -> Found | None:
    """HTML in the texts of one row, unless they are about it, or a translation keeps it as it is."""
    hidden = [hide_spans(text)[0] for text in texts if "<" in text or "&" in text]
    found = [(prose, match) for prose in hidden if (match := HTML.search(prose))]
    if not found or any(_ABOUT_HTML.search(text) for text in texts):
        return None
    kept = [sorted(match[0] for match in HTML.finditer(prose)) for prose in hidden]
    if len(found) == len(texts) > 1 and all(tags == kept[0] for tags in kept) and _TRANSLATES.search(texts[0]):
        return None
    prose, match = found[0]
    return Found("html", f"{match[0].replace(PLACEHOLDER, '…')[:20]} in the text", around(prose, *match.span()))


_FENCE = re.compile(r"^[ \t>*-]*(`{3,}|~{3,})[ \t]*([^`\n]*)$", re.MULTILINE)
_ARABIC_NAME = re.compile(f"[{_LETTER}]+$")
_LANGUAGES = "بايثون|بيثون|جافا|جافاسكربت|جافاسكريبت|سي|باش|قذيفة|كود|شيفرة|برمجة|إس كيو إل|جيسون|اتش تي ام ال"
_NO_CODE = ("text", "txt", "md", "markdown", "plaintext", "plain", "mermaid", "latex", "tex")
_QUOTED_OR_COMMENT = re.compile(
    r"""
    \"{3}.*?\"{3} | '{3}.*?'{3} | /\*.*?\*/ | <!--.*?--> | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
  | (?:\#|//|--|%|;|\bREM\b)[^\n]*
    """,
    re.VERBOSE | re.DOTALL,
)
_TRANSLATED = re.compile(
    r"""
    (?<!\w)(?:طباعة|اطبع|مدى|نطاق|إدخال|طول)\(                                   # print( range( input( len(
  | ^[ \t]*(?:إذا|لكل|بينما|تعريف|وإلا|دالة|صنف|فئة)(?!\w)[^\n]*[:{][ \t]*$    # if … :
  | ^[ \t]*(?:استيراد|إرجاع|أرجع|ارجع)[ \t]+[A-Za-z_(]                         # import numpy
  | [\w)\]"'][،؛][ \t]*(?:[A-Za-z0-9_("'\[]|$)                                  # f(a، b)؛
    """,
    re.VERBOSE | re.MULTILINE,
)


def _code(text: str, speaker: str) -> Iterator[Found]:
    """A fence that is left open, and code that was translated with the text around it."""
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opened is None:
            opened = match
            name = match[2].strip()
            if _ARABIC_NAME.match(name) and re.fullmatch(_LANGUAGES, name):
                yield Found("code_fence", f"the language of code is translated in the {speaker}", match[0].strip())
                return
        elif match[1].startswith(opened[1]) and not match[2].strip():
            code = text[opened.end() + 1 : match.start()]
            if found := _translated(code, opened[2].strip().lower()):
                yield Found("code_fence", f"translated code in the {speaker}", around(code, *found.span()))
                return
            opened = None
    if opened and text.count("```") % 2:
        yield Found("code_fence", f"code is not closed in the {speaker}", around(text, *opened.span()))


def _translated(code: str, language: str) -> re.Match[str] | None:
    if language in _NO_CODE:
        return None
    bare = _QUOTED_OR_COMMENT.sub(lambda match: " " * len(match[0]), code)
    latin = sum(char.isascii() and char.isalpha() for char in bare)
    arabic = sum("\u0620" <= char <= "\u064a" for char in bare)
    if not language and latin <= arabic:
        return None  # a poem, a dialogue, a table
    return _TRANSLATED.search(bare)
