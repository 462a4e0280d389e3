"""How speed and memory of ours grow with the sequence, the share of the prompt, and the number of rejected answers.

    python benchmarks/scaling.py [--shape 0.5b|1.5b|3b|7b|14b | --model PATH] [--lengths 512,…,32768]
        [--ratios 8:1,…,1:8] [--total 2048] [--negatives 1,…,16] [--tokens-per-step N] [--warmup N] [--steps N]
        [--json FILE] [--plot FILE.png] [--set KEY=VALUE …]

Random tokens, equal lengths, LoRA as in throughput.py. A step has as many rows as --tokens-per-step useful tokens make, at
least one. Length: of a sequence, half of it prompt, in SFT and DPO. Ratio: of prompt to completion in DPO, for --total
tokens together. Negatives: of CPO, with prompt and completions of an eighth of --total each. Memory that does not suffice is a
result. workload.py says what useful tokens and MFU are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np
import one_run
import workload
from matplotlib.figure import Figure

from arabic_qwen.packing.group import Group
from arabic_qwen.training.base_trainer import BaseTrainer

PANELS = {
    "length": "tokens of a sequence, half of them prompt",
    "ratio": "prompt : completion",
    "negatives": "rejected answers of a prompt",
}


class Point(NamedTuple):
    panel: str
    method: str
    x: float
    label: str
    prompt: int
    completion: int
    completions: int


def numbers(text: str) -> list[int]:
    return [workload.positive(number) for number in text.split(",")]


def ratios(text: str) -> list[tuple[int, int]]:
    """Of "2:1,1:2"."""
    try:
        return [(workload.positive(a), workload.positive(b)) for a, b in (one.split(":") for one in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not ratios as 2:1,1:2") from None


def points(args: argparse.Namespace) -> list[Point]:
    found = [
        Point("length", method, length, f"{length:,}", length // 2, length - length // 2, completions)
        for method, completions in (("sft", 1), ("dpo", 2))
        for length in args.lengths
    ]
    for prompt, completion in args.ratios:
        ratio = f"{prompt}:{completion}"
        share = max(1, args.total * prompt // (prompt + completion))
        found.append(Point("ratio", "dpo", prompt / completion, ratio, share, args.total - share, 2))
    part = args.total // 8
    return found + [Point("negatives", "cpo", count, str(count), part, part, 1 + count) for count in args.negatives]


def groups_of(point: Point, count: int, vocabulary: int) -> list[Group]:
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return workload.random_tokens(rng, vocabulary, length)

    return [
        workload.compared([tokens(point.prompt), *(tokens(point.completion) for _ in range(point.completions))])
        for _ in range(count)
    ]


def measure(point: Point, loaded: BaseTrainer, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One point, on the model that is loaded."""
    tokens = (point.prompt + point.completion) * point.completions
    rows, steps = max(1, args.tokens_per_step // tokens), args.warmup + args.steps
    config = workload.configuration(
        point.method,
        args,
        f"{folder}/output",
        max_steps=steps,
        logging_steps=steps,
        per_device_train_batch_size=rows,
        max_seq_length=max(workload.LONGEST, point.prompt + point.completion),
    )
    shape = workload.model_config(args.model)
    groups = groups_of(point, rows * steps, shape.vocab_size)
    result = one_run.measured(lambda: one_run.ours(loaded, config, groups), args.warmup, config.use_lora)
    if "failed" in result:
        return point._asdict() | result
    timed = groups[: rows * args.steps]
    result["tokens_per_s"] = round(workload.useful_tokens(timed) / result["seconds"], 1)
    flops = workload.useful_flops(point.method, timed, shape, workload.rank(config))
    result["mfu"] = workload.mfu(flops, result["seconds"])
    return point._asdict() | {"rows": rows} | result


def plot(results: list[dict[str, Any]], path: str) -> None:
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (panel, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        memory = axes.twinx()
        shown = [result for result in results if result["panel"] == panel and "failed" not in result]
        for number, method in enumerate(dict.fromkeys(result["method"] for result in shown)):
            of_method = [result for result in shown if result["method"] == method]
            x = [result["x"] for result in of_method]
            color = f"C{number}"
            axes.plot(x, [r["tokens_per_s"] for r in of_method], color, marker="o", label=f"{method} tokens/s")
            memory.plot(x, [r["peak_gb"] for r in of_method], color, linestyle=":", label=f"{method} peak GB")
        axes.set_xscale("log", base=2)
        ticks = {result["x"]: result["label"] for result in shown}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set(xlabel=title, ylabel="useful tokens/s")
        memory.set(ylabel="peak GB (dotted)")
        for shared, key in ((axes, "tokens_per_s"), (memory, "peak_gb")):
            shared.set_ylim(0, 1.1 * max((result[key] for result in shown), default=1))
        axes.grid(alpha=0.3)
        axes.tick_params("x", labelsize="small")
        if shown:
            axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def table(report: dict[str, Any]) -> str:
    lines = ["| | method | | tokens/s | peak GB | MFU |", "|---|---|---|---|---|---|"]
    for result in report["points"]:
        start = f"| {result['panel']} | {result['method']} | {result['label']} |"
        if "failed" in result:
            lines.append(f"{start} {result['failed']} | | |")
        else:
            share = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
            lines.append(f"{start} {result['tokens_per_s']:,.0f} | {result['peak_gb']} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_model_arguments(parser)
    parser.add_argument("--lengths", type=numbers, default="512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--ratios", type=ratios, default="8:1,4:1,2:1,1:1,1:2,1:4,1:8")
    parser.add_argument(
        "--total", type=workload.positive, default=2048, help="tokens of prompt and completion, for the ratios"
    )
    parser.add_argument("--negatives", type=numbers, default="1,2,4,8,16")
    parser.add_argument(
        "--tokens-per-step", type=workload.positive, default=32768, help="useful tokens of an optimizer step"
    )
    parser.add_argument("--warmup", type=workload.positive, default=2, help="optimizer steps before the timed ones")
    parser.add_argument("--steps", type=workload.positive, default=2, help="timed optimizer steps")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    report: dict[str, Any] = workload.machine() | {"settings": vars(args), "points": []}
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            args.model = workload.write_model(args.shape, folder)
        loaded = one_run.load(workload.configuration("dpo", args, f"{folder}/output"))
        for point in points(args):
            result = measure(point, loaded, args, folder)
            report["points"].append(result)
            workload.write_json(args.json, report)
            said = result.get("failed") or f"{result['tokens_per_s']:,} tokens/s, {result['peak_gb']} GB"
            print(f"{point.panel} · {point.method} · {point.label}: {said}", file=sys.stderr)
    if args.plot:
        plot(report["points"], args.plot)
    print(f"{report['device']}\n\n{table(report)}")


if __name__ == "__main__":
    workload.script(main)
