"""Shares of scripts."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.text.scripts import arabic_share, leaked_scripts, script_shares


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("مرحبا", {"Arabic": 1.0}),
        ("مَرْحَبًا ١٢٣ ـــ!", {"Arabic": 1.0}),
        ("ﻣﺮﺣﺒﺎ پچڤگ", {"Arabic": 1.0}),
        ("سلام hello 你好!", {"Latin": 5 / 11, "Arabic": 4 / 11, "Han": 2 / 11}),
        ("شغّل `print(x)` من https://example.com أو a@b.com", {"Arabic": 1.0}),
        ("Привет", {"Cyrillic": 1.0}),
        ("ひらカタ한국", {"Hiragana": 1 / 3, "Katakana": 1 / 3, "Hangul": 1 / 3}),
        ("ᚠᚢ", {"Other": 1.0}),
        ("123 ... 👍 ـــ", {}),
        ("", {}),
    ],
)
def test_script_shares(text, shares):
    assert script_shares(text) == pytest.approx(shares)


def test_largest_first():
    assert list(script_shares("ab مرحبا 你")) == ["Arabic", "Latin", "Han"]


def test_arabic_share():
    assert arabic_share("كتاب book") == 0.5
    assert arabic_share("book") == 0.0
    assert arabic_share("42") is None


@pytest.mark.parametrize(
    ("prompt", "answer", "leaked"),
    [
        ("ما فوائد القراءة؟", "توسع المدارك", []),
        ("ما فوائد القراءة؟", "توسع المدارك 并且 تنمي الخيال", ["Han"]),
        ("من كتب الحرب والسلم؟", "تولستوي (Лев Толстой)", []),
        ("من كتب الحرب والسلم؟", "تولستوي (Лев Толстой) из", ["Cyrillic"]),
        ("ما عاصمة الاتحاد السوفيتي؟", "Москва 你", ["Cyrillic", "Han"]),
        ("ما معنى 你好 بالعربية؟", "معنى 你好 هو مرحبا", []),
        ("من صنع الهاتف؟", "صنعته شركة Apple.", []),
        ("ما النسبة؟", "هي π تقريبًا", []),
        ("ما عاصمة مصر؟", "The capital is Cairo.", ["Latin"]),
        ("ترجم الكلمة hello بطريقتين", "The word is hello.", []),
        ("ما عاصمة مصر؟", "", []),
        ("ترجم إلى الإنجليزيّة: عاصمة مصر هي القاهرة", "The capital is Cairo.", None),
        ("ما اسم عاصمة الصين بلغتها؟", "北京", None),
        ("ما الناتج؟", "`print(x)` https://example.com", []),
        ("What is the capital?", "北京", None),
        ("42", "北京", None),
    ],
)
def test_leaked_scripts(prompt, answer, leaked):
    assert leaked_scripts(prompt, answer) == leaked


@given(st.text())
def test_shares_sum_to_one_or_there_are_no_letters(text):
    shares = script_shares(text)
    assert sum(shares.values()) == pytest.approx(1) or not shares


def test_every_arabic_letter_is_arabic():
    letters = [c for c in map(chr, range(sys.maxunicode)) if unicodedata.name(c, "").startswith("ARABIC LETTER ")]
    letters = [c for c in letters if unicodedata.category(c) == "Lo"]
    assert len(letters) > 500
    assert {share for letter in letters for share in script_shares(letter)} == {"Arabic"}
