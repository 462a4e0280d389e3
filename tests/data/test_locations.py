"""Rows' places as integers, and what the loaders note."""

import json

from arabic_qwen.data.locations import RowLocations, name_rows
from tests.engine.test_trainer import sft_config
from tests.preference_runs import preference_config, ready, write_data


def test_a_place_is_what_was_put_in():
    places = RowLocations()
    given = ["data.jsonl:12", "data.jsonl:9", "2024/07.csv:row 3", "row 0", "no number", f"x:{2**39}"]
    codes = [places.encode(place) for place in given]
    assert [places.decode(code) for code in codes] == given
    assert codes == [places.encode(place) for place in given]


def test_rows_are_named_once_in_order_and_at_most_ten():
    places = RowLocations()
    codes = [places.encode(f"a:{n}") for n in (10, 9, 9)]
    assert name_rows(places, codes) == "a:9, a:10"
    many = [places.encode(f"a:{n}") for n in range(1, 13)]
    assert name_rows(places, many).endswith("a:10, … and 2 more")
    assert name_rows(places, [-1]) == name_rows(None, codes) == "rows whose place is not known"


def test_each_group_knows_its_line(model_dir, sft_file, tmp_path):
    trainer = ready(sft_config(model_dir, sft_file, tmp_path / "run"), seed=None)
    lines = sft_file.read_text(encoding="utf-8").splitlines()
    for split in trainer.dataset.values():
        for group in split.groups:
            file, _, line = split.places.decode(group.row).rpartition(":")
            assert file == str(sft_file)
            answer = json.loads(lines[int(line) - 1])["response"]
            assert answer in trainer.tokenizer.decode(group.completions[0].ids)
    given = trainer.get_data_loader().encode([{"instruction": "س", "response": "ج"}] * 2)
    assert [given.places.decode(group.row) for group in given] == ["row 0", "row 1"]


def test_both_halves_of_a_pair_are_its_row(model_dir, tmp_path):
    data = write_data("dpo", tmp_path)
    trainer = ready(preference_config("kto", model_dir, data, tmp_path / "run", unpair_preferences=True), seed=None)
    rows = [group.row for group in trainer.dataset["train"].groups]
    assert rows[::2] == rows[1::2] and len(set(rows)) == len(rows) // 2
