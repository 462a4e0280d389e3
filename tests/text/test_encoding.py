"""Mojibake is found and repaired, and nothing else is taken for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.text.encoding import likely_encoding, mojibake_share, repair_mojibake

TEXT = "مرحبا بكم في المدرسة العربية، هل أنت بخير؟ «نعم» … شكرًا و 123"


def as_browsers_read(data: bytes, encoding: str) -> str:
    """Decoded as browsers do: bytes that the encoding leaves undefined become control characters."""
    return "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in data)


@pytest.mark.parametrize("read", ["cp1252", "latin-1", "cp1256"])
def test_utf8_read_as_something_else(read):
    broken = as_browsers_read(TEXT.encode(), read)
    assert repair_mojibake(broken) == TEXT
    assert mojibake_share(broken) > 0.9


def test_arabic_windows_text_read_as_western():
    broken = TEXT.encode("cp1256").decode("cp1252", "replace")
    assert repair_mojibake(broken) == TEXT
    assert mojibake_share(broken) > 0.9


def test_a_broken_run_in_sound_text_is_repaired_and_is_a_small_share():
    broken = f"{TEXT} {as_browsers_read('العربية'.encode(), 'cp1252')}"
    assert repair_mojibake(broken) == f"{TEXT} العربية"
    assert 0 < mojibake_share(broken) < 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        TEXT,
        "ظظظ ططط طظ؟",
        "Les élèves français étaient à l'école où ça coûte",
        "Øystein Ærø Ågård, Übermäßige Größe",
        "ÄÖÜäöüß",
        "日本語",
    ],
)
def test_sound_text_stays(text):
    assert repair_mojibake(text) == text
    assert mojibake_share(text) == 0


@given(st.text(alphabet=st.sampled_from("ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءأإؤئ ،؛؟٠١٢٣.!«»طظ\u064b\u0651"), max_size=60))
def test_arabic_text_is_never_taken_for_mojibake(text):
    assert repair_mojibake(text) == text


@given(
    st.text(alphabet="ابتثجحخدذرزسشصضطظعغفقكلمنهوي ،؟.", min_size=5, max_size=60), st.sampled_from(["cp1252", "cp1256"])
)
def test_what_was_broken_comes_back(text, read):
    broken = as_browsers_read(("العربية " + text).encode(), read)
    assert repair_mojibake(broken) == "العربية " + text


CLEAN = st.lists(
    st.text("ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءأإؤئ", min_size=2, max_size=7).flatmap(
        lambda word: st.sampled_from([word, f"{word}؟", f"{word}،", f"{word}؛", f"«{word}»", f"{word}»،", "café", "3"])
    ),
    max_size=6,
).map(" ".join)


@given(before=CLEAN, broken=CLEAN, after=CLEAN, read=st.sampled_from(["cp1252", "cp1256"]))
def test_sound_text_around_a_broken_run_stays(before, broken, after, read):
    broken = f"العربية {broken.replace('é', 'e')}".strip()
    text = f"{before} {as_browsers_read(broken.encode(), read)} {after}"
    assert repair_mojibake(text) == f"{before} {broken} {after}"


def test_sound_pairs_do_not_count():
    sound = "هل هذا شرط؟ لا، بل هو مبدأ؛ لماذا؟"
    broken = as_browsers_read("العربية".encode(), "cp1256")
    assert repair_mojibake(f"{sound} {broken} {sound}") == f"{sound} العربية {sound}"
    assert mojibake_share(f"{broken} {sound}") == len(broken) / len((broken + sound).replace(" ", ""))


@pytest.mark.parametrize("text", ["السؤال: ما عاصمة الأردن؟ عمّان", "الجزائر", '{"a": "مدرسة البنات وهي كبيرة"}'])
def test_what_bytes_are_in(text):
    assert likely_encoding(text.encode("cp1256")) == "WINDOWS-1256"
    assert likely_encoding(text.encode("utf-16")) == "UTF-16"


def test_bytes_that_do_not_tell_what_they_are_in():
    assert likely_encoding("يومًا بعد يوم وهكذا".encode("iso8859-6")) == "ISO-8859-6"  # ن is not ç
    assert likely_encoding("ما عاصمة الأردن؟".encode() + b"\xff") is None  # UTF-8 with a damaged byte
    for data in (b"\xff", "élève".encode("latin-1"), "日本語".encode("shift-jis"), b""):
        assert likely_encoding(data) is None
