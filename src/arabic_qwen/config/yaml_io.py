"""YAML in and out: environment variables, `key=value` overrides, numbers such as 1e-5."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from arabic_qwen.errors import ConfigurationError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _OneLineDumper(yaml.SafeDumper):
    """One line a key: lists in brackets, line breaks in strings escaped."""


_OneLineDumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
_OneLineDumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None),
)


def dump_yaml(values: dict[str, Any]) -> str:
    """`values` as YAML text, keys in order, Arabic unescaped."""
    return yaml.dump(values, Dumper=_OneLineDumper, sort_keys=False, allow_unicode=True, width=10_000)


def read_config_file(path: str | os.PathLike, overrides: list[str]) -> dict[str, Any]:
    """Read a YAML mapping, apply `key=value` overrides, then fill in `${NAME:-default}`.

    Raises:
        ConfigurationError: the file is missing or malformed, an override has no `=`, or a variable is unset.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    values = _parse(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must hold `key: value` lines, found a {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"{override}: overrides are written key=value, for example learning_rate=1e-4")
        values[key] = _parse(value, override)
    return {str(key): _substitute(value, f"{path}: {key}") for key, value in values.items()}


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigurationError(f"{where}: not valid YAML ({reason}); check indentation, quotes and colons") from None


def _substitute(value: Any, source: str) -> Any:
    if isinstance(value, list):
        return [_substitute(item, source) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def lookup(match: re.Match) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default  # like the shell, `:-` also replaces an empty value
        if found is None:
            raise ConfigurationError(
                f"{source}: environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    return _parse(_VARIABLE.sub(lookup, value), source)
