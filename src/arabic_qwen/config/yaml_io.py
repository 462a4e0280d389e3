"""YAML in and out: environment variables, `key=value` overrides, numbers such as 1e-5."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.redaction import is_secret, redact

_LONGEST = 2**20  # characters of a file
_LONGEST_NUMBER = 400  # characters
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_VARIABLE = re.compile(r"\$(\$\{)|\$\{(\w+)(?::-([^}]*))?\}")  # `$${` stands for `${` itself


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would quietly keep the last, and aliases.

    A few lines of aliases of aliases stand for more values than fit into memory.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node):
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:  # 1:2:3 … is one, in time of the square
            raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value}: is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _OneLineDumper(yaml.SafeDumper):
    """One line a key: lists in brackets, line breaks and `${` in strings escaped."""


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\n\r\x85\u2028\u2029]", value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", redact(value).replace("${", "$${"), style=style)


_OneLineDumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
_OneLineDumper.add_representer(str, _represent_str)


def dump_yaml(values: dict[str, Any]) -> str:
    """`values` as YAML text, keys in order, Arabic unescaped, without secrets."""
    return yaml.dump(values, Dumper=_OneLineDumper, sort_keys=False, allow_unicode=True, width=10_000)


class ConfigFile(NamedTuple):
    """What a YAML file and overrides say, and where they say it."""

    values: dict[str, Any]
    source: str  # the file, and the overrides where there are any
    places: dict[str, str]  # key -> `file:line`, or the override

    def locate(self, problem: str) -> str:
        """`key: reason` with the place of the key before it; other reasons with the source."""
        return f"{self.places.get(problem.partition(':')[0], self.source)}: {problem}"


def read_config_file(path: str | os.PathLike, overrides: list[str]) -> ConfigFile:
    """Read a YAML mapping, apply `key=value` overrides, then fill in `${NAME:-default}`.

    Raises:
        ConfigurationError: the file is missing or malformed, an override has no `=`, or a variable is unset or a secret.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if len(text) > _LONGEST:
        raise ConfigurationError(f"{path}: has more than {_LONGEST:,} characters; give a YAML file of settings")
    values, lines = _parse(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must hold `key: value` lines, found a {type(values).__name__}")
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"{override}: overrides are written key=value, for example learning_rate=1e-4")
        places[key] = f"override {override}"
        values[key], _ = _parse(value, places[key])
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    filled = {str(key): _substitute(value, f"{places[str(key)]}: {key}") for key, value in values.items()}
    return ConfigFile(filled, source, places)


def _parse(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """The value of YAML text, and the line of each key where it is a mapping."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        return value, {str(loader.construct_object(key)): key.start_mark.line + 1 for key, _ in pairs}
    except Exception as error:  # YAML's own, or what a tag's value fails with: a date such as 2024-13-01
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error).split("\n")[0] or type(error).__name__
        remedy = "remove the tag" if "for the tag" in reason else "check indentation, quotes and colons"
        raise ConfigurationError(f"{where}: not valid YAML ({reason}); {remedy}") from None


def _substitute(value: Any, source: str) -> Any:
    if isinstance(value, list):
        return [_substitute(item, source) for item in value]
    if isinstance(value, dict):
        return {key: _substitute(item, source) for key, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value

    def lookup(match: re.Match) -> str:
        literal, name, default = match.groups()
        if literal:
            return literal
        if is_secret(name):
            raise ConfigurationError(
                f"{source}: {name} is a secret, which no setting holds; leave it out: the libraries that need it read it "
                "from the environment"
            )
        found = os.environ.get(name) or default  # like the shell, `:-` also replaces an empty value
        if found is None:
            raise ConfigurationError(
                f"{source}: environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    text = _VARIABLE.sub(lookup, value)
    # Fields read numbers and booleans from text; null and lists they do not.
    if _VARIABLE.fullmatch(value) and (text in ("", "null", "~") or text.startswith("[")):
        return _parse(text, source)[0]
    return text
