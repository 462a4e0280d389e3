"""What `arabic-qwen plan` found, as tables for a terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arabic_qwen.plan.estimate import Estimate, Plan

_BAR = 50  # columns
#: The parts of a bar: told apart by shade where there is no colour.
_PARTS = {
    "weights": ("█", "blue"),
    "reference": ("▚", "magenta"),
    "optimizer": ("▓", "yellow"),
    "activations": ("▒", "green"),
    "head": ("░", "cyan"),
}


def tables(plan: Plan) -> Iterator[RenderableType]:
    """The model and the data in a line each, a table of devices, their memory as bars, and what to change."""
    shape = plan.shape
    adapters = f", {shape.adapters:,} more in adapters" if shape.adapters else ", all trained"
    missing = "" if plan.has_weights else "; its weights are not on this machine yet"
    yield f"model  {escape(plan.model)}: {shape.parameters:,} parameters in {shape.layers} layers{adapters}{missing}"
    steps = f"; {plan.mix.steps:,} steps" if plan.mix.steps else ""
    yield f"data   {escape(plan.mix.note)}{steps}"
    yield ""
    yield _devices(plan)
    yield f"computed in {'; in '.join(_computed(plan))}"
    if waiting := [escape(device.name) for device in plan.devices if device.waits]:
        yield (
            f"slowed down by the processor, which launches many small kernels: {', '.join(waiting)}; a larger "
            "per_device_train_batch_size, until a step fills token_budget, takes less time a token"
        )
    yield "tokens/s: of those computed, where a prompt counts once for all its answers"
    yield "time: training steps and a precomputed reference only; evaluations, samples and compiling come on top"
    if any(device.fits and not device.seconds for device in plan.devices):
        yield "–: not known of processors, other GPUs, small models, float32, int8, DoRA, or without flash attention"
    for device in plan.devices:
        if device.refusal:
            yield f"no on {escape(device.name)}: {escape(device.refusal)}"
    yield ""
    yield from _bars(plan)
    for device in plan.devices:
        if device.parts.total > device.limit:
            yield ""
            yield from _changes(device)
    for device in plan.devices:
        if device.faster and device.seconds:
            less = [f"{change.setting} (−{1 - change.seconds / device.seconds:.0%})" for change in device.faster]
            yield f"less time on {device.name}: {', '.join(less)}{', each by itself' * (len(less) > 1)}"


def _devices(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    time = "time" if plan.mix.steps else "1M tokens"
    for column in ("peak GB", "usable", "fits", "token_budget", "recomputed", "tokens/s", time):
        table.add_column(column, justify="right", no_wrap=True)
    for device in plan.devices:
        table.add_row(
            device.name,
            _gigabytes(device.parts.total),
            f"{device.limit / 1e9:.1f}",
            "[green]yes[/]" if device.fits else "[red]no[/]",
            f"{device.fit.token_budget:,}",
            f"{device.fit.recomputed} of {plan.shape.layers}",
            f"{device.tokens_per_s:,.0f}" if device.tokens_per_s else "–",
            _duration(device.seconds) if device.seconds else "–",
        )
    return table


def _precision(device: Estimate) -> str:
    return str(device.dtype).removeprefix("torch.")


def _computed(plan: Plan) -> Iterator[str]:
    """In which precision, and whether compiled, with the names of the devices."""
    names: dict[str, list[str]] = {}
    for device in plan.devices:
        how = _precision(device) + ", compiled" * device.compiled
        names.setdefault(how, []).append(escape(device.name))
    return (f"{how}: {', '.join(devices)}" for how, devices in names.items())


def _bars(plan: Plan) -> Iterator[RenderableType]:
    """Each device's memory as a bar of the same length, filled by what the step takes."""
    width = max(len(device.name) for device in plan.devices)
    for device in plan.devices:
        line, end = Text(f"{device.name:<{width}}  "), 0
        scale, taken = _BAR / max(device.memory, device.parts.total), 0.0
        for name, size in device.parts._asdict().items():
            mark, colour = _PARTS[name]
            taken += size
            columns, end = round(taken * scale) - end, round(taken * scale)
            line.append(mark * columns, colour)
        line.append("·" * (_BAR - end))
        yield line
    used = [name for name in _PARTS if any(getattr(device.parts, name) for device in plan.devices)]
    words = {"optimizer": "gradients and optimizer", "head": "head or a layer's working set"}
    legend = Text(" " * (width + 2))
    for name in used:
        mark, colour = _PARTS[name]
        legend.append(mark, colour)
        legend.append(f" {words.get(name, name)}  ")
    yield legend


def _changes(device: Estimate) -> Iterator[str]:
    if not device.changes:
        yield f"to fit on {device.name}: a smaller model; no setting makes enough of a difference"
        return
    yield f"to fit {'into the memory of' if device.refusal else 'on'} {device.name}, in this order:"
    width = max(len(change.setting) for change in device.changes)
    for change in device.changes:
        saved, least = f"{change.saved / 1e9:.1f}", f"{change.least / 1e9:.1f}"
        yield f"  {change.setting:<{width}}  saves {saved:>5} GB: {least} GB {'is enough' if change.fits else 'are still needed'}"
    if not any(change.fits for change in device.changes):
        yield "  and a smaller model: that is still too much"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.{1 if size >= 1e9 else 2}f}"


def _duration(seconds: float) -> str:
    if seconds <= 120:
        return f"{math.ceil(seconds)} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    minutes = math.ceil(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as JSON; bytes and seconds.

    `seconds` is of all training steps, or of a million tokens where `steps` is null; `tokens_per_s` is of their tokens.
    """
    return {
        "model": plan.model,
        "has_weights": plan.has_weights,
        "parameters": plan.shape.parameters,
        "adapters": plan.shape.adapters,
        "layers": plan.shape.layers,
        "data": plan.mix.note,
        "steps": plan.mix.steps,
        "devices": [
            {
                "name": device.name,
                "memory": round(device.memory),
                "usable": round(device.limit),
                "dtype": _precision(device),
                "compiled": device.compiled,
                "peak": round(device.parts.total),
                "parts": {name: round(size) for name, size in device.parts._asdict().items()},
                "fits": device.fits,
                "refusal": device.refusal or None,
                "token_budget": device.fit.token_budget,
                "recomputed_layers": device.fit.recomputed,
                "tokens_per_s": device.tokens_per_s,
                "seconds": device.seconds,
                "waits_for_processor": device.waits,
                "faster": [change._asdict() for change in device.faster],
                "changes": [
                    change._asdict() | {"saved": round(change.saved), "least": round(change.least)}
                    for change in device.changes
                ],
            }
            for device in plan.devices
        ],
    }
