import json
import re
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from arabic_qwen.config import SFTConfig
from arabic_qwen.data import sources
from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.data.readers import Row
from arabic_qwen.data.sources import SAMPLES, read_rows
from arabic_qwen.errors import DatasetError
from tests.data.test_readers import CONVERSATION, TABLE, write_as


def read(dataset_path, **settings) -> list[Row | BadRow]:
    config = SFTConfig(dataset_path=dataset_path, **settings)
    return list(read_rows(config, config.dataset_path))


def values(dataset_path, **settings) -> list[dict]:
    return [row.values for row in read(dataset_path, **settings)]


class TestFolders:
    @pytest.mark.parametrize("saved", [False, True])
    def test_what_tells_the_data_is_of_what_is_read(self, tmp_path, saved):
        rows = [{"instruction": "a", "response": "b"}]
        if saved:
            datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path)
        else:
            write_as(rows, tmp_path / "a.jsonl")
        config = SFTConfig(dataset_path=str(tmp_path))
        before = sources.identity(config, config.dataset_path)
        assert len(before) == (3 if saved else 1)
        (tmp_path / "run").mkdir()
        write_as(rows, tmp_path / "run" / "metrics.jsonl")
        (tmp_path / "notes.txt").write_text("a")
        assert sources.identity(config, config.dataset_path) == before
        (next(tmp_path.rglob("*.arrow")) if saved else tmp_path / "a.jsonl").write_bytes(b"")
        assert sources.identity(config, config.dataset_path) != before

    def test_data_files_by_name(self, tmp_path):
        write_as(TABLE[1:], tmp_path / "b.csv.gz")
        write_as(TABLE[:1], tmp_path / "a.jsonl")
        (tmp_path / "README.md").write_text("#")
        (tmp_path / "c").mkdir()
        rows = read(tmp_path)
        assert [row.values for row in rows] == TABLE
        assert [Path(row.where.rpartition(":")[0]).name for row in rows] == ["a.jsonl", "b.csv.gz"]

    def test_no_data_files(self, tmp_path):
        (tmp_path / "data.txt").write_text("x")
        with pytest.raises(DatasetError, match=r"holds no data files; they are named \*\.jsonl"):
            read(tmp_path)

    def test_saved_data_set(self, tmp_path):
        datasets.Dataset.from_list(TABLE).save_to_disk(tmp_path / "saved")
        rows = read(tmp_path / "saved")
        assert [row.values for row in rows] == TABLE
        assert [row.where for row in rows] == [f"{tmp_path}/saved:row 1", f"{tmp_path}/saved:row 2"]

    def test_saved_splits(self, tmp_path):
        splits = {"train": datasets.Dataset.from_list(TABLE[:1]), "test": datasets.Dataset.from_list(TABLE[1:])}
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
        assert values(tmp_path) == TABLE[:1]
        assert values(tmp_path, dataset_split="test") == TABLE[1:]
        assert values([{"path": tmp_path, "split": "test"}]) == TABLE[1:]
        with pytest.raises(DatasetError, match="has no split 'dev', only train, test; in training set dataset_split"):
            read(tmp_path, dataset_split="dev")

    def test_damaged_saved_data_set(self, tmp_path):
        datasets.Dataset.from_list(TABLE).save_to_disk(tmp_path)
        next(tmp_path.glob("*.arrow")).write_bytes(b"x")
        with pytest.raises(DatasetError, match="cannot be read"):
            read(tmp_path)


class TestNames:
    @pytest.mark.parametrize("name", [f"sample:{sample}" for sample in SAMPLES])
    def test_samples_come_with_the_package(self, name):
        assert len(read(name)) >= 10

    def test_unknown_sample_lists_those_that_exist(self):
        with pytest.raises(DatasetError, match="sample:ppo: no such sample; choose one of sample:sft, "):
            read("sample:ppo")

    @pytest.mark.parametrize("name", ["data/none.csv", "none.json", "~/none.tsv.gz", "org/none.parquet"])
    def test_names_that_can_only_be_paths(self, name):
        with pytest.raises(DatasetError, match="No such file or directory"):
            read(name)

    @pytest.mark.parametrize("name", ["none", "a/b/c", "https://x.org/a", "./none", "~/none", "/none"])
    def test_names_that_are_nothing(self, name):
        with pytest.raises(DatasetError, match=rf"^{re.escape(name)}: does not exist; give a file named"):
            read(name)

    def test_a_path_that_exists_is_no_hub_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("org/name").mkdir(parents=True)
        write_as(TABLE, Path("org/name/a.json"))
        assert values("org/name") == TABLE

    def test_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_as(TABLE, tmp_path / "a.json")
        assert values("~/a.json") == TABLE

    @pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
    def test_no_rows(self, tmp_path, name):
        write_as(TABLE, tmp_path / name)
        if name == "a.parquet":
            datasets.Dataset.from_list(TABLE).select([]).to_parquet(tmp_path / name)
        else:
            (tmp_path / name).write_text({"a.json": "[]", "a.csv": "a,b\n"}.get(name, "\ufeff\r\n\n"))
        with pytest.raises(DatasetError, match=rf"{re.escape(name)}: holds no rows"):
            read(tmp_path / name)


