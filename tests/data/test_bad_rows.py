import json
import shutil

import pytest

from arabic_qwen.data.bad_rows import BadRow, BadRows
from arabic_qwen.errors import DatasetError, OutputError


def filled(number: int, *args, reason=lambda i: f"reason {i}", **kwargs) -> BadRows:
    rows = BadRows(*args, **kwargs)
    for i in range(1, number + 1):
        rows.add(BadRow(f"a.jsonl:{i}", reason(i), {"سؤال": i, "x": "\u2028"}))
    return rows


def message(rows: BadRows) -> list[str]:
    with pytest.raises(DatasetError) as error:
        rows.check()
    return str(error.value).splitlines()


def test_within_the_limit_nothing_is_raised():
    BadRows().check()
    filled(2, 2).check()


def test_one():
    assert message(filled(1)) == ["a.jsonl:1: reason 1", "1 bad row; correct or remove it"]


def test_the_first_ten_are_named():
    lines = message(filled(25, 3))
    assert lines[:10] == [f"a.jsonl:{i}: reason {i}" for i in range(1, 11)]
    assert lines[10:] == ["… and 15 more", "25 bad rows; correct or remove them"]


def test_one_reason_is_said_once():
    lines = message(filled(12, reason=lambda i: "response: is empty"))
    places = ", ".join(f"a.jsonl:{i}" for i in range(1, 11))
    assert lines == [f"{places}, … and 2 more: response: is empty", "12 bad rows; correct or remove them"]
    assert message(filled(2, reason=lambda i: "x"))[0] == "a.jsonl:1, a.jsonl:2: x"


def test_file_and_remedy(tmp_path):
    file = tmp_path / "run" / "bad_rows.jsonl"
    rows = filled(2, 1, file)
    assert message(rows)[-1] == (
        f"2 bad rows; correct or remove them, or raise max_bad_rows (now 1) to leave them out; listed in {file}"
    )
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert entries[0] == {"where": "a.jsonl:1", "reason": "reason 1", "row": {"سؤال": 1, "x": "\u2028"}}
    assert "سؤال" in file.read_text(encoding="utf-8")
    assert rows.summary() == "2 left out, listed in bad_rows.jsonl"


def test_a_new_run_starts_the_file_again(tmp_path):
    for number in (3, 1):
        rows = filled(number, 9, tmp_path / "bad.jsonl")
        rows.keep()
    assert len((tmp_path / "bad.jsonl").read_text().split("\n")[:-1]) == 1


def test_no_bad_row_no_file(tmp_path):
    filled(2, 9, tmp_path / "bad.jsonl").keep()
    filled(0, 9, tmp_path / "bad.jsonl").keep()
    assert not list(tmp_path.iterdir())


def test_an_earlier_runs_file_is_left_until_this_one_begins(tmp_path):
    filled(3, 9, tmp_path / "bad.jsonl").keep()
    rows = filled(1, 9, tmp_path / "bad.jsonl")
    rows.check()
    assert len((tmp_path / "bad.jsonl").read_text().split("\n")[:-1]) == 3


def test_values_that_json_lacks(tmp_path):
    rows = BadRows(1, tmp_path / "bad.jsonl")
    rows.keep()
    rows.add(BadRow("a:1", "x", {"half": "\ud800", "bytes": b"\xff"}))
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == {"half": "\ud800", "bytes": "b'\\xff'"}


def test_a_row_that_is_met_again_counts_once(tmp_path):
    rows = filled(2, 2, tmp_path / "bad.jsonl")
    rows.keep()
    rows.add(BadRow("a.jsonl:1", "other", {}))
    assert len(rows) == 2
    assert len((tmp_path / "bad.jsonl").read_text().split("\n")[:-1]) == 2


def test_a_folder_that_vanished_in_a_run_is_not_made_again(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = filled(1, 0, run / "bad.jsonl")
    rows.keep()
    shutil.rmtree(run)
    for call in (rows.check, rows.keep, lambda: rows.add(BadRow("a.jsonl:2", "x", {}))):
        with pytest.raises(OutputError, match=r"bad\.jsonl: cannot be written \(its folder is gone\)"):
            call()
    assert not run.exists()


def test_restore(tmp_path):
    """A run stopped after row 4; its checkpoint is from after row 2, and row 1 is met again before it is restored."""
    filled(4, 9, tmp_path / "bad.jsonl").keep()
    rows = filled(1, 9, tmp_path / "bad.jsonl")
    rows.keep()
    rows.restore(["a.jsonl:2"])
    rows.add(BadRow("a.jsonl:2", "reason 2", {}))
    rows.add(BadRow("a.jsonl:4", "reason 4", {}))
    assert sorted(rows.places) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    entries = [json.loads(line)["where"] for line in (tmp_path / "bad.jsonl").read_text().split("\n")[:-1]]
    assert sorted(entries) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]


def test_restore_without_the_file(tmp_path):
    rows = BadRows(9, tmp_path / "bad.jsonl")
    rows.restore(["a.jsonl:2"])
    assert rows.places == ["a.jsonl:2"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert len(filled(2, 2, tmp_path / "bad.jsonl")) == 2
    assert not list(tmp_path.iterdir())
