"""Renders chat templates. They are programs of strangers: they run in a sandbox, within limits of memory and time.

Jinja's sandbox keeps a template from Python's internals. Here it may also use only what prompt formats need, and each
value that it makes is counted before or right after it is made, so that none grows far beyond the limit.
"""

from __future__ import annotations

import datetime
import functools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_indent, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from arabic_qwen.errors import HostileTemplateError

LONGEST_TEMPLATE = 2**18  # characters
#: Characters that one rendering may make, intermediate values too, beside a multiple of what it is given.
LIMIT = 2**24
_PER_GIVEN = 32
_OBJECT = 32  # what a value counts beside its characters
_LONGEST_NUMBER = 4096  # bits
#: Seconds of processor time that one rendering may take.
SECONDS = 3.0

_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items"),
    *("last", "length", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select"),
    *("selectattr", "string", "title", "trim", "truncate", "upper"),
)

_STR_METHODS = {
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
    *("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "title", "upper"),
}
_METHODS: dict[type, set[str]] = {
    str: _STR_METHODS,
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
    tuple: {"count", "index"},
    bytes: set(),
    int: set(),
    float: set(),
}


def render(template: str, **variables: Any) -> str:
    """The text that a chat template makes of `messages` and other variables, as `tokenizer.apply_chat_template` does.

    Raises:
        HostileTemplateError: it exceeds the limits, or does what a sandbox forbids.
        Exception: anything else that a program may fail with.
    """
    given = (text for message in variables["messages"] for text in message.values() if isinstance(text, str))
    _spent.begin(sum(map(len, given)))
    try:
        return _compiled(template).render(variables)
    except (SecurityError, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise HostileTemplateError(
            f"the chat template does what no prompt format needs ({reason}); use another one, such as chatml"
        ) from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    if len(template) > LONGEST_TEMPLATE:
        raise SecurityError(f"it is longer than {LONGEST_TEMPLATE:,} characters")
    return _Sandbox().from_string(template)


class _Spent(threading.local):
    """What the rendering that runs in this thread has used."""

    def begin(self, given: int) -> None:
        self.left = LIMIT + _PER_GIVEN * given
        self.deadline = time.thread_time() + SECONDS
        self.steps = 0

    def add(self, size: int) -> None:
        self.left -= size + _OBJECT
        if self.left < 0:
            raise SecurityError(f"it makes more than {LIMIT:,} characters and {_PER_GIVEN} times the messages'")
        self.steps += 1
        if not self.steps & 63 and time.thread_time() > self.deadline:
            raise SecurityError(f"it runs for more than {SECONDS:g} seconds")


_spent = _Spent()


def _count(value: Any) -> Any:
    """The value, after everything in it has been counted, as often as it is reached; iterators count as they go."""
    if isinstance(value, str):
        _spent.add(len(value))
    elif isinstance(value, (list, tuple, set)):
        _spent.add(0)
        for item in value:
            _count(item)
    elif isinstance(value, dict):
        _spent.add(0)
        for key, item in value.items():
            _count(key)
            _count(item)
    elif isinstance(value, Iterator):
        return map(_count, value)
    else:
        _check_digits(value)
        _spent.add(0)
    return value


def _check_digits(value: Any, power: int = 1) -> None:
    if isinstance(value, int) and value.bit_length() * power > _LONGEST_NUMBER:
        raise SecurityError(f"it computes with numbers of more than {_LONGEST_NUMBER} bits")


@pass_context  # which also keeps the compiler from computing values in advance
def _counted(context: Any, value: Any) -> Any:
    return _count(value)


@pass_context
def _iterated(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spent.add(0)
        yield value


def _list(values: Iterable[Any]) -> list[Any]:
    return [_count(value) for value in values]


def _count_pieces(text: str, separator: str | None = None, *_: Any, **__: Any) -> None:
    """Count what str.split makes, before it does."""
    _spent.add(_OBJECT * (text.count(separator) if separator else len(text) // 2))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _spent.add(text.count(old) * max(0, len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)


@pass_environment
def _join(environment: Any, values: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    texts = [str(_count(value)) for value in values]
    _spent.add(len(str(separator)) * len(texts))
    return str(separator).join(texts)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _spent.add((text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return do_indent(text, width, first, blank)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise SecurityError("tojson: indents by more than 16")
    return json.dumps(_count(value), ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """Without names that begin with an underscore, and shown without what is in it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # like jinja's: `self` may be a name in it
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which some templates mark answers."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Metering(NodeTransformer):
    """Has every value counted that a template makes, writes, or goes through."""

    def _made(self, node: Any) -> Any:
        return _filtered(self.generic_visit(node), "_counted")

    visit_Concat = visit_Filter = visit_List = visit_Dict = _made

    def visit_Tuple(self, node: nodes.Tuple) -> Any:
        return self._made(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        return self._made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_iterated")
        return node

    def visit_Output(self, node: nodes.Output) -> Any:
        self.generic_visit(node)
        node.nodes = [_filtered(part, "_counted") for part in node.nodes]
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Const:
        _check_digits(node.value)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)


def _filtered(node: Any, name: str) -> nodes.Filter:
    if isinstance(node, nodes.Filter) and node.name == name:
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # Unoptimised: what is computed at compile time is not counted.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        self.filters = {name: FILTERS[name] for name in _FILTERS}
        self.filters |= {"join": _join, "replace": _replace, "indent": _indent, "list": _list, "tojson": _tojson}
        self.filters |= {"_counted": _counted, "_iterated": _iterated}
        self.globals = {"range": self.globals["range"], "dict": _dict, "namespace": _Namespace}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metering().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> None:
        """str.format is none of the methods that may be used."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return attr in allowed if allowed is not None else super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_digits(left)
        _check_digits(right)
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(times, int):
                    _spent.add(len(one) * max(times, 0))
        elif operator == "**" and isinstance(right, int):
            _check_digits(left, right)
        elif operator == "%" and isinstance(left, (str, bytes)):
            raise SecurityError("it formats text with %")
        return _count(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count(args)
        _count(kwargs)
        text: Any = getattr(__obj, "__self__", None)
        method = __obj.__name__ if isinstance(text, str) else ""
        if method == "replace":
            return _count(_replace(text, *args, **kwargs))
        if method == "join":
            return _count(_join(__self, args[0], text))
        if method in ("split", "rsplit", "splitlines"):
            _count_pieces(text, *args if method != "splitlines" else ())
        return _count(super().call(__context, __obj, *args, **kwargs))
