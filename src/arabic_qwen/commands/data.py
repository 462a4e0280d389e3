"""The verbs of `arabic-qwen data`: look at data, repair it, split it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from arabic_qwen.methods.registry import load_plugins, methods_of

T = TypeVar("T")

_EXAMPLES_OF_PAGE = 100  # of each code

data = typer.Typer(
    help="Look at training data before a model does: check, fix, stats, tokens, dialects, split.", no_args_is_help=True
)

Files = Annotated[list[str], typer.Argument(help="Data files, folders or hub ids; sample:sft is one that comes along")]
Method = Annotated[str, typer.Option(help="Read rows as this training method does; default: as their columns say")]
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="Python file that registers a training method of yours; may be given several times"),
]
Classifier = Annotated[str, typer.Option("--model", help="Dialect classifier that `data fit-dialects` wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]


@data.command(epilog="Example: arabic-qwen data layouts")
def layouts(as_json: AsJson = False, plugin: Plugin = None) -> None:
    """List the columns that rows may have, for which methods, with an example row and public sets that use them."""
    load_plugins(plugin or [])
    from arabic_qwen.data.layouts import LAYOUTS
    from arabic_qwen.terminal import isolated

    if as_json:
        listed = [layout._asdict() | {"methods": methods_of(layout.kind)} for layout in LAYOUTS]
        print(json.dumps(listed, ensure_ascii=False, indent=2))
        return
    for layout in LAYOUTS:
        print(f"{' + '.join(layout.columns)}  (also {', '.join(layout.optional)})")
        print(f"  methods  {', '.join(methods_of(layout.kind))}")
        if layout.sets:
            print(f"  sets     {', '.join(layout.sets)}")
        print(f"  example  {isolated(json.dumps(layout.example, ensure_ascii=False), 11)}\n")
    print("Columns after `also` may be left out; others are ignored. For columns of other names set column_map.")


@data.command(epilog="Example: arabic-qwen data check train.jsonl validation.jsonl --html report.html")
def check(
    files: Files,
    method: Method = "",
    plugin: Plugin = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page for the browser, too")] = None,
    max_examples: Annotated[int, typer.Option(help="RowLocations shown of each finding", min=0)] = 2,
) -> None:
    """Find what is wrong with data; several files are splits of one set. Exit 1 where a row cannot be trained on."""
    load_plugins(plugin or [])
    from arabic_qwen.audit import report
    from arabic_qwen.audit.check import check as examine
    from arabic_qwen.audit.rows import expected_rows

    if html:
        report.check_target(html)
    shown = max(max_examples, _EXAMPLES_OF_PAGE if html else 0)
    audit = examine(
        files,
        method,
        keep=None if as_json else shown,
        watch=lambda rows: _progress(rows, "Checking", expected_rows(files)),
    )
    if html:
        report.write_html(audit, html)
    if as_json:
        print(json.dumps([finding._asdict() for finding in audit.findings], ensure_ascii=False, indent=2))
    else:
        from arabic_qwen.audit.tables import findings_table, verdict

        if audit.counts:
            _print(findings_table(audit, max_examples), soft_wrap=True)
        print(verdict(audit))
    if audit.errors:
        raise typer.Exit(1)


@data.command(epilog="Example: arabic-qwen data fix train.jsonl train.fixed.jsonl")
def fix(
    file: Annotated[str, typer.Argument(help="Data file, folder or hub id")],
    out: Annotated[Path, typer.Argument(help="New file, *.jsonl; what was changed and left out is written beside it")],
    method: Method = "",
    plugin: Plugin = None,
) -> None:
    """Repair what is safe to repair, in a new file; rows that stay unusable and exact duplicates are left out."""
    load_plugins(plugin or [])
    from arabic_qwen.audit.fix import fix as repair
    from arabic_qwen.audit.fix import summary
    from arabic_qwen.audit.rows import expected_rows

    repaired = repair(file, out, method, watch=lambda rows: _progress(rows, "Repairing", expected_rows([file])))
    print("\n".join(summary(repaired)))


@data.command(epilog="Example: arabic-qwen data stats sample:sft")
def stats(
    files: Files,
    method: Method = "",
    plugin: Plugin = None,
    html: Annotated[Path | None, typer.Option(help="Write them as a page for the browser, too")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what data consists of: lengths, scripts, dialects, diacritics, duplicates."""
    load_plugins(plugin or [])
    from arabic_qwen.audit import report
    from arabic_qwen.audit.rows import expected_rows, measure, read_texts
    from arabic_qwen.audit.tables import statistics_tables

    if html:
        report.check_target(html)
    rows = _progress(read_texts(files, method), "Reading", expected_rows(files))
    statistics = measure(rows)
    if html:
        report.write_statistics_html(statistics, files, html)
    if as_json:
        print(json.dumps(statistics.as_dict(), ensure_ascii=False, indent=2))
    else:
        _print(statistics_tables(statistics))


