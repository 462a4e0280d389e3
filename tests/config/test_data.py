import re
from pathlib import Path

import pytest

from arabic_qwen.config import DPOConfig, SFTConfig, load_config
from arabic_qwen.config.data import DataSource, data_sources, describe
from arabic_qwen.errors import ConfigurationError

ENTRIES = [
    "a.jsonl",
    {"path": "org/name", "weight": 0.5, "split": "test", "config": "ar", "columns": {"prompt": "سؤال"}},
]


def test_one_name_stays_a_string():
    assert SFTConfig(dataset_path=Path("a.jsonl")).dataset_path == "a.jsonl"
    assert data_sources("a.jsonl") == [DataSource(path="a.jsonl")]


def test_a_list():
    config = SFTConfig(dataset_path=[Path("a.jsonl"), ENTRIES[1]], eval_dataset_path=["b.csv"])
    assert config.dataset_path == ENTRIES
    assert data_sources(config.dataset_path)[1].columns == {"prompt": "سؤال"}
    assert describe(config.dataset_path) == "a.jsonl, org/name × 0.5"


@pytest.mark.parametrize("field", ["dataset_path", "eval_dataset_path"])
def test_yaml_round_trip(tmp_path, field):
    config = DPOConfig(**{field: ENTRIES}, column_map={"prompt": "q", "chosen": "c"})
    config.to_yaml(tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config


def test_overrides_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/d")
    (tmp_path / "run.yaml").write_text(
        "method: sft\ndataset_path:\n  - {path: '${DATA}/a.csv', weight: 2}\n  - ${DATA}/b\n"
    )
    assert load_config(tmp_path / "run.yaml").dataset_path == [{"path": "/d/a.csv", "weight": 2}, "/d/b"]
    overrides = ["dataset_path=[a.jsonl,b.csv]", "column_map={instruction: q}"]
    config = load_config(tmp_path / "run.yaml", overrides)
    assert (config.dataset_path, config.column_map) == (["a.jsonl", "b.csv"], {"instruction": "q"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "is an empty list"),
        ({"path": "a"}, "is a mapping; put it into a list"),
        (3, "must be a path or hub id, or a list of them"),
        (["a", 3], "entry 2: must be a path or hub id"),
        ("", "must be a path or hub id"),
        ([{"weight": 2}], "entry 1: must be a path or hub id"),
        (
            [{"path": "a", "wieght": 2}],
            "entry 1: wieght: unknown key; an entry has path, weight, split, config, columns",
        ),
        ([{"path": "a", "weight": 0}], "entry 1: weight: input should be greater than 0"),
        ([{"path": "a", "columns": {"a": 1}}], "entry 1: columns.a: input should be a valid string"),
    ],
)
def test_wrong_values(value, message):
    with pytest.raises(ConfigurationError, match=f"^dataset_path: {re.escape(message)}") as error:
        SFTConfig(dataset_path=value)
    assert "\n" not in str(error.value)