class TestHub:
    def test_offline(self):
        started = time.perf_counter()
        with pytest.raises(
            DatasetError, match=r"^org/none: does not exist here, and the hub cannot be reached"
        ) as error:
            read("org/none")
        assert "\n" not in str(error.value)
        assert time.perf_counter() - started < 5

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError("[Errno -2] Name or service not known"), r"cannot be reached \(.Errno -2.* HF_HUB_OFFLINE=1"),
            (huggingface_hub.errors.RepositoryNotFoundError, "is neither a file or folder here nor a public set"),
            (huggingface_hub.errors.GatedRepoError, "is gated; accept its terms"),
        ],
    )
    def test_what_the_hub_says(self, monkeypatch, error, message):
        def fail(self, name, timeout):
            import httpx2

            raise (
                error
                if isinstance(error, OSError)
                else error("no\nno", response=httpx2.Response(404, request=httpx2.Request("GET", "x")))
            )

        monkeypatch.setattr(sources, "is_offline_mode", lambda: False)
        monkeypatch.setattr(sources.HfApi, "dataset_info", fail)
        with pytest.raises(DatasetError, match=rf"^org/none: .*{message}") as caught:
            read("org/none")
        assert "\n" not in str(caught.value)

    def test_split_and_configuration(self, monkeypatch):
        asked = []

        def load(*args, **settings):
            asked.append((args, settings))
            if settings["split"] == "dev":
                raise ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore")
            return datasets.Dataset.from_list(TABLE)

        monkeypatch.setattr(datasets, "load_dataset", load)
        rows = read("org/name", dataset_config="ar")
        assert [(row.where, row.values) for row in rows] == [(f"org/name:row {i}", v) for i, v in enumerate(TABLE, 1)]
        read([{"path": "org/name", "split": "test", "config": "en"}])
        assert asked == [
            (("org/name", "ar"), {"split": "train", "streaming": False}),
            (("org/name", "en"), {"split": "test", "streaming": False}),
        ]
        with pytest.raises(DatasetError, match=r"Should be one of \['train'\]; in training set dataset_split and"):
            read("org/name", dataset_split="dev")


class TestColumns:
    def test_mapped_columns_and_no_others(self, tmp_path):
        path = write_as([{"question": "س", "answer": "ج", "messages": "x"}], tmp_path / "a.jsonl")
        assert values(path, column_map={"instruction": "question", "response": "answer"}) == [
            {"instruction": "س", "response": "ج"}
        ]

    def test_of_one_entry(self, tmp_path):
        first = write_as([{"q": "س", "a": "ج"}], tmp_path / "a.csv")
        second = write_as([{"q": "1", "x": "2"}], tmp_path / "b.csv")
        entries = [first, {"path": second, "columns": {"instruction": "q", "response": "x"}}]
        assert values(entries, column_map={"instruction": "q", "response": "a"}) == [
            {"instruction": "س", "response": "ج"},
            {"instruction": "1", "response": "2"},
        ]
        assert values([first, {"path": second, "columns": {}}], column_map={"q": "q"})[1] == {"q": "1", "x": "2"}

    def test_missing_column(self, tmp_path):
        path = write_as([{"q": "1", "a": "2"}, {"q": "1"}], tmp_path / "a.jsonl")
        good, bad = read(path, column_map={"instruction": "q", "response": "a"})
        assert isinstance(good, Row)
        assert bad == BadRow(f"{path}:2", "column_map: has no a; its columns are q", {"q": "1"})


class TestCells:
    def test_lists_in_table_cells(self, tmp_path):
        conversation = json.dumps(CONVERSATION, ensure_ascii=False)
        path = write_as([{"chat": conversation, "n": "1"}], tmp_path / "a.csv")
        assert values(path, column_map={"messages": "chat"}) == [{"messages": CONVERSATION}]
        row = {
            "prompt": "[1, 2]",
            "chosen": conversation,
            "rejected": '[{"a": 1}]',
            "hard_negatives": '["x"]',
            "history": "",
        }
        assert values(write_as([row], tmp_path / "b.tsv")) == [
            {
                "prompt": "[1, 2]",
                "chosen": CONVERSATION,
                "rejected": '[{"a": 1}]',
                "hard_negatives": ["x"],
                "history": None,
            }
        ]

    def test_several_rejected_answers(self, tmp_path):
        rows = [{"rejected": '["خطأ", "غلط"]'}, {"rejected": "خطأ [1]"}]
        assert values(write_as(rows, tmp_path / "a.csv")) == [{"rejected": ["خطأ", "غلط"]}, rows[1]]

    @pytest.mark.parametrize(
        ("cell", "label"),
        [("True", True), ("false", False), ("1", 1), ("0", 0), ("desirable", "desirable"), ("", None), ("نعم", "نعم")],
    )
    def test_labels(self, tmp_path, cell, label):
        assert values(write_as([{"label": cell, "a": "1"}], tmp_path / "a.csv")) == [{"label": label, "a": "1"}]

    def test_text_of_other_formats_stays(self, tmp_path):
        path = write_as([{"messages": "[]", "label": "1"}], tmp_path / "a.jsonl")
        assert values(path) == [{"messages": "[]", "label": "1"}]


def test_rows_know_their_entry(tmp_path):
    path = write_as(TABLE, tmp_path / "a.json")
    assert [row.source for row in read([path, {"path": path, "weight": 2}])] == [0, 0, 1, 1]


def test_rows_of_several_sources_in_turn(tmp_path):
    for name, number in (("a", 4), ("b", 1), ("c", 2)):
        write_as([{"n": f"{name}{i}"} for i in range(number)], tmp_path / f"{name}.json")
    config = SFTConfig()
    rows = read_rows(config, [str(tmp_path / f"{name}.json") for name in "abc"], stream=True)
    assert [row.values["n"] for row in rows] == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]