@data.command(epilog="Example: arabic-qwen data tokens sample:sft --tokenizer Qwen/Qwen3-8B --tokenizer my-model")
def tokens(
    files: Files,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(help="Folder or hub id; may be given several times. Default: the embedded model's"),
    ] = None,
    method: Method = "",
    plugin: Plugin = None,
    sample: Annotated[int, typer.Option(help="Rows at most: a seeded choice where there are more", min=1)] = 20_000,
    as_json: AsJson = False,
) -> None:
    """Say what the texts cost in tokens, by dialect and diacritics, and what normalising would save."""
    load_plugins(plugin or [])
    from rich.console import Console

    from arabic_qwen.audit.rows import expected_rows, read_texts, sample_rows
    from arabic_qwen.audit.tables import tokens_tables
    from arabic_qwen.audit.tokens import load_any_tokenizer, token_cost
    from arabic_qwen.models.sources import EMBEDDED_MODEL

    if not tokenizer:
        print(f"tokenizer: {EMBEDDED_MODEL}, which comes along; name yours with --tokenizer", file=sys.stderr)
    tokenizers = {name: load_any_tokenizer(name) for name in tokenizer or [EMBEDDED_MODEL]}
    rows = sample_rows(_progress(read_texts(files, method), "Reading", expected_rows(files)), sample)
    with Console(stderr=True, markup=False).status(f"Tokenising {len(rows.chosen):,} rows"):
        costs = token_cost([text for row in rows.chosen for text in (row.prompt, *row.answers)], tokenizers)
    if as_json:
        counts = {"rows": rows.rows, "bad_rows": rows.bad_rows, "sampled_rows": len(rows.chosen)}
        by_tokenizer = {name: cost.as_dict() for name, cost in costs.items()}
        print(json.dumps({**counts, "tokenizers": by_tokenizer}, ensure_ascii=False, indent=2))
    else:
        _print(tokens_tables(costs, rows))


@data.command(epilog="Example: arabic-qwen data dialects sample:sft")
def dialects(
    files: Files,
    model: Classifier = "",
    method: Method = "",
    plugin: Plugin = None,
    as_json: AsJson = False,
) -> None:
    """Say which dialects questions and answers are in, and where an answer is in another one than its question."""
    load_plugins(plugin or [])
    from arabic_qwen.audit.dialects import dialect_report
    from arabic_qwen.audit.rows import expected_rows, read_texts
    from arabic_qwen.audit.tables import dialects_tables
    from arabic_qwen.text.dialects import load_classifier

    rows = _progress(read_texts(files, method), "Reading", expected_rows(files))
    report = dialect_report(rows, load_classifier(model or None))
    if as_json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    else:
        _print(dialects_tables(report))


@data.command(
    "fit-dialects", epilog="Example: arabic-qwen data fit-dialects labelled.csv own.safetensors --label country"
)
def fit_dialects(
    file: Annotated[str, typer.Argument(help="Texts labelled MSA, EGY, LEV, GLF, MAG or IRQ")],
    out: Annotated[Path, typer.Argument(help="New file, *.safetensors, for `data dialects --model`")],
    text: Annotated[str, typer.Option(help="Column of the texts")] = "text",
    label: Annotated[str, typer.Option(help="Column of the labels")] = "dialect",
) -> None:
    """Train a dialect classifier on texts of your own; sources, if a column `source` names them, are held out whole."""
    from arabic_qwen.audit.dialects import fit_file
    from arabic_qwen.audit.tables import scores_table

    scores, held_out = fit_file(file, out, text, label, watch=partial(_progress, what="Reading", total=None))
    _print([f"on held-out {held_out}, in five folds", scores_table(scores), f"trained on all of them: {out}"])


@data.command(epilog="Example: arabic-qwen data split all.jsonl parts --share 0.05")
def split(
    file: Annotated[str, typer.Argument(help="Data file, folder or hub id")],
    folder: Annotated[Path, typer.Argument(help="Where train.jsonl and validation.jsonl are written")],
    share: Annotated[float, typer.Option(help="Share of the rows for validation", min=0, max=1)] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice")] = 42,
    method: Method = "",
    plugin: Plugin = None,
    model: Classifier = "",
) -> None:
    """Split data in two with the same share of each dialect; rows with the same question stay together."""
    load_plugins(plugin or [])
    from arabic_qwen.audit.rows import expected_rows
    from arabic_qwen.audit.split import split as divide
    from arabic_qwen.audit.tables import split_tables
    from arabic_qwen.text.dialects import load_classifier

    watch = partial(_progress, what="Reading", total=expected_rows([file]))
    _print(split_tables(divide(file, folder, load_classifier(model or None), share, seed, method, watch=watch)))


def _progress(items: Iterable[T], what: str, total: float | None) -> Iterator[T]:
    """The items, with a progress bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, total, console=console, transient=True, disable=not sys.stderr.isatty())


def _print(tables: Iterable[object], soft_wrap: bool = False) -> None:
    from rich.console import Console

    # markup: names of files and tokenizers may have brackets
    console = Console(highlight=False, markup=False, soft_wrap=soft_wrap)
    for table in tables:
        console.print(table)
