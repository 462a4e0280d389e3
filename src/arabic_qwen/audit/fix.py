"""`arabic-qwen data fix`: what is safe to repair, in a new file, with a line for each change."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from arabic_qwen.audit.check import place_of
from arabic_qwen.audit.duplicates import exact_key
from arabic_qwen.audit.findings import CODES
from arabic_qwen.audit.rows import check_method, read_row
from arabic_qwen.audit.text_checks import (
    HTML,
    TEMPLATE_HEADING,
    TEMPLATE_TOKENS,
    WHOLE_TEMPLATE,
    about_encoding,
    html_finding,
)
from arabic_qwen.config import SFTConfig
from arabic_qwen.data.bad_rows import BadRow, RowError
from arabic_qwen.data.conversations import Conversation
from arabic_qwen.data.layouts import COLUMNS, canonical, role_of
from arabic_qwen.data.readers import Row
from arabic_qwen.data.sources import read_rows
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.files import writing
from arabic_qwen.text.encoding import repair_mojibake
from arabic_qwen.text.normalization import normalize
from arabic_qwen.text.rules import OFF, TRAIN
from arabic_qwen.text.spans import PLACEHOLDER, hide_spans, restore_spans

_ANSWERS = {"response", "output", "completion", "targets", "chosen", "rejected", "hard_negatives"}
# What some programs take for the end of a line.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
_ROUNDS = 10  # what one repair leaves may need another: <|im_<|im_end|>end|>


@dataclass
class Repair:
    """What :func:`fix` did."""

    rows: int = 0  # that were read
    written: int = 0
    changes: Counter[str] = field(default_factory=Counter)  # code → changes
    dropped: Counter[str] = field(default_factory=Counter)  # code → rows left out
    files: list[Path] = field(default_factory=list)  # that were written


def fix(
    file: str,
    out: Path,
    method: str = "",
    *,
    watch: Callable[[Iterable[Row | BadRow]], Iterable[Row | BadRow]] = iter,
) -> Repair:
    """Write the rows of `file` to `out`, repaired, in their own columns, as JSON Lines.

    Beside it, `NAME.changes.jsonl` has a line per change (file, line, code, column, before, after) and
    `NAME.dropped.jsonl` the rows that were left out: exact duplicates, and what stays unusable (file, line, code, reason,
    row). `watch` wraps the rows as they are read, for a progress bar.

    Raises:
        ConfigurationError: no such method, or one of the three files exists already or cannot be written.
        DatasetError: the file cannot be read, or no row of it can be used.
    """
    check_method(method)
    if out.suffix != ".jsonl":
        raise ConfigurationError(f"{out}: rows are written as JSON Lines; give a name that ends in .jsonl")
    targets = [out, out.with_suffix(".changes.jsonl"), out.with_suffix(".dropped.jsonl")]
    for target in targets:
        if os.path.lexists(target):
            raise ConfigurationError(f"{target}: exists already, and nothing is overwritten; give another name")
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"{out}: there is no folder {out.parent}; make it first")
    repair = Repair()
    with contextlib.ExitStack() as stack:
        rows, changes, dropped = (AtomicFile(target, stack) for target in targets)
        fixer = _Fixer(method)
        for row in watch(read_rows(SFTConfig(), file)):
            repair.rows += 1
            values = row.row if isinstance(row, BadRow) else row.values
            place = dict(zip(("file", "line"), place_of(row.where), strict=True))
            try:
                if isinstance(row, BadRow):
                    raise RowError(row.reason)
                fixed, made = fixer.fix(row.values)
            except RowError as error:
                repair.dropped[error.code] += 1
                dropped.write({**place, "code": error.code, "reason": str(error), "row": values})
                continue
            repair.written += 1
            rows.write(fixed)
            for code, column, before, after in made:
                repair.changes[code] += 1
                changes.write({**place, "code": code, "column": column, "before": before, "after": after})
        if not repair.written:
            raise DatasetError(f"{file}: no row of it can be used, so nothing was written")
        repair.files = [target.keep() for target in (dropped, changes, rows) if target.lines]
    return repair


class AtomicFile:
    """JSON Lines that appear under their name once they are complete, and never in place of another file."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.lines = 0
        try:
            self._file: TextIO = self._temporary.open("x", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigurationError(f"{path}: cannot be written ({error.strerror})") from None
        stack.callback(self._temporary.unlink, missing_ok=True)
        stack.callback(self._close)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk leaves unwritten; the file is removed
            self._file.close()

    def write(self, value: Any) -> None:
        # JSON's own escapes for halves of surrogate pairs, which UTF-8 lacks
        text = json.dumps(value, ensure_ascii=False, default=str).translate(_LINE_ENDS) + "\n"
        with writing(self._path):
            self._file.write(text)
        self.lines += 1

    def keep(self) -> Path:
        with writing(self._path):
            self._file.close()
        try:
            os.link(self._temporary, self._path)  # fails where the name exists by now
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(self._path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._path)) from None
            self._temporary.replace(self._path)
        return self._path


