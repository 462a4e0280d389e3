"""The verbs of `arabic-qwen data`: look at data, repair it, split it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

data = typer.Typer(
    help="Look at training data before a model does: check, fix, stats, tokens, dialects, split.", no_args_is_help=True
)


@data.command(epilog="Example: arabic-qwen data layouts")
def layouts(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else")] = False,
) -> None:
    """List the columns that rows may have, for which methods, with an example row and public sets that use them."""
    from arabic_qwen.data.layouts import LAYOUTS
    from arabic_qwen.terminal import isolated

    if as_json:
        print(json.dumps([layout._asdict() for layout in LAYOUTS], ensure_ascii=False, indent=2))
        return
    for layout in LAYOUTS:
        print(f"{' + '.join(layout.columns)}  (also {', '.join(layout.optional)})")
        print(f"  methods  {', '.join(layout.methods)}")
        if layout.sets:
            print(f"  sets     {', '.join(layout.sets)}")
        print(f"  example  {isolated(json.dumps(layout.example, ensure_ascii=False), 11)}\n")
    print("Columns after `also` may be left out; others are ignored. For columns of other names set column_map.")
