import itertools
from pathlib import Path

import pytest

from arabic_qwen.data import stream
from arabic_qwen.data.bad_rows import BadRow, BadRows
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.readers import Row
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.errors import DatasetError


@pytest.fixture(autouse=True)
def small_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(stream, "WINDOW", 4)
    monkeypatch.chdir(tmp_path)


class Numbers(GroupDataset):
    """A window whose groups are the rows' numbers."""

    def counts(self):
        return {"rows": len(self), "longest": max(self.groups)}


def numbers(count: int) -> GroupStream:
    rows = [Row(f"f:{i}", {"n": i}) if i % 5 != 3 else BadRow(f"f:{i}", "bad", None) for i in range(count)]
    bad_rows = BadRows(9, Path("bad_rows.jsonl"))

    def encode(some, carried):
        for row in some:
            if isinstance(row, BadRow):
                bad_rows.add(row)
        window = Numbers([row.values["n"] for row in some if isinstance(row, Row)])
        return window, (carried or 0) + len(window)

    return GroupStream(lambda: iter(rows), encode, bad_rows, list)


def test_windows_over_and_over():
    found = list(itertools.islice(numbers(10).windows({}), 5))
    assert [window.groups for _, window in found] == [[0, 1, 2], [4, 5, 6, 7], [9], [0, 1, 2], [4, 5, 6, 7]]
    assert [(place["pass"], place["window"]) for place, _ in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [place["counts"] for place, _ in found[:3]] == [{}, {"rows": 3, "longest": 2}, {"rows": 7, "longest": 7}]
    assert [place["bad_rows"] for place, _ in found[:4]] == [[], ["f:3"], ["f:3"], ["f:3", "f:8"]]
    assert [place["carried"] for place, _ in found] == [None, 3, 7, 8, 11]


@pytest.mark.parametrize("start", range(8))
def test_from_any_place(start):
    found = list(itertools.islice(numbers(10).windows({}), 12))
    place, _ = found[start]
    again = numbers(10)
    assert list(itertools.islice(again.windows(place), 12 - start)) == found[start:]


def test_rows_are_read_as_they_are_needed():
    read = []

    def rows():
        for i in itertools.count():
            read.append(i)
            yield Row(f"f:{i}", {})

    windows = GroupStream(rows, lambda some, _: (Numbers([1] * len(some)), None), BadRows(), list).windows({})
    next(windows), next(windows)
    assert len(read) == 8


@pytest.mark.parametrize("rows", [[], [BadRow("f:1", "bad", None)]])
def test_nothing_to_train_on(rows):
    with pytest.raises(DatasetError, match="no rows are left to train on"):
        next(GroupStream(lambda: iter(rows), lambda some, _: (Numbers([]), None), BadRows(), list).windows({}))
