"""The files that tell what a run did: loss curve and model card."""

from __future__ import annotations

import contextlib
import html
import io
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

import arabic_qwen
from arabic_qwen.config import BaseConfig
from arabic_qwen.config.data import describe
from arabic_qwen.files import write_atomically
from arabic_qwen.redaction import redact

METRICS_FILE = "metrics.jsonl"
#: Answers to held-out prompts, one JSON object a line: step, prompt, answer, reference, script and dialect.
SAMPLES_FILE = "samples.jsonl"
LOSS_CURVE = "loss_curve.png"

#: Settings that may be paths.
_PATHS = (
    "model_name",
    "ref_model_name",
    "dataset_path",
    "eval_dataset_path",
    "output_dir",
    "deepspeed",
    "dialect_model",
)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines; none where it does not exist."""
    entries = []
    # A run that was killed may leave half a line, and half a letter.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def draw_loss_curve(run_dir: Path) -> Path | None:
    """Draw training and validation loss over steps from `metrics.jsonl`; None where there is nothing to draw."""
    entries = read_entries(run_dir / METRICS_FILE)
    panels = [{"training": "loss", "validation": "eval_loss"}]
    by_dialect = sorted({key for entry in entries for key in entry if key.startswith("eval_loss/")})
    if by_dialect:
        panels.append({f"validation, {key.partition('/')[2]}": key for key in by_dialect})
    figure = Figure(figsize=(7 * len(panels), 4))
    for axes, lines in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, key in lines.items():
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel="optimizer step", ylabel="loss", title=run_dir.name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    if not any(axes.lines for axes in figure.axes):
        return None
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomically(run_dir / LOSS_CURVE, image.getvalue())
    return run_dir / LOSS_CURVE


def _unlocated(config: BaseConfig) -> BaseConfig:
    """Of a path on this machine only the last part: a card is published."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        if isinstance(value, dict):  # an entry of dataset_path
            return value | {"path": short(value["path"])}
        return Path(value).name if value and Path(value).is_absolute() else value

    paths = {name: getattr(config, name) for name in _PATHS if hasattr(config, name)}
    return config.model_copy(update={name: short(value) for name, value in paths.items()})


def model_card(
    config: BaseConfig,
    metrics: dict[str, float],
    data: dict[str, str],
    samples: list[dict[str, Any]],
    *,
    adapter: bool,
) -> str:
    """README.md of an output folder, in the hub's format.

    Args:
        config: the run's configuration.
        metrics: final evaluation metrics; may be empty.
        data: one line on each split, and on rows left out.
        samples: prompts, answers and references; may be empty.
        adapter: whether the folder holds adapters, not a whole model.
    """
    config = _unlocated(config)
    header = ["---", "language: ar", "library_name: " + ("peft" if adapter else "transformers")]
    header += [f"base_model: {config.model_name}", f"tags: [arabic-qwen, {config.method}]", "---"]
    what = "LoRA adapters for" if adapter else "Full weights, fine-tuned from"
    lines = [*header, "", f"# {Path(config.resolved_output_dir).name}", ""]
    lines += [f"{what} `{config.model_name}`, trained with {config.method.upper()} by Arabic Qwen.", "", "## Data", ""]
    files = {"train": config.dataset_path, "validation": config.eval_dataset_path or config.dataset_path}
    places = {name: f", `{describe(path)}`" for name, path in files.items()}
    lines += [f"- {name}{places.get(name, '')}: {summary}" for name, summary in data.items()] or ["- not recorded"]
    lines += ["", "## Results", ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|", *(f"| {k} | {v:.4f} |" for k, v in metrics.items())]
    else:
        lines += ["No validation rows, so no metrics."]
    lines += [
        "",
        f"![loss curve]({LOSS_CURVE})",
        *_samples(samples),
        "",
        "## Hyper-parameters",
        "",
        "| name | value |",
        "|---|---|",
    ]
    lines += [f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in config.model_dump().items()]
    lines += ["", "## Use", "", "```python", "from arabic_qwen.training.base_trainer import BaseTrainer"]
    lines += [f"from arabic_qwen.config import {type(config).__name__}", ""]
    lines += [f"trainer = BaseTrainer({type(config).__name__}())", 'trainer.load_model("path/to/this/folder")']
    lines += ['print(trainer.predict("ما عاصمة الأردن؟", max_length=64))', "```", "", "## Versions", ""]
    versions = {"arabic-qwen": arabic_qwen, "transformers": transformers, "torch": torch}
    lines += [f"- {name} {module.__version__}" for name, module in versions.items()]
    return redact("\n".join(lines)) + "\n"


def _samples(samples: list[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    lines = ["", "## Answers to held-out prompts", "", '<div dir="rtl">', ""]
    for sample in samples:
        for name, label in (("prompt", "السؤال"), ("answer", "جواب النموذج"), ("reference", "الجواب المرجعي")):
            text = html.escape(sample[name]).replace("\n", "<br>")  # an empty line would end the element
            lines.append(f'<p dir="rtl"><b>{label}:</b> <bdi>{text}</bdi></p>')
        lines.append("<hr>")
    return [*lines[:-1], "", "</div>"]
