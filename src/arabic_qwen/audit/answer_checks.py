"""What can be wrong with an answer to its prompt. Precision goes before recall."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import lru_cache

from arabic_qwen.audit.text_checks import Found, around
from arabic_qwen.text.normalization import fold
from arabic_qwen.text.scripts import names_other_language, outside_brackets, script_shares
from arabic_qwen.text.spans import hide_spans

#: Of a row's letters, at least; of a row with at least `_FEW_LETTERS`.
MIN_ARABIC = 0.1
_FEW_LETTERS = 20
_OTHER_LETTER = re.compile("[A-Za-z\u00aa\u00b5\u00ba-\u05ff\u0700-\u074f\u0780-\u086f\u0900-\ud7ff\uf900-\ufb4f]")

# Folded spellings, since prompts are folded before they are searched.
_CODE_WORDS = re.compile(
    r"كود|شيفر|برنامج|برمج|بايثون|جافا|سكريبت|استعلام|امر|اوامر|معادل|صيغ|رمز|code|python|java|sql|script|regex|json|linux|bash",
    re.IGNORECASE,
)
# "into / in Arabic", "into / in the Egyptian dialect": what the answer is to be written in
_ASKS_ARABIC = re.compile(
    r"(?<!\w)(?:(?:الي|بال?|لل?)\s*(?:ال)?(?:لغه\s+|لهجه\s+|عاميه\s+)?(?:ال)?(?:عربي|عربيه|فصحي|دارجه)(?!\w)|(?:in|to|into)\s+(?:\w+\s+)?arabic\b|darija)",
    re.IGNORECASE,
)
_TRANSLATES = re.compile(r"ترجم|translat|حو[ّ]?ل", re.IGNORECASE)
_ENGLISH_OR_FRENCH = re.compile(
    r"\b(?:the|is|are|of|and|to|in|that|for|with|this|you|les?|des|est|une?|dans|pour|que|avec)\b", re.IGNORECASE
)
_LATIN_WORD = re.compile(r"[A-Za-zÀ-ÿ]{2,}")
_FOREIGN = {
    "Han": r"[\u3400-\u4dbf\u4e00-\u9fff]+",
    "Hiragana": r"[\u3040-\u309f]+",
    "Hangul": r"[\uac00-\ud7af]+",
    "Cyrillic": r"[\u0400-\u04ff]{2,}",  # a single letter is a symbol
}
_ANY_FOREIGN = re.compile("|".join(_FOREIGN.values()))


def answer_findings(prompt: str, answer: str, context: str) -> Iterator[Found]:
    """What is wrong with the answer; `context` is the prompt and all that was said before it."""
    asked = fold(context)
    yield from _script(asked, prompt, answer)
    yield from _refusal(asked, answer)
    yield from _leak(asked, prompt, answer)


def _script(asked: str, prompt: str, answer: str) -> Iterator[Found]:
    """`asked` is folded text."""
    if not _OTHER_LETTER.search(answer) or names_other_language(asked):
        return
    shares = script_shares(answer)
    arabic = shares.get("Arabic", 0.0)
    if arabic >= 0.5:
        match = _ANY_FOREIGN.search(outside_brackets(answer)) if shares.keys() & _FOREIGN.keys() else None
        if match and not _ANY_FOREIGN.search(asked):
            name = next(script for script, pattern in _FOREIGN.items() if re.match(pattern, match[0]))
            yield Found("wrong_script", f"{name} letters in an Arabic answer", around(answer, *match.span()))
        return
    prose, _ = hide_spans(answer)
    letters = sum(map(str.isalpha, prose))
    if arabic > 0.3 or letters < 10:
        return
    if demanded := _ASKS_ARABIC.search(asked):
        known = {word.lower() for word in _LATIN_WORD.findall(prompt)}  # names, which need no translation
        words = _LATIN_WORD.findall(prose)
        new = sum(word.lower() not in known for word in words)
        wrong = new >= 3 or 2 * new > len(words) or "Latin" not in shares
    else:
        sentence = len(_ENGLISH_OR_FRENCH.findall(prose)) >= 3 or shares.get("Latin", 0) < 0.5
        wrong = (
            sentence
            and letters >= 40
            and script_shares(prompt).get("Arabic", 0) > 0.7
            and not (_CODE_WORDS.search(asked) or _TRANSLATES.search(asked))
        )
    if wrong:
        why = "Arabic is asked for" if demanded else "the question is in Arabic"
        script = next(iter(shares))
        yield Found("wrong_script", f"{shares[script]:.0%} {script} letters, but {why}", around(answer, 0, 60))


def too_little_arabic(texts: list[str]) -> Found | None:
    """Less than MIN_ARABIC of the row's letters."""
    if not any(map(_OTHER_LETTER.search, texts)):
        return None
    letters = [(len(text), script_shares(text)) for text in texts]
    total = sum(length for length, shares in letters if shares)
    if total < _FEW_LETTERS:
        return None
    share = sum(length * shares.get("Arabic", 0.0) for length, shares in letters) / total
    if share >= MIN_ARABIC:
        return None
    return Found("little_arabic", f"{share:.0%} Arabic letters", around(texts[-1], 0, 60))


