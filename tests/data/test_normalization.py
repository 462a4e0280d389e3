"""Rows are normalised before they are read: which texts, which columns, what is counted."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.config import METHOD_CONFIGS, SFTConfig
from arabic_qwen.data.layouts import COLUMNS, canonical
from arabic_qwen.data.normalization import Normalizer
from arabic_qwen.data.readers import Row
from arabic_qwen.data.templates import set_template
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.text.normalization import normalization_report, normalize

DIRTY = "مـــرحبا ﺑﻜﻢ فی مکتبة\u200f المُعَلِّمِ"
CLEAN = "مرحبا بكم في مكتبة المُعَلِّمِ"
assert normalize(DIRTY) == CLEAN


def normalized(values: dict, **settings) -> Row:
    (row,) = Normalizer(SFTConfig(**settings)).rows([Row("file:1", values)])
    return row


@pytest.fixture
def loader(tokenizer, tmp_path):
    """(method, rows, settings) -> a loader of a file with these rows."""
    set_template(tokenizer, "chatml", "")

    def build(method, rows, name="rows", **settings):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        values = {"dataset_path": path, "output_dir": tmp_path / "run", "validation_split": 0}
        config = METHOD_CONFIGS[method](**values | settings)
        return METHODS[method].data_loader(config, tokenizer)

    return build


def texts(loader, dataset):
    return [
        loader.tokenizer.decode([*group.prompt, *completion.ids])
        for group in dataset
        for completion in group.completions
    ]


def same(ours, theirs):
    """Whether two sets are the same tokens."""
    return [[[*g.prompt], *([*c.ids] for c in g.completions)] for g in ours] == [
        [[*g.prompt], *([*c.ids] for c in g.completions)] for g in theirs
    ]


VALUES = {
    "text": DIRTY,
    "list of texts": [DIRTY, "جواب"],
    "pairs": [[DIRTY, "ب"]],
    "messages": [{"role": "user", "content": DIRTY}, {"role": "assistant", "content": "ب"}],
    "from and value": [{"from": "human", "value": DIRTY}],
    "one message": {"role": "user", "content": DIRTY},
    "content in parts": [{"role": "user", "content": [DIRTY]}],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_texts_at_any_depth(value):
    row = normalized({"prompt": value, "label": True, "empty": None, "number": 3})
    as_it_should = json.loads(json.dumps(value).replace(json.dumps(DIRTY), json.dumps(CLEAN)))
    assert row.values == {"prompt": as_it_should, "label": True, "empty": None, "number": 3}
    assert row.given == {"prompt": value, "label": True, "empty": None, "number": 3}


@pytest.mark.parametrize("stored", [json.dumps, lambda messages: json.dumps(messages, ensure_ascii=False), str])
def test_messages_that_are_stored_as_text(stored):
    messages = [{"role": "user", "content": "س"}, {"role": "assistant", "content": f"{DIRTY}\n```\nكـود\n"}]
    row = normalized({"messages": stored(messages)})
    assert row.values["messages"][1]["content"] == f"{CLEAN}\n```\nكـود\n"
    assert row.given == {"messages": stored(messages)}
    broken = {"messages": stored(messages)[:-3]}
    assert normalized(broken).values == broken


def test_roles_and_other_keys_are_left_alone():
    message = {"role": "مـستخدم", "content": "نص", "id": "كـ"}
    assert normalized({"messages": [message]}).values == {"messages": [message]}


LAYOUT_FILES = sorted((Path(__file__).parent / "layouts").glob("*.jsonl"))


@pytest.mark.parametrize("path", LAYOUT_FILES, ids=lambda path: path.stem)
def test_each_public_layout(path):
    """Tatweel that is put into every text goes, wherever the layout has it; what is clean stays as it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        clean, _ = canonical(normalized(values).values)
        stretched = normalized(_stretch(clean))
        assert stretched.values == clean
        assert stretched.changes["tatweel"] > 0


def _stretch(values):
    def stretch(value):
        if isinstance(value, str):
            return value.replace("ال", "اـل")
        if isinstance(value, list):
            return [stretch(item) for item in value]
        if isinstance(value, dict):
            return {key: stretch(item) if key in ("content", "value") else item for key, item in value.items()}
        return value

    return {key: stretch(value) if key in COLUMNS else value for key, value in values.items()}