Change = tuple[str, str, Any, Any]  # code, column, before, after


class _Fixer:
    """Repairs rows one by one, and remembers those that it has seen."""

    def __init__(self, method: str):
        self._method = method
        self._seen: set[int] = set()

    def fix(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[Change]]:
        """The repaired row and what was changed. Raises RowError where the row is to be left out."""
        values, codes = canonical(given)
        values = values if codes else given  # a list of one answer is fine
        changes: list[Change] = [
            (codes[0], column, given[column], values[column])
            for column in values
            if values[column] is not given[column]
        ]
        values, made = _repair_texts(values)
        changes += made
        row = self._read(values)
        if html_finding(_texts(row)):
            values, made = _repair_texts(values, html=True)
            changes += made
            row = self._read(values)
        key = exact_key(canonical(values)[0])
        if key in self._seen:
            raise RowError("is the same as an earlier row", "duplicate")
        self._seen.add(key)
        return values, changes

    def _read(self, values: dict[str, Any]) -> Conversation:
        return read_row(values, self._method)


def _texts(row: Conversation) -> list[str]:
    return [*(message["content"] for message in row.messages), *row.answers[1:]]


def _repair_texts(values: dict[str, Any], html: bool = False) -> tuple[dict[str, Any], list[Change]]:
    """The row with its texts repaired; `html`: HTML too."""
    changes: list[Change] = []
    texts: list[tuple[bool, str]] = []  # whether it is an answer, and the text
    _walk(values, lambda text, _, answer: texts.append((answer, text)))
    meant = about_encoding([text for answer, text in texts if not answer], [text for answer, text in texts if answer])

    def repair(text: str, column: str, answer: bool) -> str:
        left_out = {code for code, out in (("html", not html), ("mojibake", meant and not answer)) if out}
        for code, before, after in _repairs(text, left_out):
            changes.append((code, column, before, after))
            text = after
        return text

    return _walk(values, repair), changes


def _walk(values: dict[str, Any], visit: Callable[[str, str, bool], Any]) -> dict[str, Any]:
    """The row with visit(text, column, whether it is an answer) instead of each text."""

    def walk(value: Any, column: str, answer: bool) -> Any:
        if isinstance(value, str):
            return visit(value, column, answer)
        if isinstance(value, list):
            return [walk(item, f"{column}[{position}]", answer) for position, item in enumerate(value)]
        if isinstance(value, dict):
            answer = role_of(str(value.get("from", value.get("role"))))[0] == "assistant"
            return {
                key: walk(item, f"{column}.{key}", answer) if key in ("content", "value") else item
                for key, item in value.items()
            }
        return value

    return {name: walk(value, name, name in _ANSWERS) if name in COLUMNS else value for name, value in values.items()}


def _repairs(text: str, left_out: set[str]) -> Iterator[tuple[str, str, str]]:
    """(code, before, after) of each repair of a text."""
    for _ in range(_ROUNDS):
        start = text
        for code, function in _STEPS:
            if code not in left_out and (after := function(text)) != text:
                yield code, text, after
                text = after
        if text == start:
            return


