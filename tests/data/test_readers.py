import csv
import gzip
import io
import json
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.data.readers import Row, is_data_file, read_file
from arabic_qwen.errors import DatasetError

CONVERSATION = [{"role": "user", "content": "ما عاصمة مصر؟"}, {"role": "assistant", "content": "القاهرة"}]
TABLE = [
    {"instruction": "ما عاصمة الأردن؟", "response": 'هي "عمّان"،\nوهي أكبر مدنه؛ نعم, أكبرها\tحقًّا'},
    {"instruction": "مُحَمَّدٌ ـــ ﷺ لا‏ \u200f٣ ک ی\u2028سطر", "response": "👨‍👩‍👧 [1, 2] {x} 'y'"},
]


def write_as(rows: list[dict], path: Path) -> Path:
    """Write rows in the format of the path's name; every cell is text."""
    suffixes = path.suffixes
    if suffixes[0] == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if suffixes[0] == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    elif suffixes[0] in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if suffixes[0] == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(compressed(text.encode(), path.suffix))
    return path


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pa.compress(data, "zstd", asbytes=True) if suffix == ".zst" else data


TEXT_NAMES = [
    f"data{kind}{packed}" for kind in (".csv", ".json", ".jsonl", ".ndjson", ".tsv") for packed in ("", ".gz", ".zst")
]


@pytest.fixture
def write(tmp_path):
    """Bytes or text -> a data file that holds them."""

    def write(content: bytes | str, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def values(path: Path) -> list[dict]:
    return [row.values for row in read_file(path) if isinstance(row, Row)]


def bad(path: Path) -> dict[str, str]:
    """What follows the path in a bad row's place -> the reason."""
    return {row.where.removeprefix(str(path)): row.reason for row in read_file(path) if isinstance(row, BadRow)}


class TestEveryFormat:
    @pytest.mark.parametrize("name", [*TEXT_NAMES, "data.parquet", "DATA.JSONL", "data.CSV.GZ"])
    def test_gives_the_same_rows(self, tmp_path, name):
        write_as(TABLE, tmp_path / name.lower()).rename(tmp_path / name)
        assert values(tmp_path / name) == TABLE

    @pytest.mark.parametrize("name", sorted(set(TEXT_NAMES)))
    def test_with_byte_order_mark(self, tmp_path, name):
        path = write_as(TABLE, tmp_path / name)
        plain = write_as(TABLE, tmp_path / f"plain{Path(name).suffixes[0]}").read_bytes()
        path.write_bytes(compressed(b"\xef\xbb\xbf" + plain, path.suffix))
        assert values(path) == TABLE

    @pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
    def test_nested_values(self, tmp_path, name):
        rows = [{"messages": CONVERSATION}, {"messages": CONVERSATION * 2}]
        assert values(write_as(rows, tmp_path / name)) == rows

    @pytest.mark.parametrize(
        ("name", "places"),
        [
            ("data.jsonl", [":1", ":2"]),
            ("data.json", [":row 1", ":row 2"]),
            ("data.csv", [":2", ":4"]),  # the first row has a line break in a cell
            ("data.tsv.gz", [":2", ":4"]),
            ("data.parquet", [":row 1", ":row 2"]),
        ],
    )
    def test_places(self, tmp_path, name, places):
        path = write_as(TABLE, tmp_path / name)
        assert [row.where for row in read_file(path)] == [f"{path}{place}" for place in places]

    @pytest.mark.parametrize("name", [*TEXT_NAMES, "data.parquet"])
    def test_missing_file(self, tmp_path, name):
        with pytest.raises(
            DatasetError, match=rf"{name}: cannot be read \(No such file or directory\); check its name"
        ):
            list(read_file(tmp_path / name))

    @pytest.mark.parametrize("name", [*(n for n in TEXT_NAMES if n.endswith(("z", "zst"))), "data.parquet"])
    @pytest.mark.parametrize("damage", ["cut off", "something else"])
    def test_damaged_file(self, tmp_path, name, damage):
        path = write_as(TABLE * 50, tmp_path / name)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage == "cut off" else b"<html>404</html>" * 9)
        with pytest.raises(
            DatasetError, match=rf"{name}: is damaged, or not what its name says \(.+\); make or copy"
        ) as error:
            list(read_file(path))
        assert "\n" not in str(error.value)

    @given(
        st.lists(
            st.fixed_dictionaries(
                {name: st.text(st.characters(codec="utf-8", exclude_characters="\r\0")) for name in ("س", "b")}
            ),
            min_size=1,
        ),
        st.sampled_from(["data.csv", "data.json", "data.jsonl", "data.parquet", "data.tsv"]),
    )
    def test_any_text_survives(self, rows, name):
        with tempfile.TemporaryDirectory() as folder:
            assert values(write_as(rows, Path(folder, name))) == rows


