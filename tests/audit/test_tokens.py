import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.audit.tokens import CHANGES, load_any_tokenizer, pieces, token_cost, token_counts
from arabic_qwen.errors import ModelLoadError
from arabic_qwen.text.dialects import Prediction
from arabic_qwen.text.normalization import normalize


class ByLastLetter:
    def predict(self, texts):
        return [Prediction("EGY" if text.endswith("ه") else "MSA", 0.9) for text in texts]


@pytest.fixture(scope="module")
def tiny():
    return load_any_tokenizer("arabic-qwen-tiny")


def cost_of(texts, tokenizer):
    return token_cost(texts, {"it": tokenizer}, ByLastLetter())["it"]


def count(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def test_known_texts_give_known_numbers(tiny):
    texts = ["ما عاصمة مصر؟", "كَتَبَ الطَّالِبُ الدَّرْسَ", "ازيك يا باشا عامل ايه"]
    lengths = [count(text, tiny) for text in texts]
    found = cost_of(texts, tiny).as_dict()
    assert (found["texts"], found["words"], found["characters"]) == (3, 11, sum(map(len, texts)))
    assert found["tokens"] == sum(lengths)
    assert found["per_word"] == sum(lengths) / 11
    assert found["dialects"]["EGY"]["tokens"] == lengths[2]
    assert found["dialects"]["MSA"]["per_word"] == (lengths[0] + lengths[1]) / 6
    assert {kind: part["tokens"] for kind, part in found["diacritics"].items()} == {
        "none": lengths[0] + lengths[2],
        "full": lengths[1],
    }
    json.dumps(found)


def test_savings_are_the_tokens_before_less_those_after(tiny):
    plain, stretched, marked = "مرحبا بكم", "مـــرحبا بـــكم", "كَتَبَ\u200f الدرسَ"
    savings = cost_of([plain, stretched, marked], tiny).savings
    assert list(savings) == list(CHANGES)
    assert savings["tatweel"] == (1, count(stretched, tiny) - count(plain, tiny))
    assert savings["invisible"] == (1, count(marked, tiny) - count(marked.replace("\u200f", ""), tiny))
    assert savings["presentation_forms"] == (0, 0)
    assert savings["train"].texts == 2
    assert savings["train"].tokens == savings["tatweel"].tokens + savings["invisible"].tokens
    assert savings["train, diacritics=strip"].tokens == savings["train"].tokens + (
        count("كَتَبَ الدرسَ", tiny) - count("كتب الدرس", tiny)
    )


@given(st.lists(st.text("مرحبـ\u200f\u200d\u064b\u064eﻣﷺکی a`\n", max_size=15), max_size=5))
def test_what_a_rule_changes_all_of_them_change(texts):
    for text in texts:
        if any(normalize(text, **rules) != text for rules in CHANGES.values()):
            assert normalize(text, diacritics="strip") != text


def test_each_tokenizer_has_its_own_numbers(tiny, tokenizer):
    texts = ["القراءة توسّع المدارك"]
    costs = token_cost(texts, {"a": tiny, "b": tokenizer}, ByLastLetter())
    assert [costs[name].total.tokens for name in "ab"] == [count(texts[0], tiny), count(texts[0], tokenizer)]


def test_batches_do_not_matter(tiny, monkeypatch):
    texts = ["كتاب", "مدرسة كبيرة", "", "الكتابُ"]
    at_once = cost_of(texts, tiny)
    monkeypatch.setattr("arabic_qwen.audit.tokens._BATCH", 2)
    assert cost_of(texts, tiny) == at_once


def test_worst_words_are_those_in_small_pieces_that_cost_most(tokenizer):
    texts = ["قسطنطينية " * 5 + "ضظغ " * 3 + "عاصمة " * 50]
    worst = cost_of(texts, tokenizer).worst
    assert [word.word for word in worst] == ["قسطنطينية", "ضظغ"]
    assert worst[0].times == 5
    assert worst[0].tokens == count(" قسطنطينية", tokenizer)
    assert "".join(piece.split("×")[0] for piece in worst[0].pieces) == "قسطنطينية"


@pytest.mark.parametrize("word", ["ڤيديو", "پچ", "كتاب", "نًّ"])
def test_pieces_make_the_word_and_tell_its_tokens(tokenizer, word):
    found = [(text, int(times or 1)) for text, _, times in (piece.partition("×") for piece in pieces(word, tokenizer))]
    assert "".join(text for text, _ in found) == word
    assert count(f" {word}", tokenizer) - sum(number for _, number in found) in (0, 1)  # the space may be a token


def test_no_texts_cost_nothing(tiny):
    assert cost_of([], tiny).as_dict()["per_word"] is None
    assert list(token_counts([], tiny)) == []


def test_a_tokenizer_needs_no_model_and_a_missing_one_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert count("مصر", load_any_tokenizer(str(tmp_path))) == count("مصر", tokenizer)
    for name, files in {"empty": {}, "config": {"config.json": '{"model_type": "qwen2"}'}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text, encoding="utf-8")
    for name in (str(tmp_path / "none"), str(tmp_path / "empty"), str(tmp_path / "config")):
        with pytest.raises(ModelLoadError, match=name):
            load_any_tokenizer(name)
