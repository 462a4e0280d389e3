import gzip
import json

import pytest

from arabic_qwen.audit.rows import expected_rows, measure, read_texts, sample_rows
from arabic_qwen.audit.statistics import RowTexts
from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.errors import ConfigurationError, DatasetError

GOOD = {"instruction": "ما عاصمة مصر؟", "response": "القاهرة"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(GOOD), "{broken", json.dumps({**GOOD, "response": " "}), json.dumps(GOOD)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_rows_that_cannot_be_trained_on_are_counted_apart(file):
    kinds = [type(row) for row in read_texts([file])]
    assert kinds == [RowTexts, BadRow, BadRow, RowTexts]
    statistics = measure(read_texts([file]))
    assert (statistics.rows, statistics.bad_rows) == (2, 2)
    assert statistics.as_dict()["bad_rows"] == 2


def test_the_method_says_how_rows_are_read():
    kinds = {method: type(next(read_texts(["sample:dpo"], method))) for method in ("", "dpo", "sft", "kto")}
    assert kinds == {"": RowTexts, "dpo": RowTexts, "sft": BadRow, "kto": BadRow}


def test_several_sources_count_as_one():
    assert measure(read_texts(["sample:sft", "sample:dpo", "sample:kto"])).rows == 240 + 80 + 80


def test_no_usable_row_is_an_error(file):
    for count in (measure, lambda rows: sample_rows(rows, 5)):
        with pytest.raises(DatasetError, match=r"rows\.jsonl:1.*no other row can be trained on either"):
            count(read_texts([file], "dpo"))


def test_unknown_method():
    with pytest.raises(ConfigurationError, match="--method: 'ppo' is unknown; choose one of"):
        next(read_texts(["sample:sft"], "ppo"))


def test_expected_rows(file, tmp_path):
    assert expected_rows([file, file]) == 8
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}\n"))
    assert expected_rows([file, str(packed)]) is None
    assert expected_rows(["sample:sft"]) is None
    long = tmp_path / "long.jsonl"
    long.write_text("x" * 99 + "\n", encoding="utf-8")
    long.write_bytes(long.read_bytes() * 40_000)
    assert expected_rows([str(long)]) == pytest.approx(40_000, rel=0.01)


def test_sample_is_seeded_and_fair():
    rows = [RowTexts(str(number), ("ج",)) for number in range(1000)]
    sample = sample_rows(iter(rows), 100)
    assert (sample.rows, len(sample.chosen), len(set(sample.chosen))) == (1000, 100, 100)
    assert sample.chosen == sample_rows(iter(rows), 100).chosen
    assert sample.chosen != sample_rows(iter(rows), 100, seed=1).chosen
    assert 300 < sum(int(row.prompt) for row in sample.chosen) / 100 < 700
    assert sample_rows(iter(rows), 5000).chosen == rows
