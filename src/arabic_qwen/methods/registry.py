"""The training methods: those of this package, and others by plugin file or entry point.

The command imports this for its help, so it imports little.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arabic_qwen.errors import ConfigurationError

if TYPE_CHECKING:
    from arabic_qwen.config.base import BaseConfig
    from arabic_qwen.data.auxiliary import Auxiliary
    from arabic_qwen.data.conversations import Conversation
    from arabic_qwen.data.layouts import RowKind
    from arabic_qwen.data.loaders import DataLoader
    from arabic_qwen.methods.objective import Objective

#: The methods that come along.
BUILT_IN = ("sft", "dpo", "ipo", "kto", "cpo", "simpo", "orpo")

#: Packages bring methods by entry points of this group: the method's name = "module:METHOD".
ENTRY_POINTS = "arabic_qwen.methods"

#: (a row's values, the configuration) -> what is learned of it; raises RowError where the row cannot be used.
Reader = Callable[[dict[str, Any], Any], "Sequence[Conversation]"]


def one_conversation(read: Callable[[dict[str, Any], str | None], Conversation]) -> Reader:
    """A reader of rows that are one conversation each, from (values, system prompt) -> conversation."""
    return lambda values, config: [read(values, config.system_prompt)]


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method. What is registered here is all that the rest of the program knows of it.

    Attributes:
        config: its settings; `config.method` is its name, its docstring what the documentation says of it.
        rows: the kinds of rows that it learns from (:data:`~arabic_qwen.data.layouts.LAYOUTS`), the usual one first.
        objective: (config) -> :class:`~arabic_qwen.methods.objective.Objective`; or "module:name" of that function, for a
            module that is not to be imported before training.
        read: how it reads a row; None: as rows of the first kind are read.
        auxiliary: gives groups their auxiliary completions, for an objective that needs some; or "module:name" of it.
    """

    config: type[BaseConfig]
    rows: tuple[RowKind, ...]
    objective: Callable[[Any], Objective] | str
    read: Reader | None = None
    auxiliary: Auxiliary | str | None = None

    @property
    def name(self) -> str:
        return self.config.method

    @functools.cached_property
    def reader(self) -> Reader:
        from arabic_qwen.data.conversations import read_conversation
        from arabic_qwen.data.preferences import to_feedback, to_pair

        usual = {"conversation": read_conversation, "pair": to_pair, "feedback": to_feedback}
        return self.read or one_conversation(usual[self.rows[0]])

    def make_objective(self, config: Any) -> Objective:
        return _resolved(self.objective)(config)

    def data_loader(self, config: Any, tokenizer: Any) -> DataLoader:
        """The method's data loader, of a class of its name: `DPODataLoader`."""
        from arabic_qwen.data.loaders import DataLoader  # imports transformers

        name = self.config.__name__.removesuffix("Config") + "DataLoader"
        return type(name, (DataLoader,), {})(config, tokenizer, self.reader, _resolved(self.auxiliary))


def _resolved(given: Any) -> Any:
    """What "module:name" stands for; anything else as it is."""
    return pkgutil.resolve_name(given) if isinstance(given, str) else given


class _Methods(Mapping[str, Method]):
    """Built-in methods are imported when they are asked for, those of installed packages when a name is not built in."""

    def __init__(self) -> None:
        self._registered: dict[str, Method] = {}

    def register(self, method: Method) -> Method:
        name = method.name
        if name in BUILT_IN and not method.config.__module__.startswith("arabic_qwen.methods."):
            raise ConfigurationError(f"method {name!r} is one of this package; give yours another name")
        self._registered[name] = method
        return method

    def __getitem__(self, name: str) -> Method:
        if name not in self._registered:
            if name in BUILT_IN:
                self.register(importlib.import_module(f"arabic_qwen.methods.{name}").METHOD)
            elif name in (found := _entry_points()):
                self.register(_load_entry_point(found[name]))
        return self._registered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*BUILT_IN, *_entry_points(), *self._registered]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in self._registered or name in _entry_points()


#: The methods, by name.
METHODS = _Methods()


def register(method: Method) -> Method:
    """Make a method known to every verb, setting and document; a second one of the same name replaces it.

    Raises:
        ConfigurationError: it has the name of a built-in method.
    """
    return METHODS.register(method)


def known_method(name: str, place: str = "method") -> Method:
    """The method of this name.

    Raises:
        ConfigurationError: there is none, or its package cannot be loaded.
    """
    if name not in METHODS:
        raise ConfigurationError(
            f"{place}: {name!r} is unknown; choose one of {', '.join(METHODS)}, or name the file of yours with --plugin"
        )
    return METHODS[name]


def methods_of(rows: RowKind) -> list[str]:
    """Names of the methods that learn from rows of this kind."""
    return [name for name, method in METHODS.items() if rows in method.rows]


def load_plugins(files: Iterable[str | Path]) -> None:
    """Run Python files that :func:`register` methods.

    Raises:
        ConfigurationError: a file does not exist, fails, or registers nothing.
    """
    for file in files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"--plugin: {file} does not exist; give a Python file that registers a method")
        before = dict(METHODS._registered)
        name = f"arabic_qwen_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigurationError(f"--plugin: {file} is no Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pydantic looks types up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigurationError(f"--plugin: {file}: {_reason(error, path)}; correct the file") from error
        if METHODS._registered == before:
            raise ConfigurationError(
                f"--plugin: {file} registers no method; call arabic_qwen.methods.registry.register(Method(…)) in it"
            )


def _reason(error: Exception, path: Path) -> str:
    """The error and, where it is known, the line of the file."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    place = f"line {line}: " if line else ""
    return f"{place}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_entry_point(point: importlib.metadata.EntryPoint) -> Method:
    package = point.dist.name if point.dist else point.value
    try:
        method = point.load()
    except Exception as error:
        raise ConfigurationError(
            f"method: {point.name!r} of the package {package} cannot be loaded ({type(error).__name__}: {error}); "
            "install it again, or remove it"
        ) from error
    if not isinstance(method, Method) or method.name != point.name:
        raise ConfigurationError(
            f"method: the entry point {point.name} of the package {package} must name a Method whose "
            f"configuration has method = {point.name!r}"
        )
    return method