@given(st.text(st.sampled_from("ابكیـ\u064e\u0651\u200fﺑ`@ :/w."), max_size=30))
def test_idempotent_and_counted_as_the_report_counts(text):
    row = normalized({"prompt": text, "rejected": [text]})
    assert normalized(row.values).changes == {}
    report = normalization_report([text, text])
    assert row.changes == {rule: found.characters for rule, found in report.items() if found.characters}
    assert (row.given is None) == (row.values == {"prompt": text, "rejected": [text]})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [CLEAN, CLEAN]),
        ({"normalize": False}, [DIRTY, DIRTY]),
        ({"diacritics": "strip"}, ["مرحبا بكم في مكتبة المعلم"] * 2),
        ({"diacritics": "partial"}, ["مرحبا بكم في مكتبة المعلّم"] * 2),
        ({"diacritics": {"prompt": "strip"}}, ["مرحبا بكم في مكتبة المعلم", CLEAN]),
        ({"diacritics": {"prompt": "keep", "completion": "partial"}}, [CLEAN, "مرحبا بكم في مكتبة المعلّم"]),
        ({"diacritics": {"completion": "strip"}, "normalize": False}, [DIRTY, "مـــرحبا ﺑﻜﻢ فی مکتبة\u200f المعلم"]),
    ],
)
def test_settings(settings, expected):
    assert list(normalized({"prompt": DIRTY, "completion": DIRTY}, **settings).values.values()) == expected


def test_columns_that_training_ignores_stay_as_they_are():
    row = normalized({"instruction": "س", "src": DIRTY, "output": "كـتاب"})
    assert row.values == {"instruction": "س", "src": DIRTY, "output": "كتاب"}
    assert list(row.values) == list(row.given)
    assert row.changes == {"tatweel": 1}


def test_code_and_urls_stay():
    text = "اكتب `كـود` في https://example.com/كـتاب\n```python\nx = 'كـ'\n```"
    assert normalized({"prompt": text}).changes == {}


