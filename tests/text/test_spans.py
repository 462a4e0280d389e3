"""Code, URLs and e-mail addresses are found, hidden and restored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.text.spans import PLACEHOLDER, hide_spans, restore_spans

pieces = st.lists(st.sampled_from([*"`@.aكـ \n", "``", "```", "https://", "www.", PLACEHOLDER]), max_size=30).map(
    "".join
)


@given(pieces | st.text())
def test_restoring_is_the_inverse(text):
    hidden, spans = hide_spans(text)
    assert hidden.count(PLACEHOLDER) == len(spans)
    assert restore_spans(hidden, spans) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("اكتب `print(1)` هنا", ["`print(1)`"]),
        ("اكتب ``a ` b`` هنا", ["``a ` b``"]),
        ("قبل\n```python\nx = 1\n```\nبعد", ["```python\nx = 1\n```"]),
        ("الكود: ```x = 1``` انتهى", ["```x = 1```"]),
        ("مقطوع\n```python\nx = 1", ["```python\nx = 1"]),
        ("````\n```\n````  بعد", ["````\n```\n````"]),
        ("` وحيدة\nو` أخرى", []),
        ("راجعhttps://example.com/كتاب?q=1، ثم عد", ["https://example.com/كتاب?q=1"]),
        ("(www.example.com) http://a.b", ["www.example.com)", "http://a.b"]),
        ("الرابط https://example.com\u200f انتهى", ["https://example.com"]),
        ("راسل user.name+x@example.com أو محمد@شركة.com", ["user.name+x@example.com", "محمد@شركة.com"]),
        ("تابع @user", []),
        ("سطر عادي: لا شيء هنا.", []),
    ],
)
def test_what_counts_as_a_span(text, expected):
    assert hide_spans(text)[1] == expected
