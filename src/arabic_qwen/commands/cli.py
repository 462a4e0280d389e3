"""The command `arabic-qwen`: one verb a capability.

Heavy imports stand inside the verbs, so that help and errors come at once.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from arabic_qwen.commands.data import Plugin, data
from arabic_qwen.errors import ConfigurationError, DatasetError, OutputError, TrainingError
from arabic_qwen.methods.registry import METHODS, known_method, load_plugins
from arabic_qwen.redaction import RedactedStream
from arabic_qwen.terminal import Formatter, displayed, isolated

app = typer.Typer(
    help="""Fine-tune Qwen models for Arabic.

    A first session, in this order:

    \b
      arabic-qwen doctor                    what this machine can do
      arabic-qwen quickstart                all of it with a tiny model, 2 minutes
      arabic-qwen data check rows.jsonl     what is wrong with your data
      arabic-qwen init sft > sft.yaml       put your model and your data there
      arabic-qwen plan sft.yaml             where it fits, and how long it takes
      arabic-qwen train sft.yaml --dry-run  check it all, and what it would take
      arabic-qwen train sft.yaml            train
      arabic-qwen chat ./checkpoints/sft    talk to the result
      arabic-qwen compare ./checkpoints/sft beside what it was before
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(data, name="data")

_GPU_HELP = (
    "A GPU to plan for, or several times: RTX 3060, RTX 3090, RTX 4090, L4, A10, L40S, A100 40GB, A100 80GB, H100 80GB, "
    "H200; others by their memory, as 16GB, taken as Ampere"
)

Model = Annotated[str, typer.Argument(help="Hub id, model folder, or the output folder of a run")]
_METHOD_HELP = f"Training method: {', '.join(METHODS)}, or one of a --plugin"


@app.command(epilog="Example: arabic-qwen doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else")] = False) -> None:
    """Say what this machine can do: versions, devices, memory, network, extras; exit 1 where it cannot train."""
    _set_up_output()
    from rich.console import Console
    from rich.markup import escape

    from arabic_qwen.commands.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], ensure_ascii=False, indent=2))
    else:
        marks = {"ok": "[green]✓[/]", "missing": "[yellow]✗[/]", "info": "–", "impossible": "[red]✗[/]"}
        console = Console(highlight=False, soft_wrap=True)
        for level, name, text in findings:
            console.print(f"{marks[level]} {name:<18}{escape(text)}")
    if any(finding.level == "impossible" for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example: arabic-qwen quickstart --output-dir first-run")
def quickstart(
    model: Annotated[str, typer.Option(help="Hub id or folder of a model; default: a tiny one that comes along")] = "",
    data: Annotated[
        str, typer.Option(help="Data file, folder or hub id; default: 240 sample rows that come along")
    ] = "",
    output_dir: Annotated[str, typer.Option(help="Where the run is written")] = "quickstart",
) -> None:
    """Fine-tune a model on Arabic instructions, then on preferences, and show what changed on held-out rows."""
    _set_up_output()
    from arabic_qwen.commands.quickstart import run

    run(model, data, output_dir)


@app.command(epilog="Example: arabic-qwen init dpo > dpo.yaml")
def init(method: Annotated[str, typer.Argument(help=_METHOD_HELP)], plugin: Plugin = None) -> None:
    """Print a commented YAML file with every setting of a method and its default."""
    load_plugins(plugin or [])
    print(known_method(method).config.commented_yaml(), end="")


@app.command(epilog="Example: arabic-qwen schema sft > sft.schema.json")
def schema(
    method: Annotated[str, typer.Argument(help=f"{_METHOD_HELP}; default: all, told apart by `method`")] = "",
    plugin: Plugin = None,
) -> None:
    """Print the JSON Schema of configuration files, by which editors complete and check YAML."""
    load_plugins(plugin or [])
    from arabic_qwen.config.schema import any_schema, method_schema

    found = method_schema(known_method(method).name) if method else any_schema()
    print(json.dumps(found, ensure_ascii=False, indent=2))


@app.command(epilog="Example: arabic-qwen train sft.yaml learning_rate=1e-4 --dry-run")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; `arabic-qwen init sft` prints one to edit")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs that win over the file")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model, data and settings, measure one batch, write nothing")
    ] = False,
    plugin: Plugin = None,
) -> None:
    """Train as a YAML file says; a run that was stopped goes on where it was."""
    _set_up_output()
    load_plugins(plugin or [])
    from arabic_qwen.config import load_config

    settings = load_config(config, overrides)
    if dry_run:
        from arabic_qwen.commands.dry_run import dry_run as rehearse

        print(displayed("\n".join(rehearse(settings))))
        return
    from arabic_qwen.data.bad_rows import is_first_process
    from arabic_qwen.runs.checkpoints import find_checkpoints
    from arabic_qwen.training.base_trainer import BaseTrainer

    trainer = BaseTrainer(settings)
    try:
        trainer.train()
    except (KeyboardInterrupt, SystemExit, OutputError, DatasetError) as stop:
        saved = find_checkpoints(Path(settings.resolved_output_dir))
        same = settings.resume_from_checkpoint == "auto" and not settings.overwrite_output_dir
        what = "the same command" if same else "resume_from_checkpoint=auto overwrite_output_dir=false"
        how = f"go on from {saved[0]}" if saved else "start again, for there is no checkpoint yet"
        if isinstance(stop, TrainingError):
            if saved:
                stop.args = (f"{stop}\nthen {what} will {how}",)
            raise
        print(f"stopped; {what} will {how}", file=sys.stderr)
        raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else 143) from None
    if not is_first_process():
        return
    for name, value in trainer.metrics.items():
        print(f"{name} {value:.4f}")
    folder = settings.resolved_output_dir
    print(f"model, README.md, metrics.jsonl and loss_curve.png: {folder}")
    own = "".join(f" --plugin {shlex.quote(file)}" for file in plugin or [])
    print(f"talk to it: arabic-qwen chat {folder}{own}")


