"""Finds the data that `dataset_path` names: files, folders, saved data sets, the hub."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from arabic_qwen.config import BaseConfig
from arabic_qwen.config.data import DataSource, data_sources
from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.data.layouts import are_messages
from arabic_qwen.data.readers import FORMATS, Row, Rows, is_data_file, is_table, read_file, unreadable
from arabic_qwen.errors import DatasetError, one_line

#: `dataset_path: sample:sft` and so on: small sets that come with the package.
SAMPLES = ("sft", "dpo", "kto")

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")  # of `datasets.save_to_disk`
_PROBE_SECONDS = 5  # the hub must answer within

# CSV cells are text; in these columns JSON stands for what it says.
_LISTS = ("messages", "conversations", "history", "hard_negatives")
_TEXTS_OR_MESSAGES = ("prompt", "completion", "chosen", "rejected")
_SCALARS = ("label", "chosen_length", "rejected_length")


def read_rows(config: BaseConfig, dataset_path: Any, *, stream: bool = False) -> Rows:
    """The rows of `dataset_path` (or of another value of its kind) in order, at most `max_samples`, columns mapped.

    Args:
        config: dataset_split, dataset_config, column_map, max_samples and the seed of their choice.
        dataset_path: as the setting.
        stream: take one row of each source in turn, and do not download hub sets first.

    Raises:
        DatasetError: a source does not exist or cannot be read, or holds no rows.
    """
    sources = [_resolve(config, source) for source in data_sources(dataset_path)]
    parts = [_read_source(number, source, stream) for number, source in enumerate(sources)]
    rows = _in_turn(parts) if stream else itertools.chain.from_iterable(parts)
    return rows if config.max_samples is None else _choose(rows, config.max_samples, data_seed(config))


def data_seed(config: BaseConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def identity(config: BaseConfig, dataset_path: Any) -> list[str]:
    """What tells data cheaply: name and bytes of each file here; name, configuration and split of a hub set.

    Raises:
        DatasetError: a file does not exist.
    """
    return [part for source in data_sources(dataset_path) for part in _identity(_resolve(config, source))]


def _identity(source: DataSource) -> list[str]:
    name = source.path
    path = _sample(name) if name.startswith("sample:") else Path(name).expanduser()
    if path.is_dir():
        files = _files(path)
    elif path.exists() or is_data_file(name):
        files = [path]
    else:
        return [f"{name}, {source.config}, {source.split}"]
    try:
        return [f"{file.name} of {file.stat().st_size:,} bytes" for file in files]
    except OSError as error:
        raise unreadable(path, error) from None


def _resolve(config: BaseConfig, source: DataSource) -> DataSource:
    unset = {
        "split": config.dataset_split,
        "config": config.dataset_config,
        "columns": config.column_map,
    }
    return source.model_copy(update={k: v for k, v in unset.items() if getattr(source, k) is None})


def _in_turn(parts: list[Rows]) -> Rows:
    while parts:
        for part in list(parts):
            try:
                yield next(part)
            except StopIteration:
                parts.remove(part)


def _choose(rows: Iterable[Row | BadRow], number: int, seed: int) -> Rows:
    """A seeded choice of `number` rows, in their order (reservoir sampling)."""
    generator = random.Random(seed)
    kept: list[tuple[int, Row | BadRow]] = []
    for position, row in enumerate(rows):
        if position < number:
            kept.append((position, row))
        elif (place := generator.randrange(position + 1)) < number:
            kept[place] = (position, row)
    return iter([row for _, row in sorted(kept, key=lambda item: item[0])])


def _read_source(number: int, source: DataSource, stream: bool) -> Rows:
    empty = True
    for place, rows in _find(source, stream):
        for row in rows:
            empty = False
            if isinstance(row, Row) and source.columns:
                row = _map_columns(row, source.columns)
            if isinstance(row, Row):
                values = _parse_cells(row.values) if is_table(place) else row.values
                row = Row(row.where, values, number)
            yield row
    if empty:
        raise DatasetError(f"{source.path}: holds no rows")


def _map_columns(row: Row, columns: dict[str, str]) -> Row | BadRow:
    missing = [theirs for theirs in columns.values() if theirs not in row.values]
    if missing:
        there = ", ".join(row.values) or "(none)"
        return BadRow(row.where, f"column_map: has no {', '.join(missing)}; its columns are {there}", row.values)
    return Row(row.where, {ours: row.values[theirs] for ours, theirs in columns.items()})


def _parse_cells(values: dict[str, Any]) -> dict[str, Any]:
    """Table cells are text; lists, labels and lengths in them are written as JSON."""
    parsed = dict(values)
    for name in parsed.keys() & {*_LISTS, *_TEXTS_OR_MESSAGES, *_SCALARS}:
        text = parsed[name].strip()
        try:
            value = json.loads(text.lower() if name in _SCALARS else text) if text else None
        except ValueError:
            continue
        several = name == "rejected" and isinstance(value, list) and all(isinstance(item, str) for item in value)
        if name in _TEXTS_OR_MESSAGES and not (are_messages(value) or several):
            continue  # text that happens to be JSON
        parsed[name] = value
    return parsed


def _find(source: DataSource, stream: bool) -> Iterator[tuple[str, Rows]]:
    """(name, rows) of each file of the source: what exists here first, then by what the name looks like."""
    name = source.path
    if name.startswith("sample:"):
        yield name, read_file(_sample(name))
        return
    path = Path(name).expanduser()
    if path.is_dir():
        yield from _read_folder(path, source)
    elif path.exists() or is_data_file(name):
        yield name, read_file(path)
    elif _HUB_ID.fullmatch(name):
        yield name, _numbered(name, _load_from_hub(source, stream))
    else:
        raise DatasetError(
            f"{name}: does not exist; give a file named {FORMATS}, a folder of these, or a hub id org/name"
        )


def _sample(name: str) -> Path:
    sample = name.removeprefix("sample:")
    if sample not in SAMPLES:
        raise DatasetError(f"{name}: no such sample; choose one of {', '.join('sample:' + s for s in SAMPLES)}")
    return Path(str(files("arabic_qwen") / "assets" / f"{sample}.jsonl"))


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in _SAVED)


def _files(folder: Path) -> list[Path]:
    """What is read of a folder: an output folder may lie in it."""
    if _is_saved(folder):
        return sorted(path for path in folder.rglob("*") if path.suffix == ".arrow" or path.name in _SAVED)
    return sorted(path for path in folder.iterdir() if is_data_file(path.name))


def _read_folder(folder: Path, source: DataSource) -> Iterator[tuple[str, Rows]]:
    """A folder written by `datasets.save_to_disk`, or the data files in a folder, by name."""
    if not _is_saved(folder):
        found = _files(folder)
        _check_inside(folder, found)
        if not found:
            raise DatasetError(f"{folder}: holds no data files; they are named {FORMATS}")
        yield from ((path.name, read_file(path)) for path in found)
        return
    import datasets  # takes seconds, which those who read plain files need not wait

    _check_inside(folder, folder.rglob("*"))
    try:
        _check_saved(folder)
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever is wrong inside
        raise DatasetError(f"{folder}: cannot be read as a saved data set ({one_line(error)})") from None
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise DatasetError(
                f"{folder}: has no split {source.split!r}, only {', '.join(table)}; in training set dataset_split"
            )
        table = table[source.split]
    try:
        table.data.validate(full=True)  # Arrow trusts the offsets in a file
    except ValueError as error:
        raise DatasetError(f"{folder}: cannot be read as a saved data set ({one_line(error)})") from None
    yield str(folder), _numbered(str(folder), table)


def _check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Raise DatasetError where a link leads out of the folder; one of the hub's cache links to what it downloaded."""
    root = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()
    for path in sorted(paths):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise DatasetError(f"{path}: is a link that leads out of {folder}; name what it leads to")


