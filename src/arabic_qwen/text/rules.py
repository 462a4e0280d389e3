"""The rules of normalisation, one table a profile. Order within a table is the order of application."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

Setting = bool | str
Function = Callable[[str], str]

TATWEEL = "\u0640"
ZWNJ_ZWJ = "\u200c\u200d"

# Insides of regular expression character classes.
TANWIN_SHADDA = "\u064b-\u064d\u0651"
VOWELS = "\u064e-\u0650\u0652\u0656-\u065f\u0670"  # short vowels, sukun, dagger alef, and rarer vowel signs
QURANIC = "\u0610-\u061a\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u0898-\u089f\u08ca-\u08e1\u08e3-\u08ff"
HAMZA_MADDA = "\u0653-\u0655"  # combining: parts of the letters آ أ إ ؤ ئ, not diacritics
MARKS = TANWIN_SHADDA + VOWELS + QURANIC + HAMZA_MADDA
INVISIBLE = "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u206f\ufeff"
# The Arabic blocks without digits and noncharacters.
ARABIC = "\u0600-\u065f\u066a-\u06ef\u06fa-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc"

# U+FDF0–FDFF are words and phrases written as one sign (ﷲ ﷺ ﷻ ﷽ ﷼), not ways to draw letters. The isolated forms of
# diacritics are a space and a mark in NFKC; the space would split the word, so only the mark is taken.
PRESENTATION = {
    char: mapped
    for char in map(chr, (*range(0xFB50, 0xFDF0), *range(0xFE70, 0xFEFD)))
    if (mapped := unicodedata.normalize("NFKC", char).strip(" ")) != char
}

# Persian and Urdu ک and ی are spelling in their own languages. A line is taken for one of these when it has a letter
# that Arabic and its dialects never use, or a Persian word that is none in Arabic.
_WORD = rf"\w{MARKS}{ZWNJ_ZWJ}"
_OTHER_LANGUAGE = re.compile(
    "[\u0672-\u067d\u067f-\u0685\u0687-\u069b\u069d-\u06a3\u06a6\u06ab\u06ae\u06b0-\u06bd\u06bf-\u06cb\u06cd-\u06d5]"
    rf"|(?<![{_WORD}])(?:(?:که|از|است|نیست|هستند|دارد)(?![{_WORD}])|ن?می\u200c)"
)
_JOINERS = re.compile(f"(?<=[{ARABIC}])[{ZWNJ_ZWJ}]+|(?<![{ZWNJ_ZWJ}])[{ZWNJ_ZWJ}]+(?=[{ARABIC}])")
_NO_LETTER_BEFORE = rf"(?<![^\W\d_])(?<![{MARKS}{ZWNJ_ZWJ}])"
_NO_LETTER_AFTER = rf"(?![^\W\d_]|[{MARKS}{ZWNJ_ZWJ}])"
_TATWEEL = re.compile(f"{_NO_LETTER_BEFORE}ه{TATWEEL}+{_NO_LETTER_AFTER}|{TATWEEL}+")
_PRESENTATION = re.compile("[\ufb50-\ufdef\ufe70-\ufefc]")
_REPEATS = re.compile("([اآويی])\\1{2,}|([\u0620-\u063f\u0641-\u064a\u0671-\u06d3])\\2{3,}")
_NO_SPACE = re.compile(r"\S+")
_LATIN = re.compile("[A-Za-z]")


@dataclass(frozen=True)
class Rule:
    """One rule: `settings` maps each value that its switch takes to the function it means, None for no change."""

    name: str
    default: Setting
    settings: Mapping[Setting, Function | None]
    description: str
    reason: str


def presentation_forms(text: str) -> str:
    return _PRESENTATION.sub(lambda match: PRESENTATION.get(match[0], match[0]), text)


def strip_tatweel(text: str) -> str:
    """Without tatweel, except one after a heh that no letter touches: the sign هـ of Hijri years and of lists."""
    if "هـ" not in text:
        return text.replace(TATWEEL, "")
    return _TATWEEL.sub(lambda match: "هـ" if match[0][0] == "ه" else "", text)


def in_other_language(text: str) -> bool:
    """Whether the text has a letter or word that Arabic lacks and Persian, Urdu, Kurdish or the like have."""
    return bool(_OTHER_LANGUAGE.search(text))


def in_arabic_lines(change: Function, text: str) -> str:
    """`change` applied to the lines that are not Persian, Urdu, Kurdish or the like."""
    if not in_other_language(text):
        return change(text)
    return "\n".join(line if in_other_language(line) else change(line) for line in text.split("\n"))


def strip_joiners(text: str) -> str:
    """Without zero-width (non-)joiners beside Arabic characters; those within emoji and other scripts stay."""
    present = any(joiner in text for joiner in ZWNJ_ZWJ)
    return in_arabic_lines(partial(_JOINERS.sub, ""), text) if present else text


def arabic_letters(text: str) -> str:
    return in_arabic_lines(fold_letters, text) if "ک" in text or "ی" in text else text


def arabic_digits(text: str) -> str:
    """Arabic-Indic digits, except in words with Latin letters (Qwen2.5, 5GB)."""
    text = text.translate(EXTENDED_TO_ARABIC)
    return _NO_SPACE.sub(
        lambda match: match[0] if _LATIN.search(match[0]) else match[0].translate(ASCII_TO_ARABIC), text
    )


def shorten_repeats(text: str) -> str:
    """راااائع → رائع, هههههه → ههه: no word has a long vowel three times in a row, or another letter four times."""
    return _REPEATS.sub(lambda match: match[1] or match[2] * 3, text)


def nfkc(text: str) -> str:
    if unicodedata.is_normalized("NFKC", text):
        return text
    return unicodedata.normalize("NFKC", presentation_forms(text))


def delete(characters: str) -> Function:
    return partial(re.compile(f"[{characters}]+").sub, "")


def replace(old: str, new: str) -> Function:
    """Each character of `old` becomes the one at its place in `new`. For a few characters, faster than translate."""
    pairs = list(zip(old, new, strict=True))

    def function(text: str) -> str:
        for before, after in pairs:
            text = text.replace(before, after)
        return text

    return function


def switch(function: Function) -> dict[Setting, Function | None]:
    return {True: function, False: None}


ASCII_DIGITS = "0123456789"
ARABIC_DIGITS = "٠١٢٣٤٥٦٧٨٩"
EXTENDED_DIGITS = "۰۱۲۳۴۵۶۷۸۹"
EXTENDED_TO_ARABIC = str.maketrans(EXTENDED_DIGITS, ARABIC_DIGITS)
ASCII_TO_ARABIC = str.maketrans(ASCII_DIGITS, ARABIC_DIGITS)

nfc = partial(unicodedata.normalize, "NFC")
fold_letters = replace("کی", "كي")
ascii_digits = replace(ARABIC_DIGITS + EXTENDED_DIGITS + "٫٬", ASCII_DIGITS * 2 + ".,")

TRAIN = (
    Rule(
        "nfc",
        True,
        switch(nfc),
        "Unicode normal form C: a letter and its combining hamza or madda become one character",
        "Qwen's tokenizer does the same; data that is not NFC differs from what the model sees and writes",
    ),
    Rule(
        "presentation_forms",
        True,
        switch(presentation_forms),
        "ﻣﺮﺣﺒﺎ → مرحبا: glyph codes (U+FB50–FDEF, U+FE70–FEFC) become letters; ﷺ ﷲ ﷻ ﷽ (U+FDF0–FDFF) stay",
        "text from PDFs and old editors; 6.5 tokens a word instead of 2.1",
    ),
    Rule(
        "invisible",
        True,
        switch(delete(INVISIBLE)),
        "direction marks and isolates, zero-width space, byte order mark, soft hyphen, word joiner: removed",
        "left over from web pages and editors; a direction mark after each word makes 4.1 tokens a word",
    ),
    Rule(
        "tatweel",
        True,
        switch(strip_tatweel),
        "مـــرحبا → مرحبا; a single one stays in هـ that stands alone (1446هـ, «هـ) …»)",
        "stretches the line, not the meaning; 3.1 tokens a word",
    ),
    Rule(
        "diacritics",
        "keep",
        {
            "keep": None,
            "strip": delete(TANWIN_SHADDA + VOWELS + QURANIC),
            "partial": delete(VOWELS + QURANIC),
        },
        '`"strip"` removes all; `"partial"` keeps shadda and tanwin, removes short vowels, sukun, dagger alef '
        "and Quranic marks",
        "they carry meaning, so they stay; fully diacritised text costs 6.9 tokens a word. Shadda and tanwin are what "
        "writers put where a word would be misread (درّس, علمٌ)",
    ),
    Rule(
        "digits",
        "keep",
        {"keep": None, "ascii": ascii_digits, "arabic": arabic_digits},
        '`"ascii"`: ٣٫١٤ → 3.14; `"arabic"`: 2024 → ٢٠٢٤, but not in words with Latin letters (Qwen2.5)',
        "both are right, by country; a model should answer in the user's digits",
    ),
    Rule(
        "joiners",
        True,
        switch(strip_joiners),
        "zero-width joiners and non-joiners beside Arabic letters removed; kept in emoji and in Persian lines",
        "no Arabic spelling has them; می‌خواهم and 👨‍👩‍👧 do",
    ),
    Rule(
        "letters",
        True,
        switch(arabic_letters),
        "ک → ك, ی → ي in Arabic lines; چ گ پ ڤ stay; lines in Persian, Urdu, Kurdish stay",
        "typed on a Persian keyboard: looks the same, reads as another word at 2.7 tokens a word",
    ),
    Rule(
        "repeats",
        False,
        switch(shorten_repeats),
        "راااائع → رائع (three or more of ا آ و ي), هههههه → ههه (four or more of any other letter)",
        "emphasis and laughter of social media, which a chat model may well learn",
    ),
)

COMPARE = (
    Rule(
        "nfkc",
        True,
        switch(nfkc),
        "Unicode normal form KC: glyph codes, ligatures (ﷺ too), full-width forms and special spaces",
        "what is drawn alike or reads alike is equal",
    ),
    Rule(
        "invisible",
        True,
        switch(delete(INVISIBLE + ZWNJ_ZWJ + "\u180e\u2061-\u2064\ufe0e\ufe0f\ufff9-\ufffb")),
        "all format characters and emoji variation selectors removed",
        "cannot be seen",
    ),
    Rule(
        "diacritics",
        True,
        switch(delete(TANWIN_SHADDA + VOWELS + QURANIC)),
        "all diacritics and Quranic marks removed, dagger alef (U+0670) too",
        "optional in writing",
    ),
    Rule("tatweel", True, switch(lambda text: text.replace(TATWEEL, "")), "removed everywhere", "optional in writing"),
    Rule("alef", True, switch(replace("أإآٱ", "اااا")), "أ إ آ ٱ → ا", "often written without hamza"),
    Rule("alef_maksura", True, switch(replace("ى", "ي")), "ى → ي", "Egyptian spelling writes both as ى"),
    Rule("teh_marbuta", True, switch(replace("ة", "ه")), "ة → ه", "often written without dots"),
    Rule("letters", True, switch(fold_letters), "ک → ك, ی → ي", "Persian keyboards"),
    Rule("digits", True, switch(ascii_digits), "٣ and ۳ → 3, ٫ → . and ٬ → ,", "by country"),
    Rule(
        "punctuation",
        True,
        switch(replace("،؛؟٪۔٭«»„“”‟‹›‘’‚‛‐‑‒–—―−", ",;?%.*" + '"' * 6 + "'" * 6 + "-" * 7)),
        "، ؛ ؟ ٪ ۔ ٭, quotation marks and dashes become ASCII",
        "by keyboard",
    ),
    Rule(
        "whitespace",
        True,
        switch(lambda text: " ".join(text.split())),
        "runs of white space become one space; none at the ends",
        "layout",
    ),
)

#: Settings of profile `train` that leave a text as it is.
OFF: dict[str, Any] = {
    rule.name: setting for rule in TRAIN for setting, function in rule.settings.items() if function is None
}

PROFILES = {"train": TRAIN, "compare": COMPARE}
