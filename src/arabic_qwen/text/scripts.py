"""Which scripts a text is written in."""

from collections import Counter
from functools import lru_cache

import regex

from arabic_qwen.text.normalization import fold
from arabic_qwen.text.spans import PLACEHOLDER, hide_spans

# The scripts of most text on the web; letters of any other count as "Other".
SCRIPTS = (
    "Arabic",
    "Latin",
    "Han",
    "Cyrillic",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Greek",
    "Hebrew",
    "Devanagari",
    "Bengali",
    "Thai",
    "Tamil",
    "Armenian",
    "Georgian",
    "Ethiopic",
)
_SYMBOLS = ("Latin", "Greek")
_PATTERNS = {script: regex.compile(rf"\p{{Script={script}}}") for script in SCRIPTS}
_LETTER = regex.compile(r"\p{L}")
_OTHER_LANGUAGE = regex.compile(
    r"""
    انجليز|انكليز|فرنس|الماني|اسبان|ايطال|تركي|فارسي|روسي|صيني|الصين|ياباني|اليابان|كوري|هندي|اردي|اورد[وي]|عبري|لاتين|يونان
  | برتغال|هولند|سويدي|بولند|امازيغ|كردي|لغات|لغتين|اجنبي|عربيزي|فرانكو|كانجي
  | english|french|german|spanish|italian|turkish|persian|farsi|russian|chinese|mandarin|japan|china|korea|hindi|urdu
  | hebrew|latin|greek|portuguese|dutch|swedish|polish|tamazight|berber|kurdish|languages|arabizi
    """,
    regex.VERBOSE | regex.IGNORECASE,
)  # in folded spelling
_BRACKETED = regex.compile(r"\([^()\n]{1,60}\)|\[[^\[\]\n]{1,60}\]|（[^（）\n]{1,60}）")
_SHARED = regex.compile(r"[\p{Script=Common}\p{Script=Inherited}]")  # tatweel, ª, mathematical letters


def script_shares(text: str) -> dict[str, float]:
    """The share of each Unicode script in the text's letters, largest first: {"Arabic": 0.9, "Latin": 0.1}.

    Digits, punctuation, diacritics, emoji, code, URLs and e-mail addresses do not count; a text without letters gives
    an empty dict.
    """
    prose, _ = hide_spans(text)
    counts: Counter[str] = Counter()
    for char, count in Counter(prose.replace(PLACEHOLDER, "")).items():
        if script := letter_script(char):
            counts[script] += count
    return {script: count / counts.total() for script, count in counts.most_common()}


def arabic_share(text: str) -> float | None:
    """The share of Arabic letters in the text's letters, as `script_shares` counts them; None for no letters at all."""
    shares = script_shares(text)
    return shares.get("Arabic", 0.0) if shares else None


def leaked_scripts(prompt: str, answer: str) -> list[str] | None:
    """Scripts of an answer that its prompt did not ask for; None where it is not mostly Arabic or names a language.

    A script that the prompt has too is asked for, and what stands in brackets may be a name in its own spelling. Latin
    and Greek letters are also names, units and symbols, so these count where most of the answer is in them.
    """
    if (arabic_share(prompt) or 0) <= 0.5 or names_other_language(fold(prompt)):
        return None
    asked = {"Arabic", *script_shares(prompt)}
    shares = script_shares(outside_brackets(answer))
    return [script for script in shares if script not in asked and (script not in _SYMBOLS or shares[script] > 0.5)]


def names_other_language(folded: str) -> bool:
    """Whether a folded prompt names another language than Arabic, or a country for its language: it may ask for that."""
    return bool(_OTHER_LANGUAGE.search(folded))


def outside_brackets(text: str) -> str:
    """The text with spaces in place of what stands in brackets, such as the name in تولستوي (Толстой)."""
    return _BRACKETED.sub(lambda match: " " * len(match[0]), text)


@lru_cache(maxsize=100_000)
def letter_script(char: str) -> str | None:
    """The script of a letter, None for anything else."""
    if not _LETTER.match(char) or _SHARED.match(char):
        return None
    return next((script for script, pattern in _PATTERNS.items() if pattern.match(char)), "Other")
