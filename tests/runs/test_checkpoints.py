"""Which checkpoint a run goes on from, and that it then ends as if it had never stopped."""

import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from arabic_qwen.engine.trainer import PackedTrainer
from arabic_qwen.errors import ConfigurationError, OutputError
from arabic_qwen.files import UNFINISHED
from arabic_qwen.runs import checkpoints, run_folder
from arabic_qwen.runs.lock import check_free, locked
from arabic_qwen.runs.state import save_state
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import StopAfter, sft_config
from tests.preference_runs import preference_config, write_data

pytestmark = pytest.mark.engine

EXACT = dict(lora_dropout=0.1, save_steps=1, eval_steps=1, save_total_limit=None, max_steps=None, eval_samples=0)


def config_of(variant, model_dir, sft_file, data_dir, folder):
    """A run of three to six steps with dropout that saves each."""
    values = EXACT | dict(num_train_epochs=2, warmup_ratio=0.2, lr_scheduler_type="cosine")
    values["per_device_train_batch_size"] = 4
    if variant == "dpo, precomputed reference":
        data = write_data("dpo", data_dir)
        values |= dict(precompute_reference=True, validation_split=0.2, lora_target_modules=["q_proj"])
        return preference_config("dpo", model_dir, data, folder, **values)
    if variant == "kto":
        values |= dict(per_device_train_batch_size=8, validation_split=0.2)
        return preference_config("kto", model_dir, write_data("kto", data_dir), folder, **values)
    values |= {"packing": False} | {
        "accumulation": dict(
            per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=2, num_train_epochs=1
        ),
        "all weights, packed": dict(use_lora=False, packing=True, max_seq_length=96, learning_rate=1e-4),
        "best of epochs": dict(evaluation_strategy="epoch", save_strategy="epoch", num_train_epochs=3, eval_samples=2),
        "early stopping": dict(learning_rate=1e-9, early_stopping_patience=3),
        "evaluation of epochs": dict(evaluation_strategy="epoch"),  # saves steps
        "ends within an epoch": dict(per_device_train_batch_size=2, max_steps=3, dataloader_num_workers=2),
        "streamed": dict(streaming=True, eval_dataset_path=str(sft_file), max_steps=5),
        "two workers": dict(dataloader_num_workers=2, group_by_length=True, per_device_train_batch_size=6),
    }[variant]
    return sft_config(model_dir, sft_file, folder, **values)


VARIANTS = [
    "accumulation",
    "all weights, packed",
    "best of epochs",
    "dpo, precomputed reference",
    "early stopping",
    "ends within an epoch",
    "evaluation of epochs",
    "kto",
    "streamed",
    "two workers",
]


def outcome(folder):
    """All that a run has learned and logged: the output's weights, the last checkpoint's files, the log."""
    last = checkpoints.find_checkpoints(folder)[0]
    weights = [*folder.glob("*model.safetensors"), *last.glob("*model.safetensors")]
    states = [file for name in ("optimizer", "scheduler", "random") for file in sorted(last.glob(f"{name}.*"))]
    found = {f"{path.parent.name[:10]}/{path.name}": path.read_bytes() for path in [*weights, *states]}
    found.pop("run/", None)
    state = json.loads((last / "trainer_state.json").read_text())
    untimed = ("_runtime", "_per_second", "_time")
    log = [{k: v for k, v in entry.items() if not k.endswith(untimed)} for entry in state["log_history"]]
    best = Path(state["best_model_checkpoint"] or "none").name
    return {**found, "log": log, "best": best, "callbacks": state["stateful_callbacks"]}


@pytest.fixture
def seen(monkeypatch):
    """The token ids of every step that is trained on."""
    steps = []
    step = PackedTrainer.training_step

    def training_step(self, model, inputs, *args):
        if inputs.groups:
            steps.append([batch.input_ids.tolist() for batch in inputs.batches])
        return step(self, model, inputs, *args)

    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    return steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_at_every_step_ends_the_same(variant, model_dir, sft_file, tmp_path, seen, monkeypatch):
    monkeypatch.setattr("arabic_qwen.data.stream.WINDOW", 5)  # of 12 rows
    whole = tmp_path / "whole" / "run"
    BaseTrainer(config_of(variant, model_dir, sft_file, tmp_path, whole)).train()
    expected, order = outcome(whole), list(seen)
    saved = checkpoints.find_checkpoints(whole)
    assert len(order) == checkpoints.step_of(saved[0]) >= 3
    for checkpoint in saved:  # the last one too: killed before the run was finished
        step = checkpoints.step_of(checkpoint)
        folder = tmp_path / str(step) / "run"
        for earlier in saved:
            if checkpoints.step_of(earlier) <= step:
                shutil.copytree(earlier, folder / earlier.name)
        for name in ("training_config.yaml", "metrics.jsonl"):
            shutil.copy(whole / name, folder)
        seen.clear()
        BaseTrainer(config_of(variant, model_dir, sft_file, tmp_path, folder)).train()
        assert order[:step] + seen == order
        found = outcome(folder)
        if variant == "evaluation of epochs":  # not repeated when the step before it is gone on from: it is only logged
            found["log"], expected["log"] = (
                [entry for entry in log["log"] if "loss" in entry] for log in (found, expected)
            )
        assert found == expected


