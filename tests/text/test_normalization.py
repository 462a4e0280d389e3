"""Normalisation: what each rule does, what none may do, and what the report counts."""

import json
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.text.normalization import normalization_report, normalize, rules_table
from arabic_qwen.text.rules import PROFILES
from arabic_qwen.text.spans import hide_spans

OPTIONS = {"diacritics": ["keep", "strip", "partial"], "digits": ["keep", "ascii", "arabic"]}
SETTINGS = {
    profile: {
        rule.name: OPTIONS.get(rule.name, [True, False]) if profile == "train" else [True, False] for rule in rules
    }
    for profile, rules in PROFILES.items()
}

# What the rules are about, in bits that meet in every way.
BITS = [
    *"ابتثجحخدذرزسشصضطظعغفقكلمنهويءأإآٱؤئىةچگپڤکی",
    *"\u0640\u0640\u064b\u064e\u0651\u0652\u0653\u0654\u0655\u0670\u06d6",
    *"ہےژ ٠١۲3،؟.\n \u00a0",
    *"\u200b\u200c\u200d\u200e\u200f\u202b\u2067\u2069\ufeff\u00ad\ufe0f\ufdd0",
    *"ﷺﷲﷻﻻﻣﺮﹰﹱﱟﮎﯼ",
    *"aée\u0301K`@👨👩",
    *["``", "```", "https://", "www.", "a@b.c", "هـ", "که", "می\u200c", "ااا", "هههه", "Qwen2", "👩\u200d🔬"],
]
arabic = st.lists(st.sampled_from(BITS), max_size=25).map("".join)
switches = {
    profile: st.fixed_dictionaries({}, optional={n: st.sampled_from(v) for n, v in settings.items()})
    for profile, settings in SETTINGS.items()
}


def letters(text):
    """Letters in order, whatever they are composed with or stretched by; ک and ی as the letters they stand for."""
    decomposed = unicodedata.normalize("NFD", text).replace("ک", "ك").replace("ی", "ي")
    return [c for c in decomposed if unicodedata.category(c).startswith("L") and c != "\u0640"]


@pytest.mark.parametrize("profile", sorted(PROFILES))
@given(data=st.data(), text=arabic | st.text())
def test_idempotent_whatever_is_switched(profile, data, text):
    rules = data.draw(switches[profile])
    once = normalize(text, profile, **rules)
    assert normalize(once, profile, **rules) == once


@pytest.mark.parametrize(
    "text",
    [
        "``\u200b`ـ`",  # three backticks once the space is gone
        "http:\u200b//x کـ",  # a URL
        "ک\u200cه کتاب",  # a Persian word
        "ا\u200b\u0653لة",  # a letter and its madda
        "ب\u200dهـ",  # a letter before the heh
        "آآاا\u0653ا\u0653",
    ],
)
def test_idempotent_where_one_change_makes_room_for_another(text):
    opted_in = {"diacritics": "strip", "digits": "arabic", "repeats": True}
    for profile, rules in (("train", {}), ("train", opted_in), ("compare", {})):
        once = normalize(text, profile, **rules)
        assert normalize(once, profile, **rules) == once


@given(arabic | st.text())
def test_train_changes_no_letter_beyond_its_rules(text):
    text = "".join(c for c in text if not "\ufb50" <= c <= "\ufeff")
    assert letters(normalize(text)) == letters(text)


@given(arabic | st.text())
def test_train_keeps_digits_punctuation_diacritics_and_symbols(text):
    def kept(text):
        decomposed = unicodedata.normalize("NFD", text)
        return [c for c in decomposed if unicodedata.category(c)[0] in "NPSM" and not "\ufe70" <= c <= "\ufeff"]

    text = "".join(c for c in text if not "\ufb50" <= c <= "\ufdcf" and not "\ufe70" <= c <= "\ufeff")
    assert sorted(kept(normalize(text))) == sorted(kept(text))


@given(
    arabic, arabic, st.sampled_from(["`كـتاب\u200f`", "\n```\nﻣﺮﺣﺒﺎ کـ\n```\n", " https://a.b/کـ ", " مـ@شركة.كوم "])
)
def test_train_keeps_code_and_addresses(before, after, span):
    before, after = (re.sub(r"[`@\ufdd0]|www|\w+://", "", text) for text in (before, after))
    assert span.strip() in normalize(f"{before} {span} {after}")
    assert [s.strip() for s in hide_spans(normalize(f"{before} {span} {after}"))[1]] == [span.strip()]