_BEGINNING = 160  # letters of an answer within which a refusal comes
_REFUSAL = re.compile(
    r"""
    \bas\ an?\ (?:ai|artificial\ intelligence)\b | \bas\ a\ (?:large\ )?language\ model | \bi'?m\ (?:just\ )?an\ ai\b
  | \bi(?:'m|\ am)\ (?:sorry|afraid),?\ (?:but\ )?i\ (?:can'?t|cannot|am\ unable\ to|am\ not\ able\ to)
  | \A\W*i\ (?:can'?t|cannot|am\ unable\ to)\ (?:assist|help|provide|fulfill|comply|answer)
  | (?:\bك|بصفتي\ |بوصفي\ |باعتباري\ |لكوني\ |انا\ (?:مجرد\ )?)
    (?:نموذج\ (?:ال)?(?:لغ|ذكاء)|نموذجا?\ لغوي|ذكاء\ اصطناعي|مساعدا?\ (?:ذكاء|افتراضيا?\ |ذكيا?\ ))
  | (?:لا\ (?:استطيع|يمكنني|اقدر)|لست\ قادرا\ علي|ليس\ (?:بامكاني|بوسعي)|ما\ (?:اقدر|بقدر)|مش\ (?:هقدر|قادر))\ (?:ان\ )?
    (?:مساعدتك|المساعده|ا?ساعدك|تقديم\ (?:المساعده|هذ|مثل)|الاجابه\ (?:علي|عن)\ (?:هذ|سؤال)|تلبيه|تنفيذ\ (?:هذا\ )?(?:ال)?طلب)
  | \A\W*(?:عذرا|اسف|اعتذر|المعذره|للاسف)\W+(?:ولكن\ |لكن\ |لكنني\ |ولكنني\ |فانا\ )?(?:لا\ (?:استطيع|يمكنني)|لست\ قادرا)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ABOUT_ITSELF = re.compile(
    r"من انت|هل انت|انت (?:روبوت|نموذج|انسان|بشر)|عن نفسك|ما اسمك|who are you|are you|your name|language model|نموذج|نماذج|ذكاء اصطناعي|الذكاء",
    re.IGNORECASE,
)


def _refusal(asked: str, answer: str) -> Iterator[Found]:
    match = _REFUSAL.search(fold(answer)[:_BEGINNING])
    if match and not _ABOUT_ITSELF.search(asked) and not _TRANSLATES.search(asked):
        yield Found("refusal", "the answer refuses in a model's stock words", around(answer, 0, 60))


_TURN = re.compile(
    r"^[ \t*#]*(?:User|Human|Assistant|Instruction|المستخدم|المساعد|الإنسان|التعليمات)[ \t*]*:", re.MULTILINE
)
_NEXT_QUESTION = re.compile(r"^[ \t]*#{2,4}[ *]*(?:السؤال|Question)[ *]*:", re.MULTILINE)
_ASKS_FOR_QUESTIONS = re.compile(
    r"سوال|سؤال|اسئل|اختبار|امتحان|تمرين|تمارين|question|quiz|exam|exercise", re.IGNORECASE
)
_DIALOGUE = re.compile(
    r"حوار|محادث|دردش|سيناريو|مسرحي|مشهد|مقابل|dialog|conversation|chat|script|scene|interview|human|user|مستخدم|مساعد|روبوت",
    re.IGNORECASE,
)
_SHORT_PROMPT = 25  # letters: a short question may well come back as a heading or the first words


def _leak(asked: str, prompt: str, answer: str) -> Iterator[Found]:
    question = fold(prompt)
    if len(question) >= _SHORT_PROMPT:
        said = fold(answer)
        if said.startswith(question) and len(said) > len(question) + 10:
            yield Found("prompt_leak", "the answer begins with the prompt", around(answer, 0, 60))
            return
    for turn, is_asked in ((_TURN, _DIALOGUE), (_NEXT_QUESTION, _ASKS_FOR_QUESTIONS)):
        if ":" in answer and (match := turn.search(answer)) and not is_asked.search(asked):
            yield Found("prompt_leak", "the answer holds another turn", around(answer, *match.span()))


_PUNCTUATION = re.compile(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)")  # not 3.5
_LONG = 30  # words; in a shorter answer one other word is another answer
_SIMILAR = 0.97


_ABOUT_SPELLING = re.compile(
    r"املاء|تشكيل|شكل|همز|صحح|دقق|ترقيم|اخطاء|spell|diacriti|punctuat|correct|proofread", re.IGNORECASE
)


def nearly_equal(prompt: str, chosen: str, rejected: list[str]) -> Found | None:
    """A rejected answer that says, or nearly says, what the chosen one does; unless spelling is what it is about."""
    if _ABOUT_SPELLING.search(fold(prompt)):
        return None
    mine = _words(chosen)
    for answer in rejected:
        theirs = _words(answer)
        if mine == theirs:
            return Found("nearly_equal_answers", "they differ in spelling or punctuation only", around(chosen, 0, 60))
        if min(len(mine), len(theirs)) >= _LONG:
            common = (Counter(mine) & Counter(theirs)).total()  # an upper bound of the ratio, and cheap
            total = len(mine) + len(theirs)
            if (
                2 * common >= _SIMILAR * total
                and (ratio := SequenceMatcher(None, mine, theirs, False).ratio()) >= _SIMILAR
            ):
                return Found("nearly_equal_answers", f"{ratio:.0%} of their words are equal", around(chosen, 0, 60))
    return None


def _words(text: str) -> list[str]:
    return _PUNCTUATION.sub(" ", fold(text)).split()


_DIALECT_NAMES = {
    "EGY": "مصري|مصريه|egyptian",
    "LEV": "شامي|شاميه|سوري|سوريه|لبناني|لبنانيه|اردني|اردنيه|فلسطيني|فلسطينيه|levantine|syrian|lebanese|jordanian|palestinian",
    "GLF": "خليجي|خليجيه|سعودي|سعوديه|كويتي|كويتيه|اماراتي|اماراتيه|قطري|قطريه|gulf|saudi|kuwaiti|emirati",
    "MAG": "مغربي|مغربيه|جزائري|جزائريه|تونسي|تونسيه|دارجه|darija|moroccan|algerian|tunisian|maghrebi",
    "IRQ": "عراقي|عراقيه|iraqi",
    "MSA": "فصحي|فصيح|فصيحه|msa|modern standard",
}
_NAMED = {
    dialect: re.compile(
        rf"(?<!\w)و?(?:(?:الي|ب|ل)\s*(?:ال)?(?:ل?(?:لهجه|عاميه|عربيه|لغه|دارجه)\s+)*(?:ال)?(?:عربيه\s+|عاميه\s+|دارجه\s+)?(?:ال)?|"
        rf"\b(?:in|to|into)\s+(?:the\s+)?)(?:{names})(?!\w)",
        re.IGNORECASE,
    )
    for dialect, names in _DIALECT_NAMES.items()
}
_MEANING = re.compile(r"معني|تعني|يعني|مرادف|كلمه|لماذا|\bmean", re.IGNORECASE)


@lru_cache(maxsize=4000)
def asked_dialect(prompt: str) -> str | None:
    """The one dialect that the prompt asks the answer to be in: "إلى العربية المصرية", "بالدارجة", "in Gulf Arabic"."""
    asked = fold(prompt)[:300]
    if _MEANING.search(asked):
        return None
    named = [dialect for dialect, pattern in _NAMED.items() if pattern.search(asked)]
    return named[0] if len(named) == 1 else None
