import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.audit import statistics as statistics_module
from arabic_qwen.audit.rows import read_row, row_texts
from arabic_qwen.audit.statistics import (
    RowTexts,
    Statistics,
    _Copies,
    diacritic_kinds,
    histogram,
    quantile,
)
from arabic_qwen.text.dialects import Prediction
from arabic_qwen.text.scripts import script_shares

QUESTION, ANSWER = "ما عاصمة الأردن؟", "عمّان"


class ByFirstLetter:
    """Egyptian where a text begins with ا, standard where with م, unknown else."""

    def predict(self, texts):
        return [Prediction({"ا": "EGY", "م": "MSA"}.get(text[:1], "unknown"), 0.9) for text in texts]


def of(*rows):
    statistics = Statistics(ByFirstLetter())
    statistics.add([RowTexts(prompt, tuple(answers)) for prompt, *answers in rows])
    return statistics


def test_known_rows_give_known_numbers():
    found = of(("ازيك يا صاحبي", "مرحبا"), ("من هو؟", "ليس here", "لا"), ("من هو؟", "ليس here", "لا")).as_dict()
    assert (found["rows"], found["turns"], found["duplicate_share"]) == (3, {"1": 3}, pytest.approx(1 / 3))
    assert found["prompts"]["words"] == {
        "total": 7,
        "mean": pytest.approx(7 / 3),
        "p5": 2,
        "median": 2,
        "p95": 3,
        "max": 3,
        "histogram": [(2, 3, 3)],
    }
    assert found["answers"]["characters"]["histogram"] == [(4, 7, 1), (8, 15, 2)]
    assert found["answers"]["scripts"] == {"Arabic": pytest.approx(11 / 19), "Latin": pytest.approx(8 / 19)}
    assert found["rejected"]["texts"] == 2
    assert found["prompts"]["dialects"] == {"MSA": 2, "EGY": 1}
    assert found["drift"] == {"MSA": {"unknown": 2}, "EGY": {"MSA": 1}}
    assert found["drift_share"] == 1.0
    json.dumps(found)


def test_without_rejected_answers_and_known_dialects_there_is_less_to_say():
    found = of(("ب", "ب")).as_dict()
    assert "rejected" not in found
    assert found["drift_share"] is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [("كتب الطالب", "none"), ("كتب الطالبُ الدرس", "some"), ("كَتَبَ", "full"), ("ab", "none"), ("ُ", "full"), ("", "none")],
)
def test_kinds_by_diacritics(text, kind):
    assert diacritic_kinds(["حرف", text, "حرف"]) == ["none", kind, "none"]


def test_code_and_urls_have_no_script_and_no_diacritics():
    texts = of(("مثل `print('كَتَبَ')` و https://example.com", "نعم")).as_dict()["prompts"]
    assert texts["scripts"] == {"Arabic": 1.0}
    assert texts["diacritics"] == {"per_letter": 0.0, "none": 1, "some": 0, "full": 0}


rows_of_any_text = st.lists(
    st.builds(
        RowTexts,
        st.text(max_size=20) | st.text("اَمرab \n", max_size=20),
        st.lists(st.text("ايٌ،x你", max_size=9), min_size=1, max_size=3).map(tuple),
        st.integers(1, 3),
    ),
    max_size=12,
)


@given(rows_of_any_text, st.integers(1, 5))
def test_the_cut_into_batches_does_not_matter(rows, size):
    at_once, in_parts = Statistics(ByFirstLetter()), Statistics(ByFirstLetter())
    at_once.add(rows)
    for start in range(0, len(rows), size):
        in_parts.add(rows[start : start + size])
    assert at_once.as_dict() == in_parts.as_dict()


@given(st.text())
def test_scripts_are_those_of_the_text_module(text):
    assert of((text, "ا")).sides["prompts"].scripts() == pytest.approx(script_shares(text))


@given(st.lists(st.integers(0, 300), min_size=1), st.floats(0.01, 1))
def test_quantile_of_counts_is_that_of_the_sorted_lengths(lengths, share):
    at_most = quantile(Counter(lengths), share)
    assert sum(length <= at_most for length in lengths) >= share * len(lengths) - 1e-6
    assert sum(length < at_most for length in lengths) < share * len(lengths) + 1e-6


@given(st.lists(st.integers(0, 3000)))
def test_histogram_bins_hold_every_length_once(lengths):
    bins = histogram(Counter(lengths))
    assert [sum(first <= length <= last for length in lengths) for first, last, _ in bins] == [n for *_, n in bins]
    assert sum(n for *_, n in bins) == len(lengths)
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(bins))


def test_share_of_copies_in_bounded_memory():
    copies = _Copies(limit=1000)
    for number in range(30_000):
        copies.add(str(number))
        if number % 5 == 0:
            copies.add(str(number))
    assert len(copies._copies) <= 1000
    assert copies.share() == pytest.approx(1 / 6, abs=0.03)


@pytest.mark.parametrize(
    ("values", "method", "expected"),
    [
        ({"instruction": QUESTION, "response": ANSWER}, "sft", RowTexts(QUESTION, (ANSWER,))),
        (
            {"prompt": QUESTION, "chosen": ANSWER, "rejected": ["إربد", "لا"]},
            "cpo",
            RowTexts(QUESTION, (ANSWER, "إربد", "لا")),
        ),
        ({"prompt": QUESTION, "completion": ANSWER, "label": False}, "kto", RowTexts(QUESTION, (ANSWER,))),
        (
            {"instruction": QUESTION, "response": ANSWER, "history": [["من؟", "أنا"]], "system": "أجب"},
            "sft",
            RowTexts(QUESTION, (ANSWER,), 2),
        ),
    ],
)
def test_texts_of_a_row(values, method, expected):
    assert row_texts(read_row(values, method)) == expected


def test_the_classifier_is_loaded_at_the_first_batch(monkeypatch):
    monkeypatch.setattr(statistics_module, "load_classifier", ByFirstLetter)
    statistics = Statistics()
    statistics.add([RowTexts("ا", ("م",))])
    assert statistics.drift == {("EGY", "MSA"): 1}
