"""Training speed of this package, TRL and Unsloth: same model, adapters, token ids and order, and the same outcome.

    python benchmarks/throughput.py --methods sft,dpo,ipo,kto,cpo,simpo --peers ours,ours-fp8,trl,unsloth
        [--shape 0.5b|1.5b|3b|7b|14b | --model PATH] [--data PATH] [--json [FILE]] [--seconds N] [--only PATTERN]
        [--dtype T] [--warmup N] [--steps N] [--batch-size N] [--micro-batch N] [--negatives K] [--equal-lengths]
        [--set KEY=VALUE …]

All train LoRA adapters (r=16, all linear layers, float32 masters, no dropout) from the same start with the same
optimizer. Steps after the warm-up are timed; with them the reference pass of DPO, IPO and KTO, and KTO's mismatched
completions. It fails when the loss is not finite or an adapter weight got no gradient. Every run of a peer is a process of
its own; ours measures all methods in one, each with new adapters and a new optimizer. "ours-fp8" is ours with
base_precision=fp8; --set gives further settings of ours (lora_r and lora_alpha of all; use_lora=false trains all weights, in
one method of ours alone). workload.py says what useful tokens and MFU are.

--batch-size rows make an optimizer step. Peers take it in micro-batches of --micro-batch rows: padded, and for SFT
padding-free (TRL 1.15 and 1.16 have switched it off for the others), each without gradient checkpointing, or with the
smallest concession that makes it fit into memory: half as many rows, checkpointing, both, a quarter; Unsloth with its own
kind of checkpointing, and padding-free where it chooses so (`padding_free` in the JSON). Where liger_kernel is installed, TRL runs with it too. The fastest of a peer's runs counts. TRL's CPO takes pairs, so a row with K negatives is K pairs of a batch there: same loss, same gradient.

Two checks have limits, LARGEST_DIFFERENCE. What they can find:

- `update_difference`, of the peers: ‖ours − theirs‖ / ‖theirs‖ of what training added to the adapters, all weights as one
  vector. In float32 rounding makes it 1e-3 at most, and another order of the rows 0.25 or more: it finds any rows, masks,
  losses or optimizer steps that are not the same. In bfloat16 rounding makes it up to 0.35, so that it finds only updates
  that have little in common; run once in float32, with a small model, to know that the work is the same.
- `loss_difference`, of the peers: |theirs − ours| / |ours| of the mean loss over all steps. It finds another loss, scale or
  average. It is blind to the order of the rows within a step, and in DPO to nearly everything in the first step, which is
  log 2 for all. Steps of few pairs differ by rounding: two pairs in bfloat16 by nearly the limit. Of ours-fp8 it is that
  of the first step, before anything is learned: it finds a base that is computed wrongly, and in DPO policy and reference
  that differ. What FP8 does to what is learned, fp8_quality.py says, on a real model. `losses` has each step.

TRL estimates KTO's divergence and averages CPO's likelihood term by micro-batch, so these two are compared with it only
where a step is one. What was compiled while the clock ran is a problem too: the warm-up was too short.

Without --data, lengths are log-normal: prompts of median 200 and completions of median 250 tokens, at most 1,024 each, an
eighth of that for models under 50 million parameters. --equal-lengths makes all of them the median.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from one_run import OUT_OF_MEMORY

METHODS = ("sft", "dpo", "ipo", "kto", "cpo", "simpo")
PEERS = ("ours", "ours-fp8", "trl", "unsloth")
LARGEST_DIFFERENCE = {"float32": {"update": 0.01, "loss": 0.001}, "bfloat16": {"update": 0.5, "loss": 0.02}}


def attempts(peer: str, method: str, micro_batch: int) -> list[list[dict[str, Any]]]:
    """The peer's variants; of each, runs in the order in which they are tried until one fits."""
    plain = {"micro_batch": micro_batch, "checkpointing": False, "padding_free": False, "liger": False}
    if peer.startswith("ours"):
        return [[plain]]
    halves = [rows for rows in (micro_batch // 2, micro_batch // 4) if rows]
    smaller = [plain, *(plain | {"micro_batch": rows} for rows in halves[:1]), plain | {"checkpointing": True}]
    smaller += [plain | {"micro_batch": rows, "checkpointing": True} for rows in halves]
    padding_free = (False, True) if method == "sft" else (False,)
    liger = (False, True) if importlib.util.find_spec("liger_kernel") else (False,)
    if peer == "unsloth":
        padding_free, liger = (None,), (False,)  # it chooses itself
    kinds = [{"padding_free": free, "liger": kernels} for free in padding_free for kernels in liger]
    return [[run | kind for run in smaller] for kind in kinds]


def variant(peer: str, run: dict[str, Any]) -> str:
    """Of a peer's run, in words."""
    if peer.startswith("ours"):
        return "packed"
    words = [
        "padding-free" if run["padding_free"] else "padded" if peer == "trl" else "",
        f"batch {run['micro_batch']}",
    ]
    words += ["checkpointing" * run["checkpointing"], "Liger" * run["liger"]]
    return ", ".join(word for word in words if word)


def in_own_process(runs: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """What one_run.py says of each, or why it says nothing.

    Args:
        runs: specifications, of one peer.
        seconds: limit for all together.
    """
    print(f"{runs[0]['peer']}: {', '.join(run['method'] for run in runs)} …", file=sys.stderr, flush=True)
    folder = Path(runs[0]["folder"])
    given, results, log = folder / "runs.json", folder / "results.json", folder / "log.txt"
    given.write_text(json.dumps(runs), encoding="utf-8")
    results.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("one_run.py")), str(given), str(results)]
    # Unsloth writes code, into ./ otherwise, and asks the hub for statistics.
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": f"{folder}/unsloth", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:  # its compile workers too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    if len(found) == len(runs):
        return found
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    print("\n".join(lines[-40:]), file=sys.stderr)
    if late:
        reason = f"not done after {seconds:.0f} s"
    elif process.returncode == -signal.SIGKILL or OUT_OF_MEMORY in lines[-1]:  # the kernel kills what lacks memory
        reason = OUT_OF_MEMORY
    else:
        reason = lines[-1][:300]
    return found + [{"failed": reason}] * (len(runs) - len(found))


def compare(result: dict[str, Any], ours: dict[str, Any], files: dict[str, str] | None) -> None:
    """Adds how far this run and ours are apart.

    Args:
        files: what both learned, for a run that should do the same; None: an FP8 base, held to ours in the first step only.
    """
    loss, our_loss = (np.mean(run["losses"] if files else run["losses"][:1]) for run in (result, ours))
    differences = {"loss": abs(loss - our_loss) / abs(our_loss)}
    if files:
        our_update, update = np.load(files["ours"]), np.load(files["theirs"])
        differences["update"] = np.linalg.norm(our_update - update) / np.linalg.norm(update)
    result |= {f"{what}_difference": float(f"{difference:.3g}") for what, difference in differences.items()}


def specification(method: str, peer: str, run: dict[str, Any], args: argparse.Namespace, folder: str) -> dict[str, Any]:
    settings = args.set
    if peer == "ours-fp8":
        settings = [*settings, "base_precision=fp8"]
    elif peer != "ours":
        settings = [pair for pair in settings if pair.startswith(("lora_r=", "lora_alpha="))]
    return run | {
        "method": method,
        "peer": peer,
        "folder": folder,
        "update_file": update_file(folder, method, peer),
        "args": vars(args) | {"set": settings},
    }


def update_file(folder: str, method: str, peer: str) -> str:
    return f"{folder}/{method if peer == 'ours' else 'theirs'}.npy"


def timed_groups(method: str, args: argparse.Namespace, folder: str) -> list[Any]:
    config = workload.configuration(method, args, folder, per_device_train_batch_size=args.batch_size)
    groups = workload.in_training_order(config, workload.load_groups(config, args))
    return groups[args.warmup * args.batch_size :]


class Report:
    """The runs that were measured, by method and peer; written after each.

    Args:
        head: what the written report says of the machine and the settings.
        folder: where updates are kept while they are compared.
    """

    def __init__(self, head: dict[str, Any], args: argparse.Namespace, folder: str):
        self.head, self.args, self.folder = head, args, folder
        self.runs: list[dict[str, Any]] = []

    def add(self, run: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """A run's specification and result: adds speed, and how far it is from ours."""
        method, peer = run["method"], run["peer"]
        entry = {"method": method, "peer": peer, "variant": variant(peer, run), **result}
        if "failed" not in result:
            groups = timed_groups(method, self.args, self.folder)
            entry["tokens_per_s"] = round(workload.useful_tokens(groups) / result["seconds"], 1)
            rank = workload.rank(workload.configuration(method, self.args, self.folder))
            flops = workload.useful_flops(method, groups, workload.model_config(self.args.model), rank)
            entry["mfu"] = workload.mfu(flops, result["seconds"])
            self._compare(entry, run)
        said = entry.get("failed") or f"{entry['tokens_per_s']:,} tokens/s, {entry['peak_gb']} GB"
        print(f"{method} · {peer} · {entry['variant']}: {said}", file=sys.stderr, flush=True)
        self.runs.append(entry)
        self.runs.sort(key=lambda run: (self.args.methods.index(run["method"]), self.args.peers.index(run["peer"])))
        workload.write_json(self.args.json, self.whole())
        return entry

    def _compare(self, entry: dict[str, Any], run: dict[str, Any]) -> None:
        method, peer = run["method"], run["peer"]
        ours = [r for r in self.runs if (r["method"], r["peer"]) == (method, "ours") and "failed" not in r]
        if peer == "ours" or not ours:
            return
        if peer == "ours-fp8":
            compare(entry, ours[0], None)
        elif method not in ("kto", "cpo") or run["micro_batch"] == self.args.batch_size:
            files = {"ours": update_file(self.folder, method, "ours"), "theirs": run["update_file"]}
            compare(entry, ours[0], files)

    def whole(self) -> dict[str, Any]:
        found = summary(self.runs)
        alone = found.get(self.args.methods[0], {}) if len(self.args.methods) == 1 else {}
        return {**self.head, "runs": self.runs, "summary": found, **alone}


def measure_all(report: Report) -> None:
    """Ours first, all methods in one process; then each run of the others in one of its own."""
    args = report.args
    for peer in (peer for peer in args.peers if peer.startswith("ours")):
        plain = attempts(peer, "", args.micro_batch)[0][0]
        runs = [specification(method, peer, plain, args, report.folder) for method in args.methods]
        for run, result in zip(runs, in_own_process(runs, args.seconds * len(runs)), strict=True):
            report.add(run, result)
    for method in args.methods:
        for peer in (peer for peer in args.peers if not peer.startswith("ours")):
            for tries in attempts(peer, method, args.micro_batch):
                for settings in tries:
                    if not re.search(args.only, variant(peer, settings)):
                        continue
                    run = specification(method, peer, settings, args, report.folder)
                    installed = importlib.util.find_spec(peer)
                    result = in_own_process([run], args.seconds)[0] if installed else {"failed": "not installed"}
                    if report.add(run, result).get("failed") != OUT_OF_MEMORY:
                        break


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: the fastest run of each peer, and how many times faster ours is."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        row = found.setdefault(run["method"], {})
        peer = run["peer"].replace("-", "_")
        if run.get("tokens_per_s", 0) > row.get(f"{peer}_tokens_per_s", 0):
            row |= {f"{peer}_tokens_per_s": run["tokens_per_s"], f"{peer}_configuration": run["variant"]}
    for row in found.values():
        for peer, ratio in (("trl", "ratio"), ("unsloth", "unsloth_ratio")):
            if "ours_tokens_per_s" in row and f"{peer}_tokens_per_s" in row:
                row[ratio] = round(row["ours_tokens_per_s"] / row[f"{peer}_tokens_per_s"], 2)
    return found


def problems(runs: list[dict[str, Any]], dtype: str) -> list[str]:
    """What makes the benchmark worthless: ours failed, a run did not do the same as ours, or compiled in its time."""
    found = [f"{run['method']}: {run['failed']}" for run in runs if run["peer"].startswith("ours") and "failed" in run]
    for run in runs:
        for what, largest in LARGEST_DIFFERENCE[dtype].items():
            difference = run.get(f"{what}_difference", 0.0)
            if not difference < largest:
                found.append(f"{run['method']}: {what} of {run['peer']} differs from ours by {difference:.3g}")
        if run.get("compiled_while_timed"):
            found.append(
                f"{run['method']}: {run['peer']} compiled {run['compiled_while_timed']} graphs while it was timed; raise "
                "--warmup"
            )
    return found


def table(report: dict[str, Any]) -> str:
    """All runs in Markdown, the fastest of each peer with how many times faster ours is."""
    lines = [
        "| method | | | tokens/s | ours is | peak GB | MFU | mean loss | update difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        start = f"| {run['method']} | {run['peer']} | {run['variant']} |"
        if "failed" in run:
            lines.append(f"{start} {run['failed']} | | | | | |")
            continue
        best = report["summary"][run["method"]]
        fastest = run["peer"] in ("trl", "unsloth") and run["tokens_per_s"] == best[f"{run['peer']}_tokens_per_s"]
        ratio = best.get("ratio" if run["peer"] == "trl" else "unsloth_ratio") if fastest else None
        share = "" if run["mfu"] is None else f"{run['mfu']:.1%}"
        cells = [f"{run['tokens_per_s']:,.0f}", f"{ratio}×" if ratio else "", run["peak_gb"], share]
        cells += [run["mean_loss"], run.get("update_difference", "")]
        lines.append(f"{start} {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def pattern(text: str) -> str:
    """A regular expression, for argparse."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", "--methods", dest="methods", required=True, help=f"of {','.join(METHODS)}")
    parser.add_argument("--peers", default="ours,trl", help=f"of {','.join(PEERS)}")
    workload.add_model_arguments(parser)
    parser.add_argument("--data", help="rows of the method; default: random tokens")
    parser.add_argument("--warmup", type=workload.positive, default=2, help="optimizer steps before the timed ones")
    parser.add_argument("--steps", type=workload.positive, default=4, help="timed optimizer steps")
    parser.add_argument("--batch-size", type=workload.positive, default=8, help="rows of an optimizer step")
    parser.add_argument("--micro-batch", type=workload.positive, default=8, help="rows that peers compute at a time")
    parser.add_argument(
        "--negatives", type=workload.positive, default=4, help="rejected completions a row, for CPO without --data"
    )
    parser.add_argument("--equal-lengths", action="store_true")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run")
    parser.add_argument("--only", type=pattern, default="", help="only variants of peers whose names match")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON; without FILE print it alone")
    args = parser.parse_args()
    args.methods, args.peers = args.methods.split(","), args.peers.split(",")
    args.micro_batch = min(args.micro_batch, args.batch_size)
    for given, known in ((args.methods, METHODS), (args.peers, PEERS)):
        if not set(given) <= set(known):
            parser.error(f"choose from {', '.join(known)}, separated by commas; got {', '.join(given)}")
    if args.batch_size % args.micro_batch:
        parser.error("--batch-size must be a multiple of --micro-batch")
    if "use_lora=false" in args.set and (args.peers != ["ours"] or len(args.methods) > 1):
        parser.error("--set use_lora=false is for --peers ours and one method: others train adapters here")
    return args


def main() -> int:
    args = arguments()
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "seconds", "methods", "peers")}
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            args.model = workload.write_model(args.shape, folder)
        report = Report(workload.machine() | {"dtype": dtype, "settings": settings}, args, folder)
        measure_all(report)
    whole = report.whole()
    print(json.dumps(whole, indent=2) if args.json == "-" else f"{whole['device']}, {dtype}\n\n{table(whole)}")
    found = problems(report.runs, dtype)
    print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    workload.script(main)