class Learn(TrainerCallback):
    """Notes the learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def config(model_dir, sft_file, tmp_path):
    values = EXACT | dict(max_steps=4, validation_split=0, lora_target_modules=["q_proj"], warmup_ratio=0.0)
    return sft_config(model_dir, sft_file, tmp_path / "run", lr_scheduler_type="linear", **values | {"save_steps": 2})


@pytest.fixture
def stopped(config):
    """The folder of a run that stopped at its second step of four."""
    with pytest.raises(KeyboardInterrupt):
        BaseTrainer(config.model_copy(update={"callbacks": [StopAfter(2)]})).train()
    return Path(config.output_dir)


def train(config, **values):
    trainer = BaseTrainer(config.model_copy(update=values))
    trainer.train()
    return trainer.trainer


def begun_at(trainer):
    return checkpoints.step_of(Path(trainer._resumed_from)) if trainer._resumed_from else 0


class TestFiles:
    def test_neither_pickles_nor_leftovers(self, stopped):
        files = [path for path in stopped.rglob("*") if path.is_file()]
        names = {path.name for path in files}
        assert names >= {"optimizer.safetensors", "optimizer.json", "scheduler.json", "random.json", "progress.json"}
        assert not any(path.suffix in (".pt", ".pth", ".bin", ".pkl") for path in files)
        assert not any(UNFINISHED in str(path) for path in files)
        pickled = pickle.dumps(0)[:2], b"PK\x03\x04"
        assert not any(path.read_bytes().startswith(pickled) for path in files)

    def test_every_damage_is_found_and_the_checkpoint_before_is_taken(self, stopped, config, caplog):
        newest = stopped / "checkpoint-3"
        names = sorted(path.relative_to(stopped / "checkpoint-2") for path in (stopped / "checkpoint-2").rglob("*"))
        assert len(names) > 12
        for name in names:
            for change in ("flipped", "cut", "removed"):
                shutil.copytree(stopped / "checkpoint-2", newest)
                content = (newest / name).read_bytes()
                middle = len(content) // 2
                (newest / name).write_bytes(
                    content[:middle]
                    + (bytes([content[middle] ^ 1]) + content[middle + 1 :] if change == "flipped" else b"")
                )
                if change == "removed":
                    (newest / name).unlink()
                caplog.clear()
                assert run_folder.find_run(config).checkpoint == str(stopped / "checkpoint-2"), (name, change)
                assert "checkpoint-3: " in caplog.text and "passed over" in caplog.text
                if name.name != "manifest.json":
                    assert str(name) in caplog.text
                shutil.rmtree(newest)

    def test_going_on_from_the_one_before_the_damaged_one(self, stopped, config):
        shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-4")
        (stopped / "checkpoint-4" / "random.json").unlink()
        train(config)
        assert checkpoints.damage(stopped / "checkpoint-4") is None

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "a/b.pickle"])
    @pytest.mark.parametrize("listed", [False, True])
    def test_pickled_weights_beside_the_checkpoint_are_not_loaded(self, stopped, config, tmp_path, name, listed):
        file, manifest = stopped / "checkpoint-2" / name, stopped / "checkpoint-2" / "manifest.json"
        file.parent.mkdir(exist_ok=True)
        plant(file, tmp_path)
        if listed:
            sums = json.loads(manifest.read_text())["sha256"]
            manifest.write_text(json.dumps({"sha256": {**sums, name: checkpoints._sha256(file)}}))
        assert checkpoints.damage(file.parents[name.count("/")]) == f"{name} is pickled, and none of ours"
        assert run_folder.find_run(config).checkpoint is None
        assert not (tmp_path / "fired").exists()

    def test_shards_of_deepspeed_are_its_own(self, tmp_path):
        unfinished, checkpoint = tmp_path / "unfinished", tmp_path / "checkpoint-1"
        (unfinished / "global_step1").mkdir(parents=True)
        (unfinished / "global_step1" / "mp_rank_00_model_states.pt").write_text("a")
        checkpoints.publish(unfinished, checkpoint)
        assert checkpoints.damage(checkpoint) is None
        (checkpoint / "global_step1" / "other.pt").write_text("a")
        assert checkpoints.damage(checkpoint) == "global_step1/other.pt is pickled, and none of ours"

    def test_pickled_checkpoints_are_refused(self, stopped, config, tmp_path):
        older = stopped / "checkpoint-2"
        (older / "manifest.json").unlink()
        for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"):
            plant(older / name, tmp_path)
        with pytest.raises(ConfigurationError, match=r"checkpoint-2: holds pickled state \(optimizer.pt\).*to never"):
            train(config)
        assert not (tmp_path / "fired").exists()
        train(config, resume_from_checkpoint="never")
        assert (tmp_path / "run-1" / "checkpoint-2").is_dir()

    def test_what_a_killed_run_left_is_removed(self, stopped, config):
        for name in ("checkpoint-3", "removed-checkpoint-1"):
            (stopped / f"{UNFINISHED}{name}").mkdir()
            (stopped / f"{UNFINISHED}{name}" / "half").touch()
        (stopped / f"{UNFINISHED}1-run_summary.json").touch()
        train(config)
        assert not list(stopped.rglob(f"{UNFINISHED}*"))

    def test_a_full_disk_leaves_the_old_checkpoint(self, config, monkeypatch):
        def fail(state, path):
            if "checkpoint-4" in str(path):
                raise OSError(28, "No space left on device")
            save_state(state, path)

        with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"checkpoint-4: .*No space"):
            patch.setattr("arabic_qwen.engine.resumable.save_state", fail)
            train(config)
        folder = Path(config.output_dir)
        assert [path.name for path in checkpoints.find_checkpoints(folder)] == ["checkpoint-2"]
        assert not list(folder.glob(f"{UNFINISHED}*"))
        train(config)


def plant(path, marker_folder):
    """A pickle that writes a file when it is read without care."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker_folder / "fired",))

    path.write_bytes(pickle.dumps(Payload()))


