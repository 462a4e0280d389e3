"""The dialect classifier: what it says, that it is stored whole, and what it refuses."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text import dialects
from arabic_qwen.text.dialects import (
    DIALECTS,
    UNKNOWN,
    DialectClassifier,
    Prediction,
    fit,
    held_out_predictions,
    load_classifier,
    score,
)

# Written for this test, in none of the sources of the shipped model.
CLEAR = {
    "MSA": [
        "لماذا لم تستطع الحكومة أن تعالج هذه المشكلة؟",
        "يجب على الطلاب الذين لم يسجلوا أن يراجعوا الإدارة.",
        "هل يمكنك أن تشرح لي كيف تعمل هذه الآلة؟",
    ],
    "EGY": [
        "هو انت مش عايز تيجي معايا ليه؟ ده احنا هنتبسط اوي",
        "انا لسه مخلصتش الشغل بتاعي ومش عارف اعمل ايه دلوقتي",
        "الراجل ده بيقول ان مفيش عيش في الفرن النهارده",
    ],
    "LEV": [
        "شو عم تعمل هلق؟ ما بدك تطلع معنا شي مشوار؟",
        "ما بعرف ليش ما حدا خبرني انو الدكانة مسكرة",
        "هاد الزلمة كتير منيح بس ما فيني احكي معو هيك",
    ],
    "GLF": [
        "وش تبي تسوي الحين؟ ابغى اروح السوق وايد زحمة",
        "مدري ليش هالريال ما يبي يتكلم معاي الحين",
        "شلونك يا خوي، من زمان ما شفناك، وايد مشتاقين لك",
    ],
    "MAG": [
        "علاش ما بغيتيش تمشي معايا؟ راه كاين شي حاجة زوينة تما",
        "واش كتعرف فين كاينة الدار ديالو؟ ما لقيتهاش دابا",
        "هاد الدري ديما كيهضر بزاف وما كيدير والو",
    ],
    "IRQ": [
        "شلونك عيني؟ شكو ماكو؟ ليش ما تجي يمنا هسه؟",
        "ماكو هيج شي، اني جنت وياهم البارحة وما شفت احد",
        "شكد تريد فلوس على هاي السيارة مالتك؟ كلش غالية",
    ],
}
NO_DIALECT = {
    "empty": "",
    "short": "شلونك عيني",
    "english": "What do you want to do now, my friend? Tell me everything.",
    "chinese": "你今天好吗？我想去市场买东西。",
    "persian": "من نمی‌دانم چرا این کتاب را نخوانده است",
    "urdu": "آپ کیسے ہیں؟ مجھے یہ کتاب چاہیے ہے",
    "code": "```\nعايز دلوقتي ايه ازاي كده مش\n```",
    "mixed": "run the command and open the settings page then كده مش عايز",
    "numbers": "1 2 3 ٤ ٥ ٦",
}


@pytest.fixture(scope="module")
def shipped():
    return load_classifier()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_clear_sentences(shipped, dialect):
    predictions = shipped.predict(CLEAR[dialect])
    assert all(prediction.dialect in (dialect, UNKNOWN) for prediction in predictions), predictions
    assert sum(prediction.dialect == dialect for prediction in predictions) >= 2, predictions


@pytest.mark.parametrize("kind", sorted(NO_DIALECT))
def test_text_without_a_dialect_is_unknown(shipped, kind):
    assert shipped.predict([NO_DIALECT[kind]])[0].dialect == UNKNOWN


@given(st.lists(st.text() | st.text("اأإآبتثجچحخدذرزسشصضطظعغفقكگلمنهويىةءئؤ پڤ؟،abc\n`", min_size=5), max_size=5))
def test_any_text_alone_or_in_a_batch(texts):
    classifier = load_classifier()
    together = classifier.predict(texts)
    assert len(together) == len(texts)
    for text, prediction in zip(texts, together, strict=True):
        assert classifier.predict([text]) == [prediction]
        assert prediction.dialect in (*DIALECTS, UNKNOWN)
        assert 0 <= prediction.confidence <= 1


def test_spelling_variants_are_one(shipped):
    plain, variant = shipped.predict(["انا مش عايز اروح المدرسة النهاردة", "أنا مِش عااايز أروح المدرسه النهــارده"])
    assert plain.dialect == variant.dialect == "EGY"


def test_the_shipped_model_is_small():
    path = os.path.join(os.path.dirname(dialects.__file__), "..", "assets", "dialects.safetensors")
    assert os.path.getsize(path) < 3_000_000


EGYPTIAN = ["انا مش عايز حاجة", "هو راح فين دلوقتي", "احنا هنعمل ايه", "مفيش حد هنا خالص", "عايز اعرف ازاي"] * 3
GULF = ["وش تبي تسوي الحين", "ما ابي شي منك", "وين رحتوا امس", "ليش ما تبون تيون", "هالشي وايد زين"] * 3


@pytest.fixture(scope="module")
def small():
    return fit(EGYPTIAN + GULF, ["EGY"] * len(EGYPTIAN) + ["GLF"] * len(GULF))


def test_fit_learns_and_is_repeatable(small):
    assert small.labels == ("EGY", "GLF")
    predicted = small.predict(EGYPTIAN + GULF)
    assert [prediction.dialect for prediction in predicted] == ["EGY"] * len(EGYPTIAN) + ["GLF"] * len(GULF)
    again = fit(EGYPTIAN + GULF, ["EGY"] * len(EGYPTIAN) + ["GLF"] * len(GULF))
    np.testing.assert_array_equal(again.weights, small.weights)
    np.testing.assert_array_equal(again.thresholds, small.thresholds)


def test_save_and_load(small, tmp_path):
    path = tmp_path / "own.safetensors"
    small.save(path)
    first = path.read_bytes()
    small.save(path)
    assert path.read_bytes() == first
    loaded = load_classifier(str(path))
    assert loaded.labels == small.labels
    for before, after in zip(small.predict(EGYPTIAN + GULF), loaded.predict(EGYPTIAN + GULF), strict=True):
        assert before.dialect == after.dialect
        assert before.confidence == pytest.approx(after.confidence, abs=0.02)


def test_a_full_cache_starts_again(small, monkeypatch):
    fresh = DialectClassifier(small.labels, small.weights, small.bias, small.thresholds)
    monkeypatch.setattr(dialects, "_CACHED_WORDS", 3)
    assert fresh.predict(EGYPTIAN + GULF) == small.predict(EGYPTIAN + GULF)


def test_held_out_texts_are_of_unseen_groups():
    texts, labels = EGYPTIAN + GULF, ["EGY"] * len(EGYPTIAN) + ["GLF"] * len(GULF)
    predictions = held_out_predictions(texts, labels, texts)
    assert len(predictions) == len(texts)
    assert {prediction.dialect for prediction in predictions} <= {"EGY", "GLF", UNKNOWN}


def test_nothing_is_held_out_from_one_dialect():
    predictions = held_out_predictions(
        EGYPTIAN + GULF, ["EGY"] * len(EGYPTIAN) + ["GLF"] * len(GULF), [*"e" * 15, *"g" * 15]
    )
    assert set(predictions) == {Prediction(UNKNOWN, 0.0)}


def test_score():
    truth = ["EGY", "EGY", "EGY", "GLF"]
    egyptian, gulf = score(truth, [Prediction(name, 1.0) for name in ("EGY", UNKNOWN, "GLF", "GLF")])
    assert egyptian == ("EGY", 3, 1.0, pytest.approx(1 / 3), 0.5, pytest.approx(1 / 3))
    assert gulf == ("GLF", 1, 0.5, 1.0, pytest.approx(2 / 3), 0.0)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ([], [], "no text of three Arabic words"),
        (["hello"], ["EGY"], "no text of three Arabic words"),
        (EGYPTIAN, ["EGY"] * len(EGYPTIAN), "all texts are EGY"),
        (EGYPTIAN, ["Egyptian"] * len(EGYPTIAN), "'Egyptian' is no dialect; label the texts MSA, EGY"),
    ],
)
def test_what_cannot_be_learned_from(texts, labels, message):
    with pytest.raises(DatasetError, match=message):
        fit(texts, labels)


@pytest.mark.parametrize("content", ["missing", "folder", "text", "other tensors"])
def test_a_file_that_is_no_classifier(tmp_path, content):
    path = tmp_path / "own.safetensors"
    if content == "folder":
        path.mkdir()
    elif content == "text":
        path.write_text("not a classifier")
    elif content == "other tensors":
        save_file({"weights": np.zeros((2, 3), np.float32)}, path)
    with pytest.raises(ConfigurationError, match=r"own\.safetensors.*fit-dialects"):
        load_classifier(str(path))
