"""Files and folders that are written whole or not at all."""

import os

import pytest

from arabic_qwen.files import UNFINISHED, remove_folder, remove_unfinished, staged, write_atomically


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
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


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
