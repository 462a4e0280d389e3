"""The command `arabic-qwen`: one verb a capability.

Heavy imports stand inside the verbs, so that help and errors come at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from arabic_qwen.errors import ConfigurationError, DatasetError, TrainingError

app = typer.Typer(
    help="Fine-tune Qwen models for Arabic.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Hub id, model folder, or the output folder of a run")]


@app.command()
def quickstart(
    model: Annotated[str, typer.Option(help="Hub id or folder of a model; default: a tiny one that comes along")] = "",
    data: Annotated[str, typer.Option(help="JSON Lines file; default: 200 sample rows that come along")] = "",
    output_dir: Annotated[str, typer.Option(help="Where the run is written")] = "quickstart",
) -> None:
    """Fine-tune a model on Arabic instructions, then on preferences, and show what changed on held-out rows."""
    _set_up_output()
    from arabic_qwen.quickstart import run

    run(model, data, output_dir)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; `arabic-qwen init sft` prints one to edit")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs that win over the file")] = None,
) -> None:
    """Train as a YAML file says."""
    _set_up_output()
    from arabic_qwen.config import load_config

    settings = load_config(config, overrides)
    from arabic_qwen.training.base_trainer import BaseTrainer

    trainer = BaseTrainer(settings)
    try:
        trainer.train()
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the newest checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") != "0":
        return
    for name, value in trainer.metrics.items():
        print(f"{name} {value:.4f}")
    folder = settings.resolved_output_dir
    print(f"model, README.md, metrics.jsonl and loss_curve.png: {folder}")
    print(f"talk to it: arabic-qwen chat {folder}")


@app.command()
def init(method: Annotated[str, typer.Argument(help="Training method, for example sft")]) -> None:
    """Print a commented YAML file with every setting of a method and its default."""
    from arabic_qwen.config import METHOD_CONFIGS

    if method not in METHOD_CONFIGS:
        raise ConfigurationError(f"{method}: unknown method; choose one of {', '.join(METHOD_CONFIGS)}")
    print(METHOD_CONFIGS[method].commented_yaml(), end="")


@app.command()
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="System prompt")] = "",
    max_length: Annotated[int, typer.Option(help="New tokens an answer at most", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: always the likeliest token", min=0)
    ] = 0.0,
) -> None:
    """Talk to a model: one line a turn; /reset forgets the conversation, /exit or Ctrl-D ends it."""
    _set_up_output()
    from transformers import TextStreamer

    from arabic_qwen.config import SFTConfig
    from arabic_qwen.training.base_trainer import BaseTrainer

    trainer = BaseTrainer(SFTConfig(model_name=model, instruction_template="tokenizer"))
    trainer.load_model(model)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    system = system or trainer.config.system_prompt or ""
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            # bytes that are no UTF-8 become the replacement character
            text = input(prompt).encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(beginning)
        elif text:
            messages.append({"role": "user", "content": text})
            streamer = TextStreamer(trainer.tokenizer, skip_prompt=True, skip_special_tokens=True)
            (answer,) = trainer.respond([messages], max_length, streamer=streamer, **sampling)
            messages.append({"role": "assistant", "content": answer})


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Output folder of a run")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times")] = None,
    prompts: Annotated[str, typer.Option(help="File with one prompt a line; default: the run's held-out rows")] = "",
    count: Annotated[int, typer.Option(help="Prompts at most", min=1)] = 20,
    max_length: Annotated[int, typer.Option(help="New tokens an answer at most", min=1)] = 256,
    blind: Annotated[bool, typer.Option(help="Rate answers without knowing which is which")] = False,
    ratings: Annotated[Path | None, typer.Option(help="Where ratings are kept; default: MODEL/ratings.jsonl")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else")] = False,
) -> None:
    """Show answers of a trained model beside those it gave before training."""
    if blind and as_json:
        raise ConfigurationError(
            "--json: cannot be used with --blind, which asks on the terminal; leave one of them out"
        )
    _set_up_output()
    from arabic_qwen import comparison

    compared = comparison.compare(model, prompt or [], prompts, count, max_length)
    if blind:
        wins = comparison.rate(compared, ratings or Path(model, "ratings.jsonl"))
        print(f"\ntrained {wins['trained']} · before {wins['reference']} · ties {wins['tie']}")
    elif as_json:
        print(json.dumps(compared, ensure_ascii=False, indent=2))
    else:
        for row in compared:
            print(f"\nprompt   {row['prompt']}")
            print(f"before   {row['reference_model_response']}")
            print(f"trained  {row['trained_model_response']}")


def _set_up_output() -> None:
    """Our own messages as plain lines on stderr; libraries' only from warnings on, and their bars only on a terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("arabic_qwen", "BaseTrainer", "SFTTrainer", "DPOTrainer"):
        logging.getLogger(name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def main() -> None:
    """Run the command; errors meant for users are one message and an exit code: 2 for configuration and data, else 1."""
    try:
        app()
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ConfigurationError, DatasetError)) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
