"""Which data sets a run reads: one path or hub id, or a list of them with weights and columns of their own."""

from __future__ import annotations

import os
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class DataSource(BaseModel):
    """One entry of `dataset_path`; what is unset comes from the run's dataset_split, dataset_config and column_map."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    split: str | None = None
    config: str | None = None
    columns: dict[str, str] | None = None


def data_sources(value: Any) -> list[DataSource]:
    """The entries of a `dataset_path`.

    Raises:
        ValueError: an entry is malformed.
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("is an empty list; name at least one data set")
    sources = []
    for number, item in enumerate(items, 1):
        entry = item if isinstance(item, dict) else {"path": item}
        if isinstance(entry.get("path"), os.PathLike):
            entry = {**entry, "path": os.fspath(entry["path"])}
        try:
            sources.append(DataSource.model_validate(entry))
        except pydantic.ValidationError as error:
            raise ValueError(_explain(error, f"entry {number}: " if isinstance(value, list) else "")) from None
    return sources


def _explain(error: pydantic.ValidationError, place: str) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{place}{key}: unknown key; an entry has {', '.join(DataSource.model_fields)}"
    if key == "path":
        return f"{place}must be a path or hub id, or a list of them and of mappings with path, weight, split, config, columns"
    message = problem["msg"]
    return f"{place}{key}: {message[0].lower()}{message[1:]}"


def _check(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("is a mapping; put it into a list")
    sources = data_sources(value)
    if not isinstance(value, list):
        return sources[0].path
    return [
        {**item, "path": source.path} if isinstance(item, dict) else source.path
        for item, source in zip(value, sources, strict=True)
    ]


#: A path or hub id, or a list of them and of mappings with the fields of :class:`DataSource`.
DataPath = Annotated[str | list[str | dict[str, Any]], BeforeValidator(_check)]


def describe(value: Any) -> str:
    """The data sets by name, for the log and the model card."""
    return ", ".join(
        source.path + (f" × {source.weight:g}" if source.weight != 1 else "") for source in data_sources(value)
    )