class TestJsonLines:
    def test_blank_lines_count_as_lines(self, write):
        path = write('\n{"a": 1}\n   \n\t\n{"a": 2}\n\n')
        assert [row.where for row in read_file(path)] == [f"{path}:2", f"{path}:5"]

    @pytest.mark.parametrize("content", [b'{"a": 1}\n{"a": 2}', b'{"a": 1}\r\n{"a": 2}\r\n'])
    def test_line_ends(self, write, content):
        assert values(write(content)) == [{"a": 1}, {"a": 2}]

    def test_bad_lines_are_named_and_the_others_read(self, write):
        path = write('{"a": 1}\n{"a": }\n[1, 2]\n"text"\nnull\n{"a": 1} {"a": 2}\n{"a": 2}\n{"a"\n')
        found = bad(path)
        assert list(found) == [":2", ":3", ":4", ":5", ":6", ":8"]
        assert all(found[place].startswith("not valid JSON (") for place in (":2", ":6", ":8"))
        assert found[":3"] == "must be a JSON object, found a list"
        assert values(path) == [{"a": 1}, {"a": 2}]
        assert [row.row for row in read_file(path) if isinstance(row, BadRow)][:2] == ['{"a": }', [1, 2]]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"\x00\x00\x00", "not valid JSON"),
            (b'{"a": "x\x00y"}', "not valid JSON"),
            (b'{"a": "\xff"}', "is not UTF-8 text (byte 8: "),
            ('{"a": "مرحبا"}'.encode("cp1256"), "is not UTF-8 text"),
            (b"[" * 200_000, "not valid JSON"),
            (b'{"a": ' + b"[" * 200_000 + b"}", "not valid JSON"),
            (b'{"a": ' + b"7" * 5_000 + b"}", "not valid JSON"),
        ],
        ids=["NULs", "NUL in a string", "invalid byte", "Windows Arabic", "deep", "deeper", "huge number"],
    )
    def test_damaged_line_is_named(self, write, line, reason):
        found = bad(write(b'{"a": 1}\n' + line + b'\n{"a": 2}\n'))
        assert list(found) == [":2"]
        assert found[":2"].startswith(reason)

    def test_utf16_file(self, write):
        assert "is not UTF-8 text, but probably UTF-16" in bad(write('{"a": "مرحبا"}\n'.encode("utf-16")))[":1"]

    def test_how_a_packed_file_is_converted(self, write):
        line = '{"a": "مرحبا بكم"}\n'
        reason = bad(write(gzip.compress(line.encode("cp1256")), "my rows.jsonl.gz"))[":1"]
        assert reason.endswith("zcat 'my rows.jsonl.gz' | iconv -f WINDOWS-1256 -t UTF-8 > 'utf8-my rows.jsonl'")


