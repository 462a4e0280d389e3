"""Reads data files, one format a function, into rows that remember where they came from."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.errors import DatasetError
from arabic_qwen.text.encoding import likely_encoding

csv.field_size_limit(2**31 - 1)  # a cell may hold a long conversation; the default is 128 KiB

#: Bytes of a row's text. JSON may take twenty times as much memory as its text.
LONGEST_ROW = 2**25
#: Bytes of a JSON file that is no JSON Lines, and of Parquet rows that are unpacked at a time.
LARGEST_CHUNK = 2**30
# A compressed file may unpack to the larger of the two.
_UNPACKED, _RATIO = 2**28, 200


class Row(NamedTuple):
    """One record and the place to name when it is wrong."""

    where: str  # file:line, or file:row N where lines mean nothing
    values: dict[str, Any]
    source: int = 0  # which entry of dataset_path it comes from
    given: dict[str, Any] | None = None  # the values before they were normalised, where that changed them
    changes: Mapping[str, int] = {}  # characters that each rule changed


Rows = Iterator[Row | BadRow]


def is_data_file(name: str) -> bool:
    """Whether a file of this name can be read."""
    return _reader(name) is not None


def is_table(name: str) -> bool:
    """Whether the file's cells are text."""
    return _reader(name) is _read_csv


def read_file(path: Path) -> Rows:
    """The rows of one file, in the format that its name says; lines that are no rows come as :class:`BadRow`.

    Raises:
        DatasetError: the file cannot be read as a whole.
    """
    reader = _reader(path.name)
    if reader is None:
        raise DatasetError(f"{path}: unknown format; give a file named {FORMATS}")
    try:
        yield from reader(path)
    except (EOFError, zlib.error, pa.ArrowException, ValueError, OverflowError) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.strerror is None:  # what gzip and pyarrow say about contents
            raise _damaged(path, error) from None
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(f"{path}: cannot be read ({error.strerror}); check its name and who may read it")


def _damaged(path: Path, error: Exception) -> DatasetError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return DatasetError(f"{path}: is damaged, or not what its name says ({reason}); make or copy it again")


