"""Files and folders that are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from arabic_qwen.errors import OutputError
from arabic_qwen.files import (
    UNFINISHED,
    append,
    remove_folder,
    remove_unfinished,
    staged,
    write_atomically,
    writing,
)


@pytest.mark.parametrize("content", ["سطر\n", b"\x00\xff"])
def test_content(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    reason = r"No space left on device: about 3 bytes needed, .* free\); free some space there"
    with pytest.raises(OutputError, match=rf"{path}: cannot be written \({reason}"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_clean_up_that_fails_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "unlink", full)
    with pytest.raises(OutputError, match="file: cannot be written"):
        write_atomically(tmp_path / "file", "new")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "its folder is gone"),
        (OSError(errno.EROFS, "Read-only file system"), r"Read-only file system\); correct that, or choose"),
        (OSError(errno.EDQUOT, "Quota"), "quota exceeded: about 5.0 MB needed, .* free"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device: about 5.0 MB"),
    ],
)
def test_what_is_said_of_a_place_that_cannot_be_written(tmp_path, error, message):
    with (
        pytest.raises(OutputError, match=rf"file: cannot be written .*{message}"),
        writing(tmp_path / "file", 5 * 10**6),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError(2, "No such file or directory", "/elsewhere"), OSError("x")]
)
def test_other_errors_are_not_of_the_place(tmp_path, error):
    with pytest.raises(type(error)) as raised, writing(tmp_path / "file"):
        raise error
    assert raised.value is error


def test_less_space_than_needed_is_said_before_anything_is_written(tmp_path):
    message = r"run: cannot be written .* about 1,000,000\.0 GB needed, "
    with pytest.raises(OutputError, match=message), staged(tmp_path / "run", 10**15):
        raise AssertionError
    assert not (tmp_path / "run").exists()


def test_appending(tmp_path):
    append(tmp_path / "file", "أ\n")
    append(tmp_path / "file", "b\n")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "أ\nb\n"
    with pytest.raises(OutputError, match="its folder is gone"):
        append(tmp_path / "none" / "file", "b\n")


def test_a_stage_is_moved_when_it_is_complete(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with staged(tmp_path) as stage:
        (stage / "a").write_text("a")
        (stage / "below").mkdir()
        (stage / "below" / "b").write_text("b")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "below" / "b").read_text() == "b"
    with pytest.raises(KeyError), staged(tmp_path) as stage:
        (stage / "a").write_text("other")
        raise KeyError
    assert (tmp_path / "a").read_text() == "a"
    assert sorted(os.listdir(tmp_path)) == ["a", "below", "mine"]


def test_a_stage_in_a_folder_that_vanished(tmp_path):
    with (
        pytest.raises(OutputError, match=r"run: cannot be written \(its folder is gone\)"),
        staged(tmp_path / "run", make=False),
    ):
        raise AssertionError
    assert not (tmp_path / "run").exists()


def test_leftovers(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    run = tmp_path / "run"
    (run / f"{UNFINISHED}folder").mkdir(parents=True)
    (run / f"{UNFINISHED}folder" / "file").touch()
    (run / f"{UNFINISHED}file").touch()
    (run / f"{UNFINISHED}link").symlink_to(tmp_path / "elsewhere")
    (run / "kept").touch()
    remove_unfinished(run)
    assert os.listdir(run) == ["kept"]
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_folder_loses_its_name_first(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed there
    remove_folder(folder)
    assert os.listdir(tmp_path) == [f"{UNFINISHED}removed-checkpoint-1"]
