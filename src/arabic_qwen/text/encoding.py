"""Arabic text in a wrong character set: what bytes are in, and mojibake, found and decoded again."""

from __future__ import annotations

import re
from functools import lru_cache

#: A text with a greater `mojibake_share` cannot be trained on.
MOSTLY = 0.5

_LETTER = re.compile("[\u0620-\u064a]")
_VISIBLE = re.compile(r"\S")


def _bytes_of(encoding: str) -> dict[str, int]:
    """Character → byte, with bytes that the encoding leaves undefined as control characters, as browsers read them."""
    table = {chr(byte): byte for byte in range(0x80, 0xA0)}
    for byte in range(0x80, 0x100):
        char = bytes([byte]).decode(encoding, "ignore")
        if char:
            table[char] = byte
    return table


_CP1252, _CP1256 = _bytes_of("cp1252"), _bytes_of("cp1256")


def _class(table: dict[str, int], first: int, last: int) -> str:
    return "[" + re.escape("".join(char for char, byte in table.items() if first <= byte <= last)) + "]"


class _Utf8As:
    """UTF-8 that was read in an encoding of one byte a character: العربية → Ø§Ù„Ø¹Ø±Ø¨ÙŠØ©, ط§ظ„ط¹ط±ط¨ظٹط©.

    Args:
        table: of the encoding.
        meant: pattern of the characters that a wrong run may stand for.
    """

    def __init__(self, table: dict[str, int], meant: str):
        self._table = table
        self._meant = re.compile(f"{meant}+", re.DOTALL)
        following = _class(table, 0x80, 0xBF)
        arabic = _class(table, 0xD8, 0xDB) + following
        # Three letters in a row of this form mean nothing in any language.
        self._certain = re.compile(f"(?:{arabic}){{3}}")
        any_char = "|".join(
            _class(table, first, last) + following * count
            for first, last, count in ((0xC2, 0xDF, 1), (0xE0, 0xEF, 2), (0xF0, 0xF4, 3))
        )
        # In sound Arabic a letter and a sign look like such a pair in CP1256 (لماذا؟), but after other letters.
        self.run = re.compile(f"(?<![\u0620-\u0652])(?:{any_char})+")

    def found(self, text: str) -> bool:
        return self._certain.search(text) is not None

    def decode(self, run: str) -> str:
        try:
            decoded = bytes(map(self._table.__getitem__, run)).decode("utf-8")
        except ValueError:
            return run
        return decoded if self._meant.fullmatch(decoded) else run


class _Cp1256AsCp1252:
    """Arabic Windows text that was read as Western: السلام → ÇáÓáÇã."""

    # Letters whose codes are Arabic in CP1256, without those of French (à â ç è é ê ë î ï ô ù û ü, œ), which it keeps.
    _certain = re.compile("[ÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßáãäåæìíðñòóõö]{4}")
    run = re.compile(_class(_CP1252, 0x80, 0xFF) + "+")

    def found(self, text: str) -> bool:
        if not self._certain.search(text):
            return False
        western = [char for char in text if char in _CP1252 and char.isalpha()]
        alef_lam = sum(char in "Çá" for char in western)  # a quarter of Arabic text
        return 2 * len(western) > sum(map(str.isalpha, text)) and 8 * alef_lam > len(western)

    def decode(self, run: str) -> str:
        return bytes(map(_CP1252.__getitem__, run)).decode("cp1256")


# Arabic, signs and emoji, but no letters of other scripts, which sound Arabic may look like: أ، would be á.
_NO_OTHER_LETTERS = "[\u0600-\u06ff\ufb50-\ufeff\xa0«»°·×÷\u2000-\u2bff\U0001f000-\U0001faff]"
_MISTAKES: list[_Utf8As | _Cp1256AsCp1252] = [
    _Utf8As(_CP1252, "."),
    _Utf8As(_CP1256, _NO_OTHER_LETTERS),
    _Cp1256AsCp1252(),
]
_WESTERN = re.compile("[À-ÿ]")  # the first and the last need such letters


def likely_encoding(data: bytes) -> str | None:
    """The name that iconv has for what bytes are in that are no UTF-8; None where they do not tell."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    sound = len(_LETTER.findall(data.decode("utf-8", "ignore")))
    for name in ("WINDOWS-1256", "ISO-8859-6"):
        text = data.decode(name, "replace")
        letters = len(_LETTER.findall(text))
        # More of UTF-8 than a few bytes that happen to look so: a byte of it is damaged.
        if letters >= 3 and letters > 4 * sound and not re.search("[À-ÿ\x80-\x9f\ufffd]", text):
            return name
    return None


def repair_mojibake(text: str) -> str:
    """The text with wrongly decoded runs decoded again; the same text where there are none."""
    return _repair(text)[0]


@lru_cache(maxsize=1000)  # a row is read, and then checked
def mojibake_share(text: str) -> float:
    """The share of wrongly decoded characters in the text's visible ones."""
    changed = _repair(text)[1]
    return min(1.0, changed / len(_VISIBLE.findall(text))) if changed else 0.0


def _repair(text: str) -> tuple[str, int]:
    """The repaired text, and how many of its characters were wrong."""
    for mistake in _MISTAKES if _WESTERN.search(text) else _MISTAKES[1:2]:
        if not mistake.found(text):
            continue
        wrong = 0

        def decode(match: re.Match[str], mistake=mistake) -> str:
            nonlocal wrong
            decoded = mistake.decode(match[0])
            if decoded != match[0]:
                wrong += len(match[0])
            return decoded

        repaired = mistake.run.sub(decode, text)
        if len(_LETTER.findall(repaired)) >= 3:
            return repaired, wrong
    return text, 0
