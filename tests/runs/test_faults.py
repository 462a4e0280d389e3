"""What goes wrong around a run: it ends with one message, keeps its checkpoints, and goes on exactly afterwards."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from arabic_qwen.data import stream
from arabic_qwen.engine.workers import watched_workers
from arabic_qwen.errors import ConfigurationError, DatasetError, OutputError, TrainingError
from arabic_qwen.files import UNFINISHED
from arabic_qwen.runs import checkpoints
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import sft_config
from tests.preference_runs import preference_config, write_data

pytestmark = pytest.mark.engine

VALUES = dict(lora_dropout=0.1, max_steps=4, save_steps=1, save_total_limit=None, validation_split=0, eval_samples=0)
VALUES |= dict(lora_target_modules=["q_proj"], packing=False)


class At(TrainerCallback):
    """Calls a function when a step begins."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.call()


@pytest.fixture
def config(model_dir, sft_file, tmp_path):
    return sft_config(model_dir, sft_file, tmp_path / "run", **VALUES)


@pytest.fixture(scope="module")
def expected(model_dir, sft_file, tmp_path_factory):
    """The weights that an uninterrupted run ends with."""
    return train(sft_config(model_dir, sft_file, tmp_path_factory.mktemp("whole") / "run", **VALUES))


def train(config, *callbacks, **values):
    config = config.model_copy(update={"callbacks": [*callbacks], **values})
    BaseTrainer(config).train()
    return Path(config.output_dir, "adapter_model.safetensors").read_bytes()


def check_kept(config, *steps):
    """The folder has whole checkpoints of these steps, and nothing half-written."""
    run = Path(config.output_dir)
    found = checkpoints.find_checkpoints(run)
    assert [checkpoints.step_of(path) for path in found] == list(steps)
    assert [checkpoints.damage(path) for path in found] == [None] * len(steps)
    assert not list(run.rglob(f"{UNFINISHED}*"))


TMPFS = """
import sys
from pathlib import Path
from arabic_qwen.config import load_config
from arabic_qwen.errors import OutputError
from tests.runs import test_faults

config, disk, expected = load_config(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).read_bytes()
test_faults.fill_it_in_each_way(config, disk, expected)
"""