@given(st.text(st.characters(max_codepoint=0x24F, exclude_characters="\u00ad")))
def test_train_leaves_latin_text_alone(text):
    assert normalize(text) == text


@pytest.mark.parametrize(
    "text", ["هـ", "1446هـ", "1446 هـ.", "(هـ)", "هـ) خامسًا", "1446هـ/2025م", "ﷺ", "ﷲ", "ﷻ", "﷽", "﷼"]
)
def test_train_keeps_signs(text):
    assert normalize(text) == text


@pytest.mark.parametrize(
    "text", ["👨‍👩‍👧‍👦", "❤️‍🔥", "🏳️‍🌈", "كتب👩🏽‍🔬كتب", "چ گ پ ڤ ڭ", "شكرًا، ٥٠٪؟", "مُسْلِمٌ", "يا أإآٱؤئءىة"]
)
def test_train_keeps_emoji_letters_and_marks(text):
    assert normalize(text) == text


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("nfc", "ا\u0653لة سا\u0654ل", "آلة سأل"),
        ("nfc", "شد\u0651\u064eة", "شد\u064e\u0651ة"),
        ("presentation_forms", "ﻣﺮﺣﺒﺎ ﻻ ﷺ", "مرحبا لا ﷺ"),
        ("presentation_forms", "رﹰ", "رً"),  # the form is a space and a mark in NFKC
        ("invisible", "\ufeffكل\u200fمة\u200b \u202ba\u202c\u00ad", "كلمة a"),
        ("tatweel", "مـــرحبا بكـ ـ", "مرحبا بك "),
        ("tatweel", "هـذا وجهـ وهـ بهــ هــ", "هذا وجه وه به هـ"),
        ("joiners", "كتا\u200cب\u200d!", "كتاب!"),
        ("letters", "مکتبة فی عمّان", "مكتبة في عمّان"),
    ],
)
def test_default_rules_of_train(rule, before, after):
    assert normalize(before) == after
    assert normalize(before, **{rule: False}) == before


@pytest.mark.parametrize(
    ("rules", "before", "after"),
    [
        ({"diacritics": "strip"}, "هٰذَا مُعَلِّمٌ آمِنٌ أَمِينٌ", "هذا معلم آمن أمين"),
        ({"diacritics": "partial"}, "هٰذَا مُعَلِّمٌ شُكْرًا", "هذا معلّمٌ شكرًا"),
        ({"digits": "ascii"}, "٣٫١٤ و ۱۲٬۰۰۰", "3.14 و 12,000"),
        ({"digits": "arabic"}, "2024 ۵ Qwen2.5 5GB `1` http://a.b/1", "٢٠٢٤ ٥ Qwen2.5 5GB `1` http://a.b/1"),
        ({"repeats": True}, "راااائع جدااا ههههههه طاووس تتتابع", "رائع جدا ههه طاووس تتتابع"),
    ],
)
def test_rules_of_choice(rules, before, after):
    assert normalize(before) in (before, unicodedata.normalize("NFC", before))
    assert normalize(before, **rules) == after


@pytest.mark.parametrize(
    "line",
    [
        "این کتاب خوب است",
        "می\u200cخواهم بروم",
        "او گفت که می‌آید",
        "یہ ایک کتاب ہے",
        "ئەم کتێبە باشە",
        "ژاله کتابی خرید",
    ],
)
def test_other_languages_keep_their_letters(line):
    assert normalize(line) == line
    assert normalize(f"کتاب\n{line}\nفی‌ الدار") == f"كتاب\n{line}\nفي الدار"


VARIANTS = [
    ("أحمد", "احمد", "إحمد", "آحمد", "ٱحمد", "أَحْمَد", "أحـــمد", "ا\u0654حمد", "\u200fأحمد\u200f", "ﺃﺣﻤﺪ"),
    ("على", "علي", "علی", "عَلَى"),
    ("مدرسة", "مدرسه", "مَدْرَسَةٌ", "ﻣﺪﺭﺳﺔ", " مدرسة\n"),
    ("كتابك", "کتابک", "كتا\u200cبك"),
    ("هذا", "هٰذا"),
    ("لا ٣٫٥٪", "ﻻ 3.5%", "لا\u00a0۳٫۵٪"),
    ("ماذا؟ نعم، «حقًا»؛ أكيد…", 'ماذا? نعم, "حقا"; اكيد...', "ماذا؟  نعم، “حقاً”؛ أكيد…"),
    ("محمد ﷺ", "محمد صلى الله عليه وسلم"),
    ("1446هـ", "١٤٤٦ه"),
    ("👨‍👩‍👧 ❤️", "👨👩👧 ❤"),
]