class TestJson:
    @pytest.mark.parametrize(
        "text",
        [
            '[{"a": 1}, {"a": 2}]',
            '{"data": [{"a": 1}, {"a": 2}]}',
            '{"version": "1", "tags": ["x"], "rows": [{"a": 1}, {"a": 2}]}',
            '{"a": 1}\n{"a": 2}\n',  # JSON Lines by another name
            '\ufeff{"a": 1}\r\n\r\n{"a": 2}',
        ],
    )
    def test_layouts(self, write, text):
        assert values(write(text, "data.json")) == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"a": 1},\n{"a": }]', r"data.json:2: not valid JSON \(Expecting value\)"),
            ('[{"a": 1}', r"data.json:1: not valid JSON"),
            ("[" * 200_000, r"data.json: not valid JSON \(nested too deeply\)"),
            ("3", "data.json: must hold an array of objects, found a int"),
            ('{"a": [1], "b": "x"}', r"data.json: is an object with 0 lists of rows \(none\)"),
            ('{"a": [{}], "b": [{}]}', r"data.json: is an object with 2 lists of rows \(a, b\)"),
        ],
    )
    def test_files_without_rows_in_them(self, write, text, message):
        with pytest.raises(DatasetError, match=message):
            list(read_file(write(text, "data.json")))

    def test_wrong_encoding(self, write):
        with pytest.raises(DatasetError, match=r"data.json: is not UTF-8 text \(byte 9: .*save the file as UTF-8"):
            list(read_file(write(b'[{"a": "\xff"}]', "data.json")))
        with pytest.raises(
            DatasetError, match=r"data.json: is not UTF-8 text, but probably WINDOWS-1256; convert .*iconv"
        ):
            list(read_file(write('[{"a": "مرحبا"}]'.encode("cp1256"), "data.json")))

    def test_items_that_are_no_objects(self, write):
        assert bad(write('[{"a": 1}, 2, null]', "data.json")) == {
            ":row 2": "must be a JSON object, found a int",
            ":row 3": "must be a JSON object, found a NoneType",
        }


class TestCsv:
    def test_semicolons_of_spreadsheets(self, write):
        assert values(write("a;b\r\nنعم, حقًّا;2\r\n", "data.csv")) == [{"a": "نعم, حقًّا", "b": "2"}]

    def test_ragged_rows_are_named(self, write):
        path = write("a,b\n1,2\n3\n\n4,5,6\n7,8\n", "data.csv")
        assert bad(path) == {
            ":3": "has 1 cells, but the header names 2 columns",
            ":5": "has 3 cells, but the header names 2 columns",
        }
        assert values(path) == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]

    @pytest.mark.parametrize("row", ['1,"x"y', '1,"never closed'])
    def test_quotes_that_hide_where_rows_begin(self, write, row):
        with pytest.raises(DatasetError, match=r"data\.csv:3: not valid CSV \(.+\); close every quoted cell"):
            list(read_file(write(f"a,b\n0,z\n{row}\n2,z\n", "data.csv")))

    def test_long_cell(self, write):
        assert values(write("a\n" + "x" * 500_000, "data.csv")) == [{"a": "x" * 500_000}]

    def test_wrong_encoding(self, write):
        path = write("a,b\n1,2\nمرحبا,2\n".encode("cp1256"), "data.csv")
        convert = (
            "is not UTF-8 text, but probably {0}; convert the file: iconv -f {0} -t UTF-8 data.csv > utf8-data.csv"
        )
        assert bad(path) == {":3": convert.format("WINDOWS-1256")}
        for text, encoding in ("سؤال,b\n".encode("cp1256"), "WINDOWS-1256"), ("a,b\n1,2\n".encode("utf-16"), "UTF-16"):
            with pytest.raises(DatasetError, match=re.escape("data.csv:1: " + convert.format(encoding))):
                list(read_file(write(text, "data.csv")))

    def test_a_column_named_twice(self, write):
        with pytest.raises(DatasetError, match=r"data\.csv:1: the header names 'a' twice"):
            list(read_file(write("a,b,a\n1,2,3\n", "data.csv")))

    @pytest.mark.parametrize("text", ["", "a,b\n"])
    def test_no_rows(self, write, text):
        assert list(read_file(write(text, "data.csv"))) == []


@pytest.mark.parametrize("name", ["data.txt", "data", "data.gz", "data.parquet.gz", "data.xlsx", ""])
def test_unknown_format(name):
    assert not is_data_file(name)
    with pytest.raises(DatasetError, match=r"unknown format; give a file named \*.jsonl"):
        list(read_file(Path(name)))