def _check_saved(folder: Path) -> None:
    """Raise ValueError where a saved data set names files or splits outside its folder."""
    for file in sorted(folder.rglob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        names = found.get("splits", []) if file.name == "dataset_dict.json" else []
        if file.name == "state.json":
            names = [entry["filename"] for entry in found["_data_files"]]
        for name in names:
            if Path(name).name != name or name == "..":
                raise ValueError(f"{file.name} names {name!r}, which is not in its folder")


def _load_from_hub(source: DataSource, stream: bool) -> Iterable[dict[str, Any]]:
    import datasets

    name = source.path
    try:
        if not is_offline_mode():  # `datasets` would try for half a minute
            HfApi().dataset_info(name, timeout=_PROBE_SECONDS)
        return datasets.load_dataset(name, source.config, split=source.split, streaming=stream)
    except GatedRepoError:
        reason = "is gated; accept its terms on the hub, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a file or folder here nor a public set on the hub; check the name, or log in with `hf auth login`"
    except ValueError as error:  # an unknown split or configuration; the message lists those that there are
        reason = f"{one_line(error)}; in training set dataset_split and dataset_config"
    except Exception as error:
        reason = (
            f"does not exist here, and the hub cannot be reached ({one_line(error)}); check the path or the network"
        )
        if not is_offline_mode():
            reason += ", or set HF_HUB_OFFLINE=1 to use an earlier download"
    raise DatasetError(f"{name}: {reason}")


def _numbered(name: str, rows: Iterable[Any]) -> Rows:
    try:
        for number, values in enumerate(rows, 1):
            yield Row(f"{name}:row {number}", dict(values))
    except Exception as error:  # a damaged file, or a lost connection
        raise DatasetError(f"{name}: cannot be read to its end ({one_line(error)})") from None