# A row of each layout with a diacritised question and answer, and the columns of both.
Q, A = "مَن؟", "عُمَرُ"
LAYOUTS = {
    "instruction": ("sft", {"instruction": Q, "response": A}, "instruction", "response"),
    "alpaca": ("sft", {"instruction": Q, "input": "", "output": A}, "instruction", "output"),
    "completion": ("sft", {"prompt": Q, "completion": A}, "prompt", "completion"),
    "messages": (
        "sft",
        {"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]},
        "prompt",
        "completion",
    ),
    "pair": ("dpo", {"prompt": Q, "chosen": A, "rejected": "لا"}, "prompt", "chosen"),
    "contrast": ("cpo", {"prompt": Q, "chosen": "لا", "rejected": [A], "hard_negatives": []}, "prompt", "rejected"),
    "feedback": ("kto", {"prompt": Q, "completion": A, "label": True}, "prompt", "completion"),
}


@pytest.mark.parametrize(("method", "row", "question", "answer"), LAYOUTS.values(), ids=LAYOUTS)
def test_diacritics_by_column(loader, method, row, question, answer):
    rows = [row, {**row, question: [{"role": "user", "content": "س"}] if isinstance(row[question], list) else "س"}]
    text = "".join(
        texts(one := loader(method, rows, diacritics={question: "strip", answer: "keep"}), one.load()["train"])
    )
    assert "من؟" in text and Q not in text and A in text
    text = "".join(texts(two := loader(method, rows, diacritics={answer: "strip"}), two.load()["train"]))
    assert Q in text and A not in text and "عمر" in text


@pytest.mark.parametrize("method", sorted(METHODS))
def test_equals_normalising_before(loader, method):
    def rows(text):
        many = [f"{text} {number}" for number in range(5)]
        if method == "sft":
            return [{"instruction": one, "response": text} for one in many]
        if method == "kto":
            return [{"prompt": one, "completion": text, "label": bool(i % 2)} for i, one in enumerate(many)]
        return [{"prompt": one, "chosen": text, "rejected": f"{text} لا"} for one in many]

    ours = loader(method, rows(DIRTY), validation_split=0.4).load()
    before = loader(method, rows(CLEAN), "clean", validation_split=0.4, normalize=False).load()
    raw = loader(method, rows(DIRTY), validation_split=0.4, normalize=False).load()
    for split in ("train", "validation"):
        assert same(ours[split], before[split])
        assert not same(ours[split], raw[split])
        assert "; normalised " in ours[split].summary()
        assert "normalised" not in before[split].summary() + raw[split].summary()


def test_encode_and_split_are_normalised_too(loader):
    row = {"instruction": DIRTY, "response": "ج"}
    some = loader("sft", [row, {"instruction": "س", "response": "ج"}], validation_split=0.5)
    assert same(some.encode([row]), some.encode([{**row, "instruction": CLEAN}]))
    assert same(some.encode(datasets.Dataset.from_list([row])), some.encode([row]))
    rows = [row for split in some.split().values() for row in split]
    assert {row.values["instruction"] for row in rows} == {"س", CLEAN}


def test_prompts_that_normalising_makes_equal_are_held_out_together(loader):
    pairs = [{"prompt": p, "chosen": "نعم", "rejected": f"لا {i}"} for i, p in enumerate([DIRTY, CLEAN, "س", "ش"])]
    for seed in range(6):
        rows = loader("dpo", pairs, validation_split=0.4, data_seed=seed).split()
        held_out = [row.values["prompt"] for row in rows["validation"]]
        assert held_out.count(CLEAN) in (0, 2)


def test_streaming_equals_not_streaming(loader):
    rows = [{"instruction": f"{DIRTY} {i}", "response": DIRTY} for i in range(6)]
    memory = loader("sft", rows).load()["train"]
    stream = loader("sft", rows, streaming=True, max_steps=1).load()["train"]
    _, window = next(stream.windows({}))
    assert same(memory, window)
    assert stream.summary() == f"streamed, {memory.summary()}"


def test_summary(loader):
    rows = [{"instruction": "كـتـاب", "response": "فی"}, {"instruction": "س", "response": "ج"}]
    assert (
        loader("sft", rows)
        .load()["train"]
        .summary()
        .endswith("; normalised 3 characters in 1 row (tatweel 2, letters 1)")
    )


class TestBadRows:
    def test_text_that_normalising_leaves_empty(self, loader, tmp_path):
        rows = [{"instruction": "س", "response": "ج"}] * 3 + [{"instruction": "س", "response": "ــ"}]
        with pytest.raises(DatasetError, match=r"rows.jsonl:4: response: is empty \(once normalised\)"):
            loader("sft", rows).load()
        left_out = json.loads((tmp_path / "run" / "bad_rows.jsonl").read_text(encoding="utf-8"))
        assert left_out["row"] == rows[3]  # as in the file

    def test_answers_that_normalising_makes_equal(self, loader):
        rows = [{"prompt": "س", "chosen": "كتاب", "rejected": "كتـاب"}]
        with pytest.raises(DatasetError, match=r"the same \(once normalised\)"):
            loader("dpo", rows).load()
        assert len(loader("dpo", rows, normalize=False).load()["train"]) == 1


ROWS_WITH_SYSTEM = [{"instruction": "س", "response": "ج"}, {"instruction": "س", "response": "ج", "system": "ن"}]


class TestUnknownColumns:
    def test_columns_that_no_row_has(self, loader):
        some = loader("sft", ROWS_WITH_SYSTEM, diacritics={"instruction": "strip", "output": "keep"})
        with pytest.raises(ConfigurationError, match=r"no row has output; .* are instruction, response, system"):
            some.load()

    def test_a_later_row_of_a_stream_may_have_them(self, loader, monkeypatch, caplog):
        monkeypatch.setattr("arabic_qwen.data.stream.WINDOW", 1)
        rows = [{"instruction": "س", "response": A}, {"instruction": "س", "output": A}] * 2
        settings = {"streaming": True, "max_steps": 1, "validation_split": 0}
        some = loader("sft", rows, diacritics={"output": "strip", "src": "keep"}, **settings)
        windows = some.load()["train"].windows({})
        read = [texts(some, next(windows)[1])[0] for _ in rows]
        assert ["عمر" in text for text in read] == [False, True] * 2
        assert [message for message in caplog.messages if "no row has" in message] == [
            "diacritics: no row has output, src; the columns that training reads of them are instruction, response "
            "(so far; later rows may have others)"
        ]

    def test_a_column_that_some_row_has(self, loader):
        assert len(loader("sft", ROWS_WITH_SYSTEM, diacritics={"system": "strip"}).load()["train"]) == 2

    def test_names_are_those_of_column_map(self, loader):
        rows = [{"سؤال": Q, "جواب": A}]
        some = loader(
            "sft", rows, column_map={"instruction": "سؤال", "response": "جواب"}, diacritics={"instruction": "strip"}
        )
        assert "من؟" in "".join(texts(some, some.load()["train"]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "المُعَلِّمُ في كتاب"),
        ({"normalize": False}, "المُعَلِّمُ فی كـتاب"),
        ({"diacritics": "strip"}, "المعلم في كتاب"),
        ({"diacritics": {"instruction": "strip", "output": "keep"}}, "المعلم في كتاب"),
        ({"diacritics": {"output": "strip"}}, "المُعَلِّمُ في كتاب"),
    ],
)
def test_prompts(settings, expected):
    turns = [{"role": role, "content": "المُعَلِّمُ فی كـتاب"} for role in ("system", "user", "assistant")]
    system, user, assistant = Normalizer(SFTConfig(**settings)).prompt(turns)
    assert user["content"] == expected
    assert (system, assistant) == (turns[0], turns[2])  # the run's own, and what the model has said


def test_clean_text_is_bit_identical(loader):
    rows = [{"instruction": f"اشرح {i}", "response": "جواب واضح، 1446هـ ﷺ"} for i in range(4)]
    on, off = (loader("sft", rows, normalize=value).load()["train"] for value in ("train", False))
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(on, off, strict=True))
    assert same(on, off) and on.summary() == off.summary()
