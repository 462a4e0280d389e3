"""The verbs of `arabic-qwen data`: look at data, repair it, split it."""

from __future__ import annotations

import typer

data = typer.Typer(
    help="Look at training data before a model does: check, fix, stats, tokens, dialects, split.", no_args_is_help=True
)