def fill_it_in_each_way(config, disk, expected):
    """In a process of its own, which has the small disk mounted: before the save, and in its middle."""
    ballast = disk / "ballast"

    def leave(size):
        def fill():
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - size))

        return fill

    def stops(step, size, message):
        with pytest.raises(OutputError, match=message):
            train(config, At(step, leave(size)))
        ballast.unlink()

    stops(
        2, 40_000, r"checkpoint-2: cannot be written \(No space left on device: about .* kB needed, .* kB free\); free"
    )
    check_kept(config, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arabic_qwen.engine.resumable.check_space", lambda *_: None)
        stops(3, 40_960, r"checkpoint-3: cannot be written \(No space left")  # enough for some of its files
    check_kept(config, 2, 1)
    assert train(config) == expected


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this system lets us mount no small disk")
def test_a_full_disk(config, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    config.model_copy(update={"output_dir": str(disk / "run")}).to_yaml(tmp_path / "run.yaml")
    (tmp_path / "expected").write_bytes(expected)
    python = [
        sys.executable,
        "-c",
        TMPFS,
        *(str(path) for path in (tmp_path / "run.yaml", disk, tmp_path / "expected")),
    ]
    shell = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'
    result = subprocess.run(["unshare", "-rm", "sh", "-c", shell, str(disk), *python], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_that_may_not_grow(config, expected):
    """The kernel refuses what is beyond a limit, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        for size in (2_000, 10_000, 30_000):  # in the optimizer's state, the adapters, the tokenizer
            with pytest.raises(
                OutputError, match=r"checkpoint-2: cannot be written \(File too large\); raise the limit"
            ):
                train(config, At(2, lambda size=size: limit(size)))
            limit(limits[0])
            check_kept(config, 1)
    finally:
        limit(limits[0])
    assert train(config) == expected


def full(path):
    """/dev/full in the place of a file: whatever is written into it, the disk is full."""

    def replace():
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")

    return replace


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_logs(config, expected, name):
    values = dict(validation_split=0.2, eval_samples=1, eval_steps=1) if name == "samples.jsonl" else {}
    with pytest.raises(
        OutputError, match=rf"{name}: cannot be written \(No space left on device: about \d+ bytes needed"
    ):
        train(config, At(2, full(Path(config.output_dir, name))), **values)
    Path(config.output_dir, name).unlink()
    check_kept(config, 1)
    weights = train(config, **values)
    assert values or weights == expected


@pytest.mark.parametrize("name", ["loss_curve.png", "tokenizer.json", "run_summary.json"])
def test_the_end_of_a_run(config, expected, monkeypatch, name):
    replace = Path.replace

    def no_space(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="cannot be written"):
        patch.setattr(Path, "replace", no_space)
        train(config)
    check_kept(config, 4, 3, 2, 1)
    assert not Path(config.output_dir, name).exists()
    assert train(config) == expected


def test_the_precomputed_reference(model_dir, tmp_path, monkeypatch):
    config = preference_config(
        "dpo", model_dir, write_data("dpo", tmp_path), tmp_path / "run", precompute_reference=True
    )

    def no_space(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OutputError, match=r"reference-\w+\.safetensors: .*quota exceeded"),
    ):
        patch.setattr(os, "fsync", no_space)
        BaseTrainer(config).train()
    BaseTrainer(config).train()


class TestFolder:
    def test_removed(self, config):
        with pytest.raises(OutputError, match=r"run/\S+: cannot be written \(its folder is gone\)"):
            train(config, At(2, lambda: shutil.rmtree(config.output_dir)), logging_steps=100)
        assert not Path(config.output_dir).exists()

    def test_removed_at_the_end(self, config, monkeypatch):
        def vanish(trainer):
            shutil.rmtree(config.output_dir)
            save_model(trainer)

        save_model = BaseTrainer.save_model
        monkeypatch.setattr(BaseTrainer, "save_model", vanish)
        with pytest.raises(OutputError, match=r"run: cannot be written \(its folder is gone\)"):
            train(config)
        assert not Path(config.output_dir).exists()

    def test_moved_and_put_back(self, config, expected):
        run = Path(config.output_dir)
        with pytest.raises(OutputError, match="its folder is gone"):
            train(config, At(3, lambda: run.rename(run.with_name("moved"))))
        run.with_name("moved").rename(run)
        check_kept(config, 2, 1)
        assert train(config) == expected

    def test_a_file_in_its_place(self, config):
        def replace():
            shutil.rmtree(config.output_dir)
            Path(config.output_dir).touch()

        with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\); correct that"):
            train(config, At(2, replace))

    def test_read_only(self, config, expected):
        """Of the whole file system: the rights of a folder do not bind the root user."""
        patch = pytest.MonkeyPatch()

        def refuse(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        try:
            with pytest.raises(OutputError, match=r"checkpoint-2: cannot be written \(Read-only file system\)"):
                train(config, At(2, lambda: patch.setattr(os, "mkdir", refuse)))
        finally:
            patch.undo()
        check_kept(config, 1)
        assert train(config) == expected


def test_a_signal_and_a_full_disk(config, expected, monkeypatch):
    """What the user has to do is said, not only that the run has stopped; the clean-up may fail too."""

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="checkpoint-2: cannot be written"):
        patch.setattr("arabic_qwen.runs.checkpoints.write_atomically", no_space)
        stop = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        train(config, stop, save_steps=100)
    assert not checkpoints.find_checkpoints(Path(config.output_dir))
    assert train(config, save_steps=100) == expected  # what could not be cleaned up is not in the way


class TestWorkers:
    """Of `dataloader_num_workers`."""

    @pytest.fixture(autouse=True)
    def without_waiting(self, monkeypatch):
        """PyTorch gives each worker of a broken-off epoch this many seconds to end by itself."""
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)

    def test_a_killed_one(self, config, expected):
        def kill():
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            names = [(int(child), Path(f"/proc/{child}/cmdline").read_bytes()) for child in children]
            own = Path("/proc/self/cmdline").read_bytes()  # forked, so by the same name
            os.kill(next(child for child, name in names if name == own), signal.SIGKILL)
            time.sleep(60)  # until the news of it breaks in, which on a busy machine is some steps later

        with pytest.raises(
            TrainingError, match=r"dataloader_num_workers: a data worker is killed by signal: Killed, most"
        ):
            train(config, At(2, kill), dataloader_num_workers=2)
        check_kept(config, 1)
        assert train(config, dataloader_num_workers=2) == expected

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (MemoryError(), "^dataloader_num_workers: a data worker had no memory left"),
            (DatasetError("rows.jsonl:3: is wrong; correct it"), r"^rows\.jsonl:3: is wrong; correct it$"),
        ],
    )
    def test_one_that_raises(self, error, message):
        def fail(_):
            raise error

        with pytest.raises(TrainingError, match=message) as raised, watched_workers():
            list(DataLoader([0, 1], collate_fn=fail, num_workers=2))
        assert isinstance(raised.value, type(error)) or isinstance(error, MemoryError)

    def test_other_errors_stay_as_they_are(self):
        for error in (RuntimeError("CUDA error"), MemoryError(), DatasetError("rows.jsonl")):
            with pytest.raises(type(error)) as raised, watched_workers():
                raise error
            assert raised.value is error


class TestStreamedFile:
    @pytest.fixture
    def data(self, sft_file, tmp_path):
        return Path(shutil.copy(sft_file, tmp_path / "rows.jsonl"))

    @pytest.fixture
    def streamed(self, config, data, monkeypatch):
        monkeypatch.setattr(stream, "WINDOW", 4)  # of 12 rows
        return config.model_copy(update=dict(dataset_path=str(data), streaming=True, max_steps=5))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (Path.unlink, r"rows\.jsonl: cannot be read \(No such file or directory\)"),
            (
                lambda path: os.truncate(path, 900),
                r"the data changed while it was read \(.*rows\.jsonl of .* → .*rows\.jsonl of 900 bytes",
            ),
        ],
    )
    def test_during_the_run(self, streamed, data, change, message):
        content = data.read_bytes()
        with pytest.raises(DatasetError, match=message):
            train(streamed, At(3, lambda: change(data)))
        assert checkpoints.find_checkpoints(Path(streamed.output_dir))
        data.write_bytes(content)
        found = train(streamed)
        if change != Path.unlink:
            assert found == train(streamed, output_dir=str(data.with_name("whole")))

    def test_before_the_run_goes_on(self, streamed, data):
        content = data.read_bytes()
        with pytest.raises(ZeroDivisionError):
            train(streamed, At(3, lambda: 1 / 0))
        data.unlink()
        with pytest.raises(DatasetError, match=r"rows\.jsonl: cannot be read \(No such file or directory\)"):
            train(streamed)
        data.write_bytes(content + content[: content.index(b"\n") + 1])
        with pytest.raises(
            ConfigurationError, match=r"the train data is not what it was when .*checkpoint-2 was written"
        ):
            train(streamed)
        train(streamed, resume_changed=True)


def test_the_command_says_what_it_will_go_on_from(config, tmp_path, monkeypatch, capsys):
    from arabic_qwen.commands import cli

    config.to_yaml(tmp_path / "run.yaml")
    step = torch.optim.AdamW.step
    steps = iter(range(10))

    def stepping(self, *args, **kwargs):
        if next(steps) == 2:
            full(Path(config.output_dir, "metrics.jsonl"))()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    monkeypatch.setattr(sys, "argv", ["arabic-qwen", "train", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "error: " in said and "then the same command will go on from " in said and "Traceback" not in said
