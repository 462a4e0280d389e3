import json
from pathlib import Path

import pytest

from arabic_qwen.data.readers import SAMPLES, raise_problems, read_rows
from arabic_qwen.errors import DatasetError


@pytest.fixture
def write(tmp_path):
    """Bytes or text -> a data file that holds them."""

    def write(content: bytes | str, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_rows_in_order_with_their_places(write):
    path = write('{"a": 1}\n{"a": 2}\n')
    assert [row.values for row in read_rows(path)] == [{"a": 1}, {"a": 2}]
    assert [row.where for row in read_rows(str(path))] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_count_as_lines(write):
    path = write('\n{"a": 1}\n   \n\t\n{"a": 2}\n\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    "content", [b'{"a": 1}\n{"a": 2}', b'{"a": 1}\r\n{"a": 2}\r\n', b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n']
)
def test_line_ends_and_byte_order_mark(write, content):
    assert [row.values for row in read_rows(write(content))] == [{"a": 1}, {"a": 2}]


def test_arabic_is_read_unchanged(write):
    text = "مُحَمَّدٌ ـــ ﷺ لا‏ \u200f٣ ک ی\u2028سطر"
    (row,) = read_rows(write(json.dumps({"نص": text}, ensure_ascii=False)))
    assert row.values == {"نص": text}
    (row,) = read_rows(write(json.dumps({"نص": text})))
    assert row.values == {"نص": text}


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson"])
def test_names(write, name):
    assert len(read_rows(write("{}", name))) == 1


def test_all_bad_lines_are_named_at_once(write):
    path = write('{"a": 1}\n{"a": }\n[1, 2]\n"text"\nnull\n{"a": 1} {"a": 2}\n{"a": 2}\n{"a"\n')
    with pytest.raises(DatasetError) as error:
        read_rows(path)
    message = str(error.value)
    for line in (2, 6, 8):
        assert f"{path}:{line}: not valid JSON (" in message
    for line, kind in ((3, "list"), (4, "str"), (5, "NoneType")):
        assert f"{path}:{line}: must be a JSON object, found a {kind}" in message
    assert f"{path}:1:" not in message
    assert f"{path}:7:" not in message
    assert "6 bad rows; write one JSON object per line" in message


def test_the_eleventh_problem_is_only_counted(write):
    path = write("oops\n" * 25)
    with pytest.raises(DatasetError) as error:
        read_rows(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[9].startswith(f"{path}:10:")
    assert lines[10] == "… and 15 more"
    assert lines[11].startswith("25 bad rows")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\x00\x00\x00", "not valid JSON"),
        (b'{"a": "x\x00y"}', "not valid JSON"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(byte 8: "),
        ('{"a": "مرحبا"}'.encode("cp1256"), "is not UTF-8 text"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"7" * 5_000 + b"}", "not valid JSON"),
    ],
    ids=["NULs", "NUL in a string", "invalid byte", "Windows Arabic", "deep", "deeper", "huge number"],
)
def test_damaged_line_is_named(write, line, reason):
    path = write(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(DatasetError, match=f"^{path}:2: {reason}") as error:
        read_rows(path)
    assert "1 bad rows" in str(error.value)


def test_utf16_file(write):
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_rows(write('{"a": "مرحبا"}\n'.encode("utf-16")))


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_file_without_rows(write, content):
    with pytest.raises(DatasetError, match=r"data\.jsonl: holds no rows"):
        read_rows(write(content))


def test_missing_file(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_rows(tmp_path / "none.jsonl")


def test_directory(tmp_path):
    (tmp_path / "data.jsonl").mkdir()
    with pytest.raises(DatasetError, match=r"data\.jsonl: cannot be read \(Is a directory\)"):
        read_rows(tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", ["data.csv", "data", "data.json", ""])
def test_unknown_format(name):
    with pytest.raises(DatasetError, match=f"^{name}: unknown format; give a JSON Lines file"):
        read_rows(name)


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_come_with_the_package(sample):
    assert len(read_rows(f"sample:{sample}")) >= 10


def test_unknown_sample_lists_those_that_exist():
    with pytest.raises(DatasetError, match="sample:ppo: no such sample; choose one of sample:sft, "):
        read_rows("sample:ppo")


def test_no_problems_raise_nothing():
    raise_problems([], "do nothing")
