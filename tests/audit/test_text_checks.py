"""Defects of texts, and texts that only look like them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.audit.text_checks import around, html_finding, text_findings


def codes(text: str) -> list[str]:
    return [found.code for found in text_findings(text, "answer")]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("presentation_forms", "أهلًا ﻭﺳﻬﻼ"),
        ("tatweel", "مـرحبا"),
        ("tatweel", "مرحباـــ"),
        ("tatweel", "مُـحمّد"),
        ("bidi_controls", "\ufeffمرحبا"),
        ("bidi_controls", "C\u200e++"),
        ("unk_token", "هذا <unk> نص"),
        ("unk_token", "هذا [UNK] نص"),
        ("unk_token", "????? ???? ??????"),
        ("unk_token", "هذا \ufffd نص"),
        ("template_tokens", "<|im_start|>user\nمرحبا"),
        ("template_tokens", "مرحبا [/INST] أهلًا"),
        ("template_tokens", "أهلًا</s>"),
        ("template_tokens", "### Response:\nأهلًا"),
        ("template_tokens", "### الاستجابة:\nأهلًا"),
        ("template_tokens", "نعم\n### Instruction:\nاشرح\n### Response:\nأهلًا"),
        ("code_fence", "```python\nprint(1)"),
        ("code_fence", "```بايثون\nprint(1)\n```"),
        ("code_fence", "```python\nإذا x > 1:\n    طباعة(x)\n```"),
        ("code_fence", "```python\nf(a، b)\n```"),
        ("code_fence", "```\nimport os\nاستيراد numpy\nfor i in range(3):\n    pass\n```"),
        ("code_fence", "```js\nlet x = 1؛\n```"),
    ],
)
def test_found(code, text):
    assert codes(text) == [code]


@pytest.mark.parametrize(
    "text",
    [
        "سنة 1446هـ",
        "الـ API وبـ Python",
        "املأ الفراغ: ـــــ",
        "قال الله تعالى ﴿قل هو الله أحد﴾ وصلى الله على محمد ﷺ",
        "👨‍👩‍👧 عائلة",
        "استعمل `<|im_end|>` في النهاية",
        "```\n<unk>\n```",
        "القائمة<int> و a < b && c > d",
        "نص <s>مشطوب</s> هنا",
        "# العنوان\n## الاستجابة للأزمات",
        "نبدأ.\n### المدخلات:\nعددان\n### الإجابة:\nمجموعهما",
        "```python\n# احسب، ثم اطبع؛\nprint('نعم، لا؟')\n```",
        '```json\n{"اسم": "علي، سعيد", "عمر": 3}\n```',
        "```\nيا ليل، يا عين\nقال: نعم؛ ثم مضى (أو لم يمض)،\n```",
        "```text\nf(a، b)\n```",
        "نص `كود` ونص ```سطر``` ونص",
        "~~~\nنص\n~~~",
        "1. خطوة:\n   ```bash\n   ls\n   ```\n2. أخرى",
        "````\n```\n````",
    ],
)
def test_sound(text):
    assert codes(text) == []


@pytest.mark.parametrize(
    "texts",
    [["<p>نص</p>"], ["سؤال", "نص<br>نص"], ["<b>مهم</b>"], ["نص&nbsp;نص"], ['<a href="x">هنا</a>'], ["<div class='a'>"]],
)
def test_html(texts):
    assert html_finding(texts).code == "html"


@pytest.mark.parametrize(
    "texts",
    [
        ["List<int> و Map<a, b>"],
        ["a < b > c"],
        ["<b"],
        ["`<br>`"],
        ["```html\n<p>\n```"],
        ["كيف أكتب فقرة في HTML؟", "اكتب <p>نص</p>"],
        ["ترجم إلى العربية: Server <em>Error</em>", "خطأ <em>الخادم</em>"],
        ["قال & ابتسم"],
        ["x<p and y>q"],
    ],
)
def test_no_html(texts):
    assert html_finding(texts) is None


def test_html_that_a_translation_lost_is_found():
    assert html_finding(["ترجم إلى العربية: a &amp; b", "أ و ب"]).code == "html"


@given(st.text(max_size=300), st.integers(0, 300), st.integers(0, 40))
def test_examples_are_one_short_line_without_control_characters(text, start, length):
    start = min(start, len(text))
    example = around(text, start, min(len(text), start + length))
    assert len(example) < 160
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in example)


@given(st.text(alphabet=st.sampled_from("ابتثمهـءّ `~\n#<>&;/pbr|im_end[]INSTs\u200f\ufefb،؛("), max_size=80))
def test_any_text_can_be_checked(text):
    assert set(codes(text)) <= {
        "presentation_forms", "tatweel", "bidi_controls", "unk_token", "template_tokens", "code_fence", "mojibake"
    }  # fmt: skip