@app.command(epilog="Example: arabic-qwen plan dpo.yaml load_in_4bit=true --gpu 'RTX 3060'")
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, as for train")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs that win over the file")] = None,
    gpu: Annotated[list[str] | None, typer.Option(help=_GPU_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object and nothing else")] = False,
    plugin: Plugin = None,
) -> None:
    """Estimate memory, speed and time of a run, here and on GPUs by name, and what to change where it does not fit."""
    _set_up_output()
    load_plugins(plugin or [])
    from arabic_qwen.config import load_config

    settings = load_config(config, overrides)  # what is misspelt is said before PyTorch is loaded
    from rich.console import Console

    from arabic_qwen.plan import tables
    from arabic_qwen.plan.estimate import plan as estimate

    found = estimate(settings, gpu or [])
    if as_json:
        print(json.dumps(tables.as_json(found), ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False)
    for part in tables.tables(found):
        console.print(part, soft_wrap=True)


@app.command(epilog="Example: arabic-qwen chat ./checkpoints/sft --system 'أجب بالعربية الفصحى.'")
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="System prompt")] = "",
    max_length: Annotated[int, typer.Option(help="New tokens an answer at most", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: always the likeliest token", min=0)
    ] = 0.0,
    plugin: Plugin = None,
) -> None:
    """Talk to a model, one line a turn; /help lists what else can be said, Ctrl-D ends it."""
    _set_up_output()
    load_plugins(plugin or [])
    from arabic_qwen.commands.chat import Chat

    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    Chat(model, system, max_length, **sampling).run()


@app.command(epilog="Example: arabic-qwen compare ./checkpoints/dpo --count 5 --blind")
def compare(
    model: Annotated[str, typer.Argument(help="Output folder of a run")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times")] = None,
    prompts: Annotated[str, typer.Option(help="File with one prompt a line; default: the run's held-out rows")] = "",
    count: Annotated[int, typer.Option(help="Prompts at most", min=1)] = 20,
    max_length: Annotated[int, typer.Option(help="New tokens an answer at most", min=1)] = 256,
    blind: Annotated[bool, typer.Option(help="Rate answers without knowing which is which")] = False,
    ratings: Annotated[Path | None, typer.Option(help="Where ratings are kept; default: MODEL/ratings.jsonl")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else")] = False,
    plugin: Plugin = None,
) -> None:
    """Show answers of a trained model beside those it gave before training."""
    if blind and as_json:
        raise ConfigurationError(
            "--json: cannot be used with --blind, which asks on the terminal; leave one of them out"
        )
    _set_up_output()
    load_plugins(plugin or [])
    from arabic_qwen.commands import compare as comparison

    compared = comparison.compare(model, prompt or [], prompts, count, max_length)
    if blind:
        wins = comparison.rate(compared, ratings or Path(model, "ratings.jsonl"))
        print(f"\ntrained {wins['trained']} · before {wins['reference']} · ties {wins['tie']}")
    elif as_json:
        print(json.dumps(compared, ensure_ascii=False, indent=2))
    else:
        for row in compared:
            print(f"\nprompt   {isolated(row['prompt'], 9)}")
            print(f"before   {isolated(row['reference_model_response'], 9)}")
            print(f"trained  {isolated(row['trained_model_response'], 9)}")


def _set_up_output() -> None:
    """Our own messages as plain lines on stderr; libraries' only from warnings on, and their bars only on a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("arabic_qwen", "BaseTrainer", "SFTTrainer", "DPOTrainer"):
        logging.getLogger(name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def main() -> None:
    """Run the command; errors meant for users are one message and an exit code: 2 for configuration and data, else 1.

    Nothing that is printed, by whatever library, holds a secret.
    """
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    try:
        app(prog_name="arabic-qwen")
    except TrainingError as error:
        print(displayed(f"error: {error}", sys.stderr), file=sys.stderr)
        sys.exit(2 if isinstance(error, (ConfigurationError, DatasetError)) else 1)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("arabic_qwen"):
            raise
        print(f"error: the package {error.name} is missing; pip install arabic-qwen brings it", file=sys.stderr)
        sys.exit(1)
