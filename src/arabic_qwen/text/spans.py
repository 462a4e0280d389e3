"""Parts of a text that are not prose: code, URLs, e-mail addresses."""

import re
from itertools import chain, zip_longest

PLACEHOLDER = "\ufdd0"  # a noncharacter: Unicode promises that it stands for nothing, and no rule touches it

_MARKS = ("`", "://", "www.", "@", PLACEHOLDER)  # a text without any of these has no such parts
_ENDS_URL = r"\s<>\"`«»،؛؟\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
_SPAN = re.compile(
    rf"""
    (`{{3,}}) .*? (?: \1`* | \Z )                              # a fence; one that is cut off reaches to the end
  | (?<!`) (`{{1,2}}) (?!`) [^\n]+? (?<!`) \2 (?!`)            # inline code, within its line
  | (?<![A-Za-z0-9]) (?: [A-Za-z][A-Za-z0-9+.-]{{1,9}}:// | www\. ) [^{_ENDS_URL}]+
  | (?<![\w.+-]) [\w.+-]{{1,64}} @ [\w-]+ (?: \.[\w-]+ )+      # an e-mail address
  | {PLACEHOLDER}
    """,
    re.VERBOSE | re.DOTALL,
)


def hide_spans(text: str) -> tuple[str, list[str]]:
    """The text with one PLACEHOLDER for each fenced or inline code, URL and e-mail address, and what they stand for.

    Code is what Markdown shows as code: ``` to ``` (or to the end), and `…` or ``…`` within a line.
    """
    spans: list[str] = []
    if not any(mark in text for mark in _MARKS):
        return text, spans

    def hide(match: re.Match[str]) -> str:
        spans.append(match[0])
        return PLACEHOLDER

    return _SPAN.sub(hide, text), spans


def restore_spans(text: str, spans: list[str]) -> str:
    """The inverse of `hide_spans`, on a text that has kept its placeholders."""
    return "".join(chain.from_iterable(zip_longest(text.split(PLACEHOLDER), spans, fillvalue="")))