def _outside_code(function: Callable[[str], str], text: str) -> str:
    prose, spans = hide_spans(text)
    changed = function(prose)
    return restore_spans(changed, spans) if changed.count(PLACEHOLDER) == len(spans) else text


def _remove_tokens(text: str) -> str:
    shorter = TEMPLATE_TOKENS.sub("", text)
    if not WHOLE_TEMPLATE.search(shorter):
        shorter = TEMPLATE_HEADING.sub("", shorter)
    return text if shorter == text else shorter.strip()


_ENTITIES = {"nbsp": " ", "rlm": "", "lrm": "", "zwnj": "", "zwj": ""}
_PROGRAM = re.compile(r"</?(?:script|style)\b")
_LINK = re.compile(r"<a\s[^<>]*?href\s*=\s*[\"']([^\"'<>]*)[\"'][^<>]*>(.*?)</a>", re.DOTALL)
_MARKDOWN = {"br": "\n", "hr": "\n---\n", "li": "\n- ", "/p": "\n\n", "/div": "\n", "/tr": "\n", "/td": " ", "/th": " "}
_MARKDOWN |= dict.fromkeys(("b", "/b", "strong", "/strong"), "**") | dict.fromkeys(("i", "/i", "em", "/em"), "*")
_MARKDOWN |= {f"h{level}": "\n" + "#" * level + " " for level in range(1, 7)} | {
    f"/h{level}": "\n" for level in range(1, 7)
}
_NAME = re.compile(r"/?\w+")
_ENTITY = re.compile(r"&#?\w+;")


def _html_to_markdown(text: str) -> str:
    """Programs and style sheets are left as they are, and what is escaped because it would be HTML or a control token."""

    def convert(match: re.Match[str]) -> str:
        if match[0].startswith("&"):
            return match[0]
        name = _NAME.search(match[0])
        return _MARKDOWN.get(name[0], "") if name else ""

    def link(match: re.Match[str]) -> str:
        return match[0] if PLACEHOLDER in match[2] else f"[{match[2]}]({match[1]})"  # code would change its place

    if not HTML.search(text) or _PROGRAM.search(text):
        return text
    escaped = re.sub(r"\n{3,}", "\n\n", HTML.sub(convert, _LINK.sub(link, text)))
    plain = _ENTITY.sub(lambda match: _unescape(match[0]), escaped)
    if HTML.search(plain) or TEMPLATE_TOKENS.search(plain):
        plain = _ENTITY.sub(lambda match: match[0] if _unescape(match[0]) in "<>&" else _unescape(match[0]), escaped)
    return plain.strip()


def _unescape(entity: str) -> str:
    from html import unescape

    return _ENTITIES.get(entity[1:-1].lower(), unescape(entity).replace("\xa0", " "))


_CODE_OF_RULE = {"invisible": "bidi_controls"}
_STEPS: list[tuple[str, Callable[[str], str]]] = [
    ("mojibake", repair_mojibake),
    ("template_tokens", partial(_outside_code, _remove_tokens)),
    ("html", partial(_outside_code, _html_to_markdown)),
    *(
        (_CODE_OF_RULE.get(rule.name, rule.name), partial(normalize, **{**OFF, rule.name: rule.default}))
        for rule in TRAIN
        if rule.settings[rule.default] is not None
    ),
]


def summary(repair: Repair) -> list[str]:
    """Lines for the terminal."""
    lines = [f"{number:>9,}  {_title(code)}" for code, number in repair.changes.most_common()]
    lines += [f"{number:>9,}  left out: {_title(code)}" for code, number in repair.dropped.most_common()]
    lines.append(f"{repair.written:,} of {repair.rows:,} rows written")
    return lines + [str(path) for path in reversed(repair.files)]


def _title(code: str) -> str:
    return CODES[code].title if code in CODES else f"normalised: {code}"