class TestRotation:
    def make(self, run, steps):
        for step in steps:
            unfinished = run / f"{UNFINISHED}{step}"
            unfinished.mkdir(parents=True)
            (unfinished / "weights").write_text(str(step))
            checkpoints.publish(unfinished, run / f"checkpoint-{step}")

    def names(self, run):
        return [checkpoints.step_of(path) for path in checkpoints.find_checkpoints(run)]

    def test_oldest_first_by_step(self, tmp_path):
        self.make(tmp_path, [9, 100, 20])
        checkpoints.rotate(tmp_path, 2, set())
        assert self.names(tmp_path) == [100, 20]
        checkpoints.rotate(tmp_path, None, set())
        assert self.names(tmp_path) == [100, 20]

    @pytest.mark.parametrize("limit", [1, 2])
    def test_newest_and_best_stay(self, tmp_path, limit):
        self.make(tmp_path, [1, 2, 3, 4])
        checkpoints.rotate(tmp_path, limit, {str(tmp_path / "checkpoint-1")})
        assert self.names(tmp_path) == [4, 1]

    def test_links_and_other_names_are_nothing_to_it(self, tmp_path):
        self.make(tmp_path / "other", [1])
        self.make(tmp_path / "run", [5])
        (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "other" / "checkpoint-1")
        (tmp_path / "run" / "checkpoint-best").mkdir()
        checkpoints.rotate(tmp_path / "run", 1, set())
        assert self.names(tmp_path / "run") == [5]
        assert self.names(tmp_path / "other") == [1]

    def test_a_new_one_takes_the_place_of_a_damaged_one(self, tmp_path):
        self.make(tmp_path, [1])
        (tmp_path / "checkpoint-1" / "weights").write_text("")
        assert checkpoints.damage(tmp_path / "checkpoint-1") == "weights is damaged"
        self.make(tmp_path, [1])
        assert checkpoints.damage(tmp_path / "checkpoint-1") is None
        assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_the_one_just_written_stays_beside_a_damaged_newer_one_and_the_best(stopped, config):
    newer = stopped / "checkpoint-9"
    shutil.copytree(stopped / "checkpoint-2", newer)
    (newer / "progress.json").write_text("")
    shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-1")
    saved = []

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.best_model_checkpoint = str(stopped / "checkpoint-1")

        def on_save(self, args, state, control, **kwargs):
            saved.append([path.name for path in checkpoints.find_checkpoints(stopped)])

    train(config, save_total_limit=1, callbacks=[Save()])
    assert saved == [["checkpoint-9", "checkpoint-4", "checkpoint-1"]]