def _too_long(where: str) -> DatasetError:
    return DatasetError(f"{where}: the row has more than {LONGEST_ROW >> 20} MiB, which no conversation has; remove it")


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, unless it is a bomb: far more than its size can honestly hold."""

    def __init__(self, path: Path, stream: Any):
        self._path = path
        self._stream = stream
        self._left = max(_UNPACKED, _RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DatasetError(
                f"{self._path}: unpacks to more than {_RATIO} times its size; unpack it yourself where you trust it"
            )
        return count


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as its suffix says."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.open(file) as unpacked:
                yield io.BufferedReader(_Unpacked(path, unpacked), 1 << 16)
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_Unpacked(path, pa.CompressedInputStream(file, "zstd")), 1 << 16)
        else:
            yield file


def _read_json_lines(path: Path) -> Rows:
    with _open(path) as file:
        yield from _parse_lines(path, iter(functools.partial(file.readline, LONGEST_ROW + 1), b""))


def _parse_lines(path: Path, lines: Iterable[bytes]) -> Rows:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if len(line) > LONGEST_ROW:
            raise _too_long(where)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield _row(where, json.loads(text))
        except UnicodeDecodeError as error:
            reason = _not_utf8(path, line, f" (byte {error.start + 1}: {error.reason})")
            yield BadRow(where, reason, line.decode("utf-8", "replace").strip())
        except RecursionError:
            yield BadRow(where, "not valid JSON (nested too deeply)", text)
        except ValueError as error:  # json's own error, or a number of more digits than Python reads
            yield BadRow(where, f"not valid JSON ({getattr(error, 'msg', error)}); write one JSON object a line", text)


def _not_utf8(path: Path, data: bytes, place: str = "") -> str:
    """What is said of bytes of the file that are no UTF-8: how to convert it, where they tell what it is in."""
    encoding = likely_encoding(data)
    if encoding is None:
        return f"is not UTF-8 text{place}; save the file as UTF-8"
    unpack = {".gz": "zcat", ".zst": "zstdcat"}.get(path.suffix.lower())
    convert = f"iconv -f {encoding} -t UTF-8"
    command = f"{unpack} {quote(path.name)} | {convert}" if unpack else f"{convert} {quote(path.name)}"
    new = quote(f"utf8-{path.stem if unpack else path.name}")
    return f"is not UTF-8 text, but probably {encoding}; convert the file: {command} > {new}"


def _row(where: str, values: Any) -> Row | BadRow:
    if isinstance(values, dict):
        return Row(where, values)
    return BadRow(where, f"must be a JSON object, found a {type(values).__name__}", values)


def _read_json(path: Path) -> Rows:
    """An array of objects, or an object that holds one such array; a JSON Lines file that is named .json too."""
    with _open(path) as file:
        data = file.read(LARGEST_CHUNK + 1)
    if len(data) > LARGEST_CHUNK:
        raise DatasetError(f"{path}: has more than {LARGEST_CHUNK >> 30} GiB; write JSON Lines, one object a line")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = _not_utf8(path, data, f" (byte {error.start + 1}: {error.reason})")
        raise DatasetError(f"{path}: {problem}") from None
    except RecursionError:
        raise DatasetError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data" and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            yield from _parse_lines(path, data.splitlines())
            return
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        reason = getattr(error, "msg", error)
        raise DatasetError(f"{place}: not valid JSON ({reason}); correct it, or write one object per line") from None
    if isinstance(value, dict):
        tables = [key for key, items in value.items() if isinstance(items, list) and _holds_objects(items)]
        if len(tables) != 1:
            raise DatasetError(
                f"{path}: is an object with {len(tables)} lists of rows ({', '.join(tables) or 'none'}); "
                "give an array of objects, or an object with one such array"
            )
        value = value[tables[0]]
    if not isinstance(value, list):
        raise DatasetError(f"{path}: must hold an array of objects, found a {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield _row(f"{path}:row {number}", item)


def _holds_objects(items: list) -> bool:
    return bool(items) and all(isinstance(item, dict) for item in items)


def _read_csv(path: Path) -> Rows:
    with _open(path) as file:
        # Bytes that are no UTF-8 become half surrogates, so that the row they are in can be named.
        lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        yield from _parse_csv(path, lines)


def _parse_csv(path: Path, file: io.TextIOWrapper) -> Rows:
    length = 0  # of the lines that the next row has taken

    def read_lines() -> Iterator[str]:
        nonlocal length
        while line := file.readline(LONGEST_ROW + 1):
            length += len(line)
            if length > LONGEST_ROW:
                raise _too_long(where)
            yield line

    where = f"{path}:1"
    lines = read_lines()
    first = next(lines, "")
    # Spreadsheets write semicolons where the comma is the decimal sign, as in Arabic locales.
    comma = ";" if ";" in first and "," not in first else ","
    delimiter = "\t" if ".tsv" in path.name.lower() else comma
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        length = 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # where the next row begins is anyone's guess
            raise DatasetError(
                f"{where}: not valid CSV ({error}); close every quoted cell, and write quotes in it twice"
            ) from None
        if not cells:
            continue  # a blank line
        if header is None:
            header = _header(path, cells)
        elif _undecoded(cells):
            text = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
            yield BadRow(where, _not_utf8(path, _bytes(cells)), text)
        elif len(cells) != len(header):
            yield BadRow(where, f"has {len(cells)} cells, but the header names {len(header)} columns", cells)
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _bytes(cells: list[str]) -> bytes:
    """What cells were decoded from."""
    return ",".join(cells).encode("utf-8", "surrogateescape")


def _undecoded(cells: list[str]) -> bool:
    return any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell)


def _header(path: Path, cells: list[str]) -> list[str]:
    if _undecoded(cells):
        raise DatasetError(f"{path}:1: {_not_utf8(path, _bytes(cells))}")
    double = sorted({cell for cell in cells if cells.count(cell) > 1})
    if double:
        raise DatasetError(f"{path}:1: the header names {', '.join(map(repr, double))} twice")
    return cells


def _read_parquet(path: Path) -> Rows:
    with path.open("rb") as file, pq.ParquetFile(file) as table:
        number = 0
        # One value may be as large as its column's chunk, and repeated in every row.
        chunks = (table.metadata.row_group(i) for i in range(table.num_row_groups))
        largest = max((g.column(i).total_uncompressed_size for g in chunks for i in range(g.num_columns)), default=1)
        for batch in table.iter_batches(batch_size=min(max(LARGEST_CHUNK // max(largest, 1), 1), 1000)):
            for values in batch.to_pylist():
                number += 1
                where = f"{path}:row {number}"
                if batch.nbytes > LONGEST_ROW and len(str(values)) > LONGEST_ROW:
                    raise _too_long(where)
                yield Row(where, values)


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
FORMATS = f"*{', *'.join(_READERS)} (each also with .gz or .zst), or *.parquet"


def _reader(name: str) -> Callable[[Path], Rows] | None:
    path = Path(name.lower())
    if path.suffix == ".parquet":
        return _read_parquet
    return _READERS.get(path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix)
