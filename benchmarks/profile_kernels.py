"""Where the time of one optimizer step of ours goes, by class of kernel.

    python benchmarks/profile_kernels.py --method dpo [--shape 0.5b|1.5b|3b|7b|14b | --model PATH] [--batch-size N]
        [--warmup N] [--json FILE] [--set KEY=VALUE …]

Rows as in throughput.py. One step is recorded by torch.profiler after the warm-up; idle is the time of the step in which no
kernel ran: `gaps` between kernels, the longest first, in the JSON, the rest before the first and after the last. Recording
makes a step a little slower. Without a GPU the classes are those of PyTorch's operators.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from typing import Any

import one_run
import torch
import workload
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

from arabic_qwen.config import METHOD_CONFIGS

#: A kernel is of the first class that has a part of its name.
CLASSES = {
    "attention": ("flash", "fmha", "scaled_dot_product"),
    "gemm": ("nvjet", "cutlass", "gemm", "sm90", "aten::mm", "aten::addmm", "aten::bmm"),
    "triton": ("triton", "_swiglu", "_head_scores"),
    "optimizer": ("multi_tensor", "adam", "_foreach", "_fused"),
    "copy": ("memcpy", "memset", "copy", "aten::to"),
}
ANNOTATIONS = ("Optimizer.", "ProfilerStep", "Torch-Compiled", "## ")  # spans of kernels, not kernels


def kernel_class(name: str) -> str:
    name = name.lower()
    return next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), "other")


class RecordStep(TrainerCallback):
    """Profiles the step after the warm-up; `seconds` is its time by the clock."""

    def __init__(self, warmup: int):
        self.warmup = warmup
        kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        self.profile = profile(activities=[kind])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warmup:
            _synchronize()
            self.profile.start()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warmup + 1:
            _synchronize()
            self.seconds = time.perf_counter() - self.start
            self.profile.stop()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels(recorded: profile) -> list[tuple[str, float, float, float]]:
    """Name, start and end of what ran, and its own time, all in milliseconds."""
    found = []
    for event in recorded.events():
        if event.name.startswith(ANNOTATIONS) or getattr(event, "is_user_annotation", False):
            continue
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == torch.cuda.is_available():
            own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            found.append((event.name, event.time_range.start / 1e3, event.time_range.end / 1e3, own / 1e3))
    return found


def gaps(found: list[tuple[str, float, float, float]]) -> list[tuple[float, float, str]]:
    """When nothing ran between kernels: start, end and the kernel after it, in milliseconds, the longest first."""
    found = sorted(found, key=lambda kernel: kernel[1])
    last = found[0][1]
    idle = []
    for name, start, end, _ in found:
        if start > last:
            idle.append((last, start, name))
        last = max(last, end)
    return sorted(idle, key=lambda gap: gap[0] - gap[1])


def busy(found: list[tuple[str, float, float, float]]) -> float:
    """Milliseconds in which anything ran."""
    first, last = min(start for _, start, _, _ in found), max(end for _, _, end, _ in found)
    return last - first - sum(end - start for start, end, _ in gaps(found))


def analyse(found: list[tuple[str, float, float, float]], seconds: float) -> dict[str, Any]:
    by_class: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, _, _, own in found:
        by_class[kernel_class(name)] += own
        by_name[name].append(own)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:15]
    idle, first = gaps(found), min(start for _, start, _, _ in found)
    return {
        "step_ms": round(seconds * 1e3, 1),
        "idle_ms": round(max(0.0, seconds * 1e3 - busy(found)), 1),
        "gaps_ms": round(sum(end - start for start, end, _ in idle), 1),
        "gaps": [
            {"ms": round(end - start, 2), "after_ms": round(start - first, 2), "before": name[:120]}
            for start, end, name in idle[:10]
        ],
        "classes_ms": {kind: round(ms, 1) for kind, ms in sorted(by_class.items(), key=lambda item: -item[1])},
        "top": [
            {"kernel": name[:120], "class": kernel_class(name), "calls": len(times), "ms": round(sum(times), 2)}
            for name, times in top
        ],
    }


def record(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    config = workload.configuration(
        args.method,
        args,
        f"{folder}/output",
        max_steps=args.warmup + 1,
        logging_steps=args.warmup + 1,
        per_device_train_batch_size=args.batch_size,
    )
    groups = workload.load_groups(config, args)
    trainer = one_run.ours(one_run.load(config), config, groups)
    recording = RecordStep(args.warmup)
    trainer.add_callback(recording)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    timed = workload.in_training_order(config, groups)[args.warmup * args.batch_size :]
    tokens = workload.useful_tokens(timed)
    return {"method": args.method, "useful_tokens": tokens, **analyse(kernels(recording.profile), recording.seconds)}


def table(report: dict[str, Any]) -> str:
    step = report["step_ms"]
    rows = [*report["classes_ms"].items(), ("idle", report["idle_ms"]), ("step", step)]
    lines = ["| class | ms | share |", "|---|---|---|"]
    lines += [f"| {kind} | {ms:,.1f} | {ms / step:.1%} |" for kind, ms in rows]
    lines += ["", "| kernel | class | calls | ms |", "|---|---|---|---|"]
    return "\n".join(
        lines + [f"| `{row['kernel'][:70]}` | {row['class']} | {row['calls']} | {row['ms']} |" for row in report["top"]]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=METHOD_CONFIGS)
    workload.add_model_arguments(parser)
    parser.add_argument("--warmup", type=workload.positive, default=3, help="optimizer steps before the recorded one")
    parser.add_argument("--batch-size", type=workload.positive, default=8, help="rows of an optimizer step")
    parser.add_argument("--negatives", type=workload.positive, default=4, help="rejected completions a row, for CPO")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON; without FILE print it alone")
    parser.set_defaults(steps=1, data=None, equal_lengths=False)
    args = parser.parse_args()
    report = workload.machine() | {"settings": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            args.model = workload.write_model(args.shape, folder)
        report |= record(args, folder)
    workload.write_json(args.json, report)
    print(json.dumps(report, indent=2) if args.json == "-" else f"{report['device']}\n\n{table(report)}")


if __name__ == "__main__":
    workload.script(main)