def test_a_damaged_best_checkpoint_is_not_loaded(model_dir, sft_file, tmp_path, caplog):
    values = EXACT | dict(max_steps=3, metric_for_best_model="eval_loss", learning_rate=1e-9)

    class Damage(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = state.global_step  # the first is the best
            if state.global_step == 3:
                Path(args.output_dir, "checkpoint-1", "adapter_model.safetensors").write_bytes(b"")

    trainer = train(sft_config(model_dir, sft_file, tmp_path / "run", callbacks=[Damage()], **values))
    assert trainer.state.best_global_step == 1
    assert "checkpoint-1: adapter_model.safetensors is damaged; the last model is kept" in caplog.text
    last = (tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == last


class TestChanges:
    def test_refused_with_the_reason(self, stopped, config):
        for name, value in (("learning_rate", 2e-3), ("seed", 7), ("data_seed", 7), ("max_steps", 5)):
            with pytest.raises(ConfigurationError, match=rf"{name}: .* → {value}\); set resume_changed to true"):
                train(config, **{name: value})

    def test_what_changes_nothing_may_change(self, stopped, config):
        values = dict(token_budget=50, gradient_checkpointing=True, dataloader_num_workers=1, save_total_limit=1)
        assert begun_at(train(config, **values)) == 2
        assert len(checkpoints.find_checkpoints(stopped)) == 1

    def test_a_new_learning_rate_is_used_where_the_user_says_so(self, stopped, config):
        rates = Learn()
        values = dict(resume_changed=True, learning_rate=4e-3, weight_decay=0.5, callbacks=[rates])
        trainer = train(config, **values)
        assert rates.rates == [4e-3 * 0.5, 4e-3 * 0.25]
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5

    def test_a_longer_run_goes_on_where_the_shorter_one_would_have_ended(self, stopped, config):
        train(config)
        (stopped / "run_summary.json").unlink()
        trainer = train(config, resume_changed=True, max_steps=6)
        assert (begun_at(trainer), trainer.state.global_step) == (4, 6)

    def test_the_weights_shape_cannot_change(self, stopped, config):
        with pytest.raises(ConfigurationError, match=r"lora_r: 16 → 8\); choose another output_dir"):
            train(config, resume_changed=True, lora_r=8)

    def test_changed_data(self, stopped, config, tmp_path):
        data = tmp_path / "rows.jsonl"
        shutil.copy(config.dataset_path, data)
        shutil.rmtree(stopped)
        config = config.model_copy(update={"dataset_path": str(data)})
        with pytest.raises(KeyboardInterrupt):
            train(config, callbacks=[StopAfter(2)])
        os.utime(data, (0, 0))  # not by time
        lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
        with pytest.raises(
            ConfigurationError, match=r"dataset_path: the train data is not what it was .* resume_changed"
        ):
            train(config)
        assert begun_at(train(config, resume_changed=True)) == 2


def empty_progress(checkpoint):
    (checkpoint / "progress.json").write_text("{}")
    (checkpoint / "manifest.json").unlink()
    sums = {file.name: checkpoints._sha256(file) for file in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": sums}))


class TestChoice:
    def test_never_sets_the_run_aside(self, stopped, config, tmp_path, caplog):
        assert begun_at(train(config, resume_from_checkpoint="never")) == 0
        assert (tmp_path / "run-1" / "checkpoint-2").is_dir()
        assert "run-1" in caplog.text

    def test_from_a_checkpoint_of_another_folder(self, stopped, config, tmp_path):
        train(config)
        other = dict(output_dir=str(tmp_path / "other"), resume_from_checkpoint=str(stopped / "checkpoint-2"))
        assert begun_at(train(config, **other)) == 2
        files = [folder / "adapter_model.safetensors" for folder in (stopped, tmp_path / "other")]
        assert files[0].read_bytes() == files[1].read_bytes()
        (tmp_path / "other" / "run_summary.json").unlink()  # stopped there: the same command goes on with its own
        assert begun_at(train(config, **other)) == 4

    def test_an_older_one_of_the_same_folder(self, stopped, config):
        train(config)
        (stopped / "run_summary.json").unlink()
        with pytest.raises(
            ConfigurationError, match="is not the newest of its run, which is checkpoint-4; set it to auto"
        ):
            train(config, resume_from_checkpoint=str(stopped / "checkpoint-2"))
        assert begun_at(train(config, resume_from_checkpoint=str(stopped / "checkpoint-4"))) == 4

    @pytest.mark.parametrize(
        ("break_it", "reason"),
        [
            (shutil.rmtree, "does not exist; give auto, never or a"),
            (lambda path: (path / "random.json").unlink(), "random.json is missing; choose another"),
            (lambda path: None, r"lora_r: 16 → 8"),
            (empty_progress, r"its progress.json is not as this program writes it; set resume_from_checkpoint"),
        ],
    )
    def test_one_that_cannot_be_gone_on_from(self, stopped, config, tmp_path, break_it, reason):
        break_it(stopped / "checkpoint-2")
        values = dict(output_dir=str(tmp_path / "other"), lora_r=8 if "lora_r" in reason else 16)
        with pytest.raises(ConfigurationError, match=reason):
            train(config, resume_from_checkpoint=str(stopped / "checkpoint-2"), **values)
        assert not (tmp_path / "other").exists()

    def test_one_that_is_to_be_discarded(self, stopped, config):
        with pytest.raises(ConfigurationError, match="which is to be emptied"):
            train(config, resume_from_checkpoint=str(stopped / "checkpoint-2"), overwrite_output_dir=True)


HOLDER = """
import sys, time, pathlib
from arabic_qwen.runs.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class TestLock:
    def test_a_second_run_is_refused_and_a_killed_one_holds_nothing(self, stopped, config):
        command = [sys.executable, "-c", HOLDER, str(stopped)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigurationError, match=rf"another run writes into .*\(process {holder.pid} on "):
                train(config)
            holder.kill()
        assert begun_at(train(config)) == 2

    def test_a_forked_worker_does_not_keep_it(self, tmp_path):
        with locked(tmp_path):
            with pytest.raises(ConfigurationError):
                check_free(tmp_path)
            (reading, end), (ready, begin) = os.pipe(), os.pipe()
            worker = os.fork()
            if not worker:
                os.write(begin, b"1")
                os.close(end)
                os.read(reading, 1)
                os._exit(0)
            os.read(ready, 1)
        check_free(tmp_path)
        os.close(end)
        os.waitpid(worker, 0)

    def test_a_link_is_not_followed(self, tmp_path):
        other, lock = tmp_path / "other.txt", tmp_path / ".lock"
        other.write_text("kept")
        lock.symlink_to(other)
        for call in (check_free, lambda folder: locked(folder).__enter__()):
            with pytest.raises(ConfigurationError, match=r"^output_dir: .*\.lock is a link; remove it"):
                call(tmp_path)
        assert other.read_text() == "kept"

    def test_a_run_that_began_in_the_meantime_is_not_set_aside(self, stopped, config, monkeypatch):
        begin = run_folder.begin_run

        def later(run, *args):
            stack.enter_context(locked(run.folder))
            return begin(run, *args)

        monkeypatch.setattr(run_folder, "begin_run", later)
        with contextlib.ExitStack() as stack, pytest.raises(ConfigurationError, match="another run writes into"):
            train(config, resume_from_checkpoint="never")
        assert (stopped / "checkpoint-2").is_dir()

    def test_the_run_itself_lets_go(self, stopped, config):
        check_free(stopped)
        train(config)
        check_free(stopped)


@pytest.mark.parametrize("given, found", [(None, 512), (64, 64), (4096, 4096)])
def test_the_token_budget_of_the_checkpoint_stays_until_another_is_set(model_dir, sft_file, tmp_path, given, found):
    config = sft_config(model_dir, sft_file, tmp_path / "run", max_steps=3, save_steps=1, validation_split=0)

    class BackOff(StopAfter):
        def on_step_begin(self, *args, **kwargs):
            trainer.trainer.token_budget = 512

    trainer = BaseTrainer(config.model_copy(update={"callbacks": [BackOff(2)]}))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert train(config, token_budget=given).token_budget == found
    progress = json.loads((tmp_path / "run" / "checkpoint-3" / "progress.json").read_text())
    assert progress["trainer"]["token_budget"] == found


def test_a_trainer_that_is_not_ours_goes_on_exactly_too(config, tmp_path, caplog):
    from tests.training.test_base_trainer import CustomTrainer

    caplog.set_level(logging.INFO)

    def run(name, *callbacks):
        CustomTrainer(config.model_copy(update={"output_dir": str(tmp_path / name), "callbacks": [*callbacks]})).train()

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", StopAfter(2))
    run("cut")
    assert "Going on from" in caplog.text
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.rglob("*.pt*")) and not list(tmp_path.rglob("*.bin"))
