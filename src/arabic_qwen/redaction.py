"""Keeps secrets out of what is written and shown: those of the environment, and tokens and passwords by their form."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, TextIO

_NAME = re.compile(r"(TOKEN|KEY|KEY_ID|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value may be an ordinary word

# Hugging Face, W&B and AWS tokens; the part of a URL before its @.
_FORM = re.compile(r"""\bhf_\w{16,}|\bwandb_v\d_\w{16,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^\s/@?#"'<>]+(?=@)""")


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return bool(_NAME.search(name))


def redact(text: str) -> str:
    """The text with `***` for every secret."""
    found = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret(name)}
    for secret in sorted(found, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return _FORM.sub("***", text)


class RedactedStream:
    """A text stream that leaves secrets out of what is written to it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
