"""Runs that are killed with SIGKILL and resumed, each in a process forked from this one, which has imported everything.

    python -m tests.runs.kill_trials '{"kills": {"sft": [20, 20], …}, "model": …, "data": {"sft": …, …}, "folder": …}'

kills at 20 random moments and in 20 writes, and prints a line of JSON a method: how many trials there were, how many ended as the uninterrupted run did, and what differed.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from arabic_qwen.runs import checkpoints, state
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_trainer import sft_config
from tests.preference_runs import preference_config

#: What changes the disk; a kill comes before the call or, where there is content, when half of it is written.
SYSTEM_CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


def config(method, model, data, folder):
    values = dict(lora_dropout=0.1, validation_split=0.25, max_steps=4, save_steps=1, eval_steps=2, save_total_limit=2)
    values["eval_samples"] = 0
    values |= dict(lora_target_modules=["q_proj"], warmup_ratio=0.25, lr_scheduler_type="linear")
    if method == "sft":
        return sft_config(model, data, folder, **values)
    return preference_config(method, model, data, folder, **values)


class KillAt:
    """Counts what changes the disk, and kills this process at the `number`-th of it."""

    def __init__(self, number, log):
        self.left = number
        self.log = log
        for name in SYSTEM_CALLS:
            setattr(os, name, self.watched(name, getattr(os, name)))
        Path.write_text = self.watched("write", Path.write_text, self.half_a_text)
        safetensors.torch.save_file = state.save_file = self.watched("tensors", state.save_file, self.half_the_tensors)

    def watched(self, name, call, half=None):
        def watching(*args, **kwargs):
            self.left -= 1
            os.write(self.log, f"{name}\n".encode())
            if not self.left:
                if half:
                    half(call, *args)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return watching

    def half_a_text(self, write, path, text, *_):
        write(path, text[: len(text) // 2], encoding="utf-8")

    def half_the_tensors(self, save, tensors, path, *_):
        save(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)


def train(settings, log, kill_at=0):
    """Train in a forked process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        KillAt(kill_at, os.open(f"{log}.calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        BaseTrainer(settings).train()
        code = 0
    finally:
        os._exit(code)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder):
    """Weights of the output, and weights, optimizer, schedule and random states of the last checkpoint."""
    last = checkpoints.find_checkpoints(folder)[0]
    names = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json", "random.json")
    files = [folder / names[0], *(last / name for name in names), last / "random.safetensors"]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def trials(method, model, data, folder, random_kills, write_kills):
    """[(kind, what was wrong or "")] of each trial."""
    log = f"{folder}.log"
    whole = Path(folder, "whole", "run")
    started = time.monotonic()
    assert wait(train(config(method, model, data, whole), log)) == 0, Path(log).read_text()
    duration = time.monotonic() - started
    expected = outcome(whole)
    calls = Path(f"{log}.calls").read_text().split()
    chance = random.Random(method)
    plan = [("time", duration * chance.random()) for _ in range(random_kills)]
    plan += [("call", number) for number in choose(calls, write_kills, chance)]
    results = []
    for kind, moment in plan:
        run = Path(folder, "cut", "run")
        settings = config(method, model, data, run)
        if kind == "time":
            child = train(settings, log)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
        else:
            child = train(settings, log, kill_at=moment)
        if kind == "call":
            kind = calls[moment - 1]
        code = wait(child)
        wrong = "" if code in (0, -signal.SIGKILL) else "ended by itself"
        if wait(train(settings, log)):
            wrong = "did not resume"
        else:
            found = outcome(run)
            wrong = wrong or ", ".join(name for name in expected if found.get(name) != expected[name])
        results.append((kind, wrong))
        shutil.rmtree(run)
    return results


def choose(calls, number, chance):
    """Numbers of calls to kill at: each kind of call first, then any."""
    kinds = sorted(set(calls))
    chosen = [chance.choice([i for i, call in enumerate(calls, 1) if call == kind]) for kind in kinds][:number]
    return chosen + [chance.randint(1, len(calls)) for _ in range(number - len(chosen))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # or each child walks, and so copies, all that was imported
    spec = json.loads(sys.argv[1])
    for method, kills in spec["kills"].items():
        found = trials(method, spec["model"], spec["data"][method], Path(spec["folder"], method), *kills)
        wrong = [result for result in found if result[1]]
        kinds = sorted({kind for kind, _ in found})
        report = {"method": method, "trials": len(found), "exact": len(found) - len(wrong), "kinds": kinds}
        print(json.dumps(report | {"wrong": wrong}), flush=True)