@pytest.mark.parametrize("spellings", VARIANTS, ids=lambda spellings: spellings[0])
def test_compare_makes_spelling_variants_equal(spellings):
    assert len({normalize(spelling, "compare") for spelling in spellings}) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("كتاب", "كتب"), ("سؤال", "سوال"), ("درس", "مدرس"), ("گال", "كال"), ("US", "us")]
)
def test_compare_keeps_other_words_apart(one, other):
    assert normalize(one, "compare") != normalize(other, "compare")


@given(arabic)
def test_compare_does_not_see_what_train_changes(text):
    assert normalize(normalize(text), "compare") == normalize(text, "compare")


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_with_every_rule_off_nothing_changes(profile):
    off = {rule: "keep" if "keep" in settings else False for rule, settings in SETTINGS[profile].items()}
    text = "\ufeffﻣـﺮﺣﺒﺎ أهلًا ى ة کی ٣،  سا\u0654ل كل\u200cمة"
    assert normalize(text, profile, **off) == text


@pytest.mark.parametrize(
    ("profile", "rules", "message"),
    [
        ("trian", {}, "no normalisation profile 'trian'; there are train and compare"),
        ("train", {"tatwel": False}, "profile 'train' has no rule 'tatwel'; did you mean 'tatweel'?"),
        ("compare", {"zzz": True}, "profile 'compare' has no rule 'zzz'; there are nfkc, invisible"),
        ("train", {"diacritics": True}, "rule 'diacritics' is 'keep' or 'strip' or 'partial', not True"),
    ],
)
def test_wrong_names_are_explained(profile, rules, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        normalize("نص", profile, **rules)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        normalization_report([], profile, **rules)


def test_report_counts_characters_and_texts():
    texts = ["كـتـاب ﻻ", "سطر سليم", "کل کلمة\u200f `كـ`", "شد\u0651\u064eة"]
    report = normalization_report(iter(texts))
    counts = {name: (rule.characters, rule.texts) for name, rule in report.items()}
    assert counts == {
        "nfc": (2, 1),
        "presentation_forms": (1, 1),
        "invisible": (1, 1),
        "tatweel": (2, 1),
        "joiners": (0, 0),
        "letters": (2, 1),
    }
    assert report["tatweel"].examples == [("كـتـاب لا", "كتاب لا")]
    assert report["letters"].examples == [("کل کلمة …", "كل كلمة …")]
    json.dumps({name: asdict(rule) for name, rule in report.items()})


def test_report_keeps_the_first_examples_short():
    report = normalization_report([f"{'نص ' * 50}{i} كـتاب{' نص' * 50}" for i in range(5)], examples=2)["tatweel"]
    assert report.texts == 5
    assert [("كـتاب" in before, "كتاب" in after) for before, after in report.examples] == [(True, True)] * 2
    assert all(len(side) <= 40 for example in report.examples for side in example)


@given(st.lists(arabic, max_size=3))
def test_report_names_the_texts_that_normalize_changes(texts):
    report = normalization_report(texts)
    assert any(rule.texts for rule in report.values()) == any(normalize(text) != text for text in texts)
    assert all((rule.characters > 0) == (rule.texts > 0) == bool(rule.examples) for rule in report.values())


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_rules_table_has_a_row_for_each_rule(profile):
    rows = rules_table(profile).splitlines()
    assert [re.match(r"\| `(\w+)`", row)[1] for row in rows[2:]] == list(SETTINGS[profile])
    assert all(len(row.split("|")) == 6 for row in rows)


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_documentation_shows_the_rules_as_they_are(profile):
    page = Path(__file__).parents[2] / "docs" / "arabic_data.md"
    assert rules_table(profile) in page.read_text(encoding="utf-8"), "paste rules_table(profile) into the page"
