"""Hostile data: bombs, links, payloads and noise. Each is an error or a bad row of ours, within bounded memory."""

import contextlib
import csv
import gzip
import io
import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arabic_qwen.config import SFTConfig
from arabic_qwen.data import readers
from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.data.conversations import to_conversation
from arabic_qwen.data.preferences import to_contrast, to_feedback, to_measured_pair, to_pair
from arabic_qwen.data.readers import Row, read_file
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import DatasetError
from tests.data.test_readers import TEXT_NAMES, compressed, write_as

ROWS = [{"instruction": "س", "response": "ج"}] * 3


def error_of(path, **options) -> str:
    with pytest.raises(DatasetError) as error:
        list(read_rows(SFTConfig(), str(path), **options))
    return str(error.value)


@pytest.fixture
def short(monkeypatch):
    """Limits that small files exceed."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    monkeypatch.setattr(readers, "LARGEST_CHUNK", 10_000)
    monkeypatch.setattr(readers, "_UNPACKED", 20_000)


class TestBombs:
    @pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.zst", "a.parquet", "a.tsv"])
    def test_a_row_that_is_too_long(self, short, tmp_path, name):
        path = write_as([*ROWS, {"instruction": "س", "response": "a" * 1001}], tmp_path / name)
        assert "the row has more than 0 MiB, which no conversation has; remove it" in error_of(path)

    def test_a_csv_row_of_many_short_lines(self, short, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("a,b\n1,2\n" + '"' + "\n" * 1001)
        assert f"{path}:3: the row has more than" in error_of(path)
        path.write_text("a,b\n" + "1,2\n" * 1001)
        assert len(list(read_file(path))) == 1001

    @pytest.mark.parametrize("name", [name for name in TEXT_NAMES if name.endswith((".gz", ".zst"))])
    def test_files_that_unpack_to_far_more(self, short, tmp_path, name):
        path = tmp_path / name
        path.write_bytes(compressed(b"\n" * 10**6, path.suffix))
        said = error_of(path)
        assert said == (
            f"{path}: unpacks to more than 200 times its size; unpack it yourself where you trust it"
        ) or said.startswith(f"{path}: has more than 0 GiB")

    def test_files_that_unpack_to_much_are_read(self, monkeypatch, tmp_path):
        monkeypatch.setattr(readers, "_UNPACKED", 1000)
        path = write_as([{"instruction": str(i), "response": "ج" * 9} for i in range(1000)], tmp_path / "a.jsonl.gz")
        assert len(list(read_file(path))) == 1000

    def test_json_that_has_to_be_read_as_a_whole(self, short, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("[" + "{}," * 5000)
        assert error_of(path) == f"{path}: has more than 0 GiB; write JSON Lines, one object a line"

    @pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 10**5, '{"a": ' + "9" * 5000 + "}"])
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_deep_json_and_long_numbers(self, tmp_path, text, name):
        path = tmp_path / name
        path.write_text(text)
        with contextlib.suppress(DatasetError):
            assert all(isinstance(row, BadRow) for row in read_file(path))

    def test_a_value_that_parquet_repeats(self, monkeypatch, tmp_path):
        """A dictionary page holds it once; unpacked at a time are as many rows as fit."""
        monkeypatch.setattr(readers, "LARGEST_CHUNK", 10**6)
        table = pa.table({"instruction": ["a" * 200_000] * 100, "response": ["b"] * 100})
        pq.write_table(table, tmp_path / "a.parquet")
        asked = []
        before = pq.ParquetFile.iter_batches
        monkeypatch.setattr(
            pq.ParquetFile,
            "iter_batches",
            lambda self, batch_size: asked.append(batch_size) or before(self, batch_size),
        )
        assert len(list(read_file(tmp_path / "a.parquet"))) == 100
        assert asked == [pytest.approx(5, abs=1)]


class TestPaths:
    def test_links_out_of_a_folder(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_as(ROWS, tmp_path / "outside.jsonl")
        (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "outside.jsonl")
        said = error_of(tmp_path / "data")
        assert said == (f"{tmp_path}/data/a.jsonl: is a link that leads out of {tmp_path}/data; name what it leads to")

    def test_links_within_and_folders_that_are_links(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_as(ROWS, tmp_path / "data" / "a.jsonl")
        (tmp_path / "data" / "b.jsonl").symlink_to("a.jsonl")
        (tmp_path / "link").symlink_to(tmp_path / "data")
        assert len(list(read_rows(SFTConfig(), str(tmp_path / "link")))) == 6

    def test_the_hubs_cache(self, tmp_path):
        snapshot, blobs = tmp_path / "set" / "snapshots" / "0", tmp_path / "set" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        write_as(ROWS, tmp_path / "rows.jsonl").rename(blobs / "1")
        (snapshot / "a.jsonl").symlink_to("../../blobs/1")
        assert len(list(read_rows(SFTConfig(), str(snapshot)))) == 3
        (snapshot / "b.jsonl").symlink_to("../../../elsewhere")
        assert "leads out of" in error_of(snapshot)

    @pytest.mark.parametrize("name", ["../../other.arrow", "/etc/passwd", ".."])
    def test_saved_data_set_that_names_files_elsewhere(self, tmp_path, name):
        folder = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"] = [{"filename": name}]
        (folder / "state.json").write_text(json.dumps(state))
        assert f"state.json names {name!r}, which is not in its folder" in error_of(folder)

    def test_saved_splits_elsewhere_and_links(self, tmp_path):
        folder = tmp_path / "saved"
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(folder)
        (folder / "train").rename(tmp_path / "train")
        (folder / "train").symlink_to(tmp_path / "train")
        assert "leads out of" in error_of(folder)
        (folder / "train").unlink()
        (folder / "dataset_dict.json").write_text('{"splits": ["../train"]}')
        assert "dataset_dict.json names '../train'" in error_of(folder)

    def test_archives_are_no_data(self, tmp_path):
        for name in ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.jsonl.tar"):
            (tmp_path / name).write_bytes(b"")
            assert not readers.is_data_file(name)

    def test_nothing_extracts_archives(self):
        package = Path(readers.__file__).parents[1]
        source = "".join(path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py")))
        assert not any(name in source for name in ("tarfile", "zipfile", "unpack_archive", "yaml.load("))


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class TestPayloads:
    @pytest.fixture(autouse=True)
    def marker(self, tmp_path):
        path = tmp_path / "marker"
        yield path
        assert not path.exists(), "a payload was run"

    @pytest.mark.parametrize("saved", [False, True])
    def test_loading_scripts(self, tmp_path, marker, saved):
        folder = tmp_path / "set"
        folder.mkdir()
        for name in ("set.py", "__init__.py", "conftest.py", "dataset_infos.py"):
            (folder / name).write_text(f"open({str(marker)!r}, 'w')")
        if saved:
            datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        else:
            assert "holds no data files" in error_of(folder)
            write_as(ROWS, folder / "a.jsonl")
        assert len(list(read_rows(SFTConfig(), str(folder)))) == 3

    @pytest.mark.parametrize("extension", ["arrow.py_extension_type", "pandas", "none.such"])
    def test_pickled_extension_types(self, tmp_path, marker, extension):
        metadata = {
            b"ARROW:extension:name": extension.encode(),
            b"ARROW:extension:metadata": pickle.dumps(Payload(marker)),
        }
        fields = [pa.field(name, pa.string(), metadata=metadata) for name in ROWS[0]]
        table = pa.table(
            {name: ["a"] for name in ROWS[0]}, schema=pa.schema(fields, {b"pandas": pickle.dumps(Payload(marker))})
        )
        pq.write_table(table, tmp_path / "a.parquet")
        assert [row.values for row in read_file(tmp_path / "a.parquet")] == [{"instruction": "a", "response": "a"}]

        folder = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        with (
            pa.OSFile(str(next(folder.glob("*.arrow"))), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        with contextlib.suppress(DatasetError):
            list(read_rows(SFTConfig(), str(folder)))

    @pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"])
    def test_pickles_named_as_data(self, tmp_path, marker, name):
        (tmp_path / name).write_bytes(compressed(pickle.dumps(Payload(marker)), Path(name).suffix))
        with contextlib.suppress(DatasetError):
            assert all(isinstance(row, BadRow) for row in read_file(tmp_path / name))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ROLES = st.sampled_from(["assistant", "gpt", "human", "system", "tool", "user", "مستخدم"]) | JSON
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"content": JSON, "from": ROLES, "role": ROLES, "value": JSON}) | JSON,
    max_size=4,
)
COLUMNS = (
    *("chosen", "chosen_length", "completion", "conversations", "hard_negatives", "history", "input", "inputs"),
    *("instruction", "label", "messages", "output", "prompt", "rejected", "rejected_length", "response", "system"),
    "targets",
)
CELL = JSON | MESSAGES | MESSAGES.map(str) | MESSAGES.map(lambda value: json.dumps(value, default=str))


@settings(max_examples=100)
@given(values=st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=5), CELL, max_size=5), needed=CELL)
@example(values={"messages": "[{'role': 'user', 'content': " + "[" * 5000}, needed=None)
@example(values={"messages": "[" * 50_000}, needed=None)
@example(values={"chosen": [], "rejected": []}, needed=[[]])
@pytest.mark.parametrize(
    ("read", "columns"),
    [
        (to_conversation, ("messages",)),
        (to_conversation, ("instruction", "response")),
        (to_pair, ("prompt", "chosen", "rejected")),
        (to_measured_pair, ("prompt", "chosen", "rejected")),
        (to_contrast, ("prompt", "chosen", "rejected")),
        (to_feedback, ("prompt", "completion", "label")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "+".join(value),
)
def test_any_row_is_read_or_refused_as_a_row(read, columns, values, needed):
    with contextlib.suppress(ValueError):  # RowError
        read({**dict.fromkeys(columns, needed), **values}, "أجب.")


def mutated(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in changes:
        start = place % (len(data) + 1)
        data = data[:start] + new + data[start + length :]
    return data


def valid(name: str) -> bytes:
    buffer = io.BytesIO()
    rows = [{"instruction": f"سؤال {i}", "response": 'جواب, "نعم"\n'} for i in range(5)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), buffer)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    elif ".json" in name and ".jsonl" not in name:
        buffer.write(json.dumps(rows).encode())
    elif "jsonl" in name:
        buffer.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        out = io.StringIO()
        csv.writer(out, delimiter="\t" if ".tsv" in name else ",").writerows(
            [list(ROWS[0]), *(row.values() for row in rows)]
        )
        buffer.write(out.getvalue().encode())
    return compressed(buffer.getvalue(), Path(name).suffix)


CHANGES = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
@pytest.mark.parametrize("name", [name for name in TEXT_NAMES if ".ndjson" not in name] + ["data.parquet"])
def test_damaged_files(tmp_path, name, changes):
    path = tmp_path / name
    path.write_bytes(mutated(valid(name), changes))
    try:
        rows = list(read_file(path))
    except DatasetError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert all(isinstance(row, (BadRow, Row)) for row in rows)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
@pytest.mark.parametrize("name", sorted(["a.csv", "a.json", "a.jsonl", "a.parquet", "a.tsv"]))
def test_any_bytes(tmp_path, name, data):
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        with contextlib.suppress(DatasetError):
            list(read_file(path))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=CHANGES, state=st.dictionaries(st.sampled_from(["_data_files", "_split", "_format_type"]), JSON, max_size=1)
)
def test_damaged_saved_data_sets(tmp_path, changes, state):
    folder = tmp_path / "saved"
    if not folder.exists():
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        (folder / "state.json").rename(tmp_path / "state.json")
    (folder / "data-00000-of-00001.arrow").write_bytes(mutated(valid("a.arrow"), changes))
    good = json.loads((tmp_path / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**good, **state}))
    with contextlib.suppress(DatasetError):
        list(read_rows(SFTConfig(), str(folder)))
