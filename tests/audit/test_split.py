"""data split: the same share of each dialect on both sides, and no question on both."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.audit.split import PARTS, _choose, split
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text.dialects import UNKNOWN, Prediction


class FirstWord:
    """A classifier that goes by the text's first word."""

    def predict(self, texts):
        return [Prediction(text.split()[0] if text else UNKNOWN, 1.0) for text in texts]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows():
    dialects = ["EGY"] * 60 + ["MSA"] * 40
    return [{"prompt": f"سؤال {n}", "completion": f"{name} جواب {n}"} for n, name in enumerate(dialects)]


def test_dialects_have_the_same_share(tmp_path, rows):
    made = split(write(tmp_path / "all.jsonl", rows), tmp_path / "parts", FirstWord(), 0.1)
    assert made.dialects == {"train": {"EGY": 54, "MSA": 36}, "validation": {"EGY": 6, "MSA": 4}}
    parts = {part: read(tmp_path / "parts" / f"{part}.jsonl") for part in PARTS}
    assert sorted(map(str, parts["train"] + parts["validation"])) == sorted(map(str, rows))
    assert parts["validation"] == [row for row in rows if row in parts["validation"]]  # in the file's order


def test_the_seed_decides(tmp_path, rows):
    file = write(tmp_path / "all.jsonl", rows)
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split(file, tmp_path / name, FirstWord(), 0.1, seed)
        texts.append((tmp_path / name / "validation.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


def test_questions_that_differ_in_spelling_stay_together(tmp_path):
    spellings = ["ما إسم المدرسة؟", "ما اسم المدرسه؟", "ما اسمُ المدرسةِ؟"]
    rows = [{"prompt": text, "completion": f"EGY {n}"} for n, text in enumerate(spellings)]
    rows += [{"prompt": f"سؤال {n}", "completion": "EGY جواب"} for n in range(9)]
    for seed in range(5):
        made = split(write(tmp_path / "all.jsonl", rows), tmp_path / str(seed), FirstWord(), 0.3, seed)
        prompts = {part: {row["prompt"] for row in read(made.files[part])} for part in PARTS}
        assert len(prompts["validation"] & set(spellings)) in (0, 3)


def test_bad_rows_are_left_out_and_counted(tmp_path, rows):
    file = write(tmp_path / "all.jsonl", [*rows, {"prompt": "سؤال", "completion": ""}, ["no object"]])
    made = split(file, tmp_path / "parts", FirstWord())
    assert made.bad_rows == 2
    assert sum(made.dialects[part].total() for part in PARTS) == len(rows)


def test_nothing_is_overwritten(tmp_path, rows):
    (tmp_path / "validation.jsonl").write_text("kept")
    with pytest.raises(ConfigurationError, match=r"validation\.jsonl: exists already"):
        split(write(tmp_path / "all.jsonl", rows), tmp_path, FirstWord())
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(("prompts", "share"), [(1, 0.5), (4, 0.1), (4, 1.0), (4, 0.0)])
def test_too_few_rows_for_two_parts(tmp_path, prompts, share):
    rows = [{"prompt": f"سؤال {n % prompts}", "completion": "EGY جواب"} for n in range(4)]
    with pytest.raises(DatasetError, match="cannot be split with --share"):
        split(write(tmp_path / "all.jsonl", rows), tmp_path / "parts", FirstWord(), share)
    assert not (tmp_path / "parts" / "train.jsonl").exists()


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["MSA", "EGY", UNKNOWN]))),
    st.floats(0, 1),
    st.integers(),
)
def test_the_share_is_never_exceeded(rows, share, seed):
    groups = [name.encode() for name, _ in rows]
    held_out = _choose(groups, [dialect for _, dialect in rows], share, seed)
    assert sum(group in held_out for group in groups) <= share * len(rows) + 1e-6
