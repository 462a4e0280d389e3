"""Normalisation of Arabic text: `train` repairs what is broken and keeps spelling, `compare` folds spelling variants."""

import difflib
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.text.rules import PROFILES, Function, Rule, Setting
from arabic_qwen.text.spans import PLACEHOLDER, hide_spans, restore_spans


@dataclass
class RuleReport:
    """What a rule did to some texts."""

    characters: int = 0  # that it removed or replaced
    texts: int = 0  # that it changed
    examples: list[tuple[str, str]] = field(default_factory=list)  # (before, after), cut around the first change


def normalize(text: str, profile: str = "train", **rules: Setting) -> str:
    """The text in a profile's spelling; `rules` switches rules of the profile, `normalize(text, tatweel=False)`.

    `train` is for text that a model learns. It leaves code, URLs, e-mail addresses and Latin text alone and keeps
    hamza, ى, ة, digits, punctuation and diacritics. `compare` is for metrics and for finding duplicates; nobody should
    read its result. Both are idempotent. `rules_table` describes the rules.

    Raises:
        ConfigurationError: no such profile, rule or setting.
    """
    return _apply(text, profile, _steps(profile, frozenset(rules.items())))


@lru_cache(maxsize=4000)  # checks, duplicates and dialects of a batch of rows all compare the same texts
def fold(text: str) -> str:
    """`normalize(text, "compare")`, remembered for the latest texts."""
    return normalize(text, "compare")


def normalization_report(
    texts: Iterable[str], profile: str = "train", *, examples: int = 3, **rules: Setting
) -> dict[str, RuleReport]:
    """What `normalize` changes in the texts, by rule that is on: characters, texts, and the first few examples.

    The texts are read once, so a generator will do. Code, URLs and e-mail addresses stand as … in the examples.

    Raises:
        ConfigurationError: no such profile, rule or setting.
    """
    steps = _steps(profile, frozenset(rules.items()))
    reports = {name: RuleReport() for name, _ in steps}
    changed: set[str] = set()  # the rules that changed the present text

    def count(rule: str, before: str, after: str) -> None:
        changed.add(rule)
        reports[rule].characters += _changed_characters(before, after)
        if len(reports[rule].examples) < examples:
            reports[rule].examples.append(_around_first_change(before, after))

    for text in texts:
        changed.clear()
        _apply(text, profile, steps, count)
        for rule in changed:
            reports[rule].texts += 1
    return reports


def normalize_counted(text: str, counts: Counter[str], profile: str = "train", **rules: Setting) -> str:
    """As `normalize`; adds to `counts`, by rule, the characters that it removed or replaced."""

    def count(rule: str, before: str, after: str) -> None:
        counts[rule] += _changed_characters(before, after)

    return _apply(text, profile, _steps(profile, frozenset(rules.items())), count)


def rules_table(profile: str = "train") -> str:
    """A Markdown table of a profile's rules: name, default, what it does, why."""
    header = ["| rule | default | what it does | why |", "|---|---|---|---|"]
    shown: dict[Setting, str] = {True: "on", False: "off"}
    return "\n".join(
        header
        + [
            f"| `{rule.name}` | {shown.get(rule.default, str(rule.default))} | {rule.description} | {rule.reason} |"
            for rule in _profile(profile)
        ]
    )


def _profile(profile: str) -> tuple[Rule, ...]:
    if profile not in PROFILES:
        raise ConfigurationError(f"no normalisation profile {profile!r}; there are {' and '.join(PROFILES)}")
    return PROFILES[profile]


@lru_cache
def _steps(profile: str, rules: frozenset[tuple[str, Setting]]) -> tuple[tuple[str, Function], ...]:
    """The functions of the rules that are on, with their names, in order."""
    table, chosen = _profile(profile), dict(rules)
    names = [rule.name for rule in table]
    for name in chosen:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise ConfigurationError(f"profile {profile!r} has no rule {name!r}; {hint}")
    steps = []
    for rule in table:
        setting = chosen.get(rule.name, rule.default)
        if setting not in rule.settings:
            choices = " or ".join(map(repr, rule.settings))
            raise ConfigurationError(f"rule {rule.name!r} is {choices}, not {setting!r}")
        if function := rule.settings[setting]:
            steps.append((rule.name, function))
    return tuple(steps)


def _apply(
    text: str,
    profile: str,
    steps: tuple[tuple[str, Function], ...],
    on_change: Callable[[str, str, str], None] | None = None,
) -> str:
    """The text after all steps; `on_change(rule, before, after)` hears of each that changed something."""
    while True:  # a change can make room for another (a letter moves next to its hamza): until nothing changes
        start = text
        text, spans = hide_spans(text) if profile == "train" else (text, [])
        for name, function in steps:
            before, text = text, function(text)
            if on_change and text != before:
                on_change(name, before, text)
        text = restore_spans(text, spans) if spans else text
        if text == start:
            return text


def _changed_characters(before: str, after: str) -> int:
    """Characters of `before` that are gone from `after`; where they only changed places, the places that differ."""
    if len(before) == len(after):
        return sum(map(operator.ne, before, after))
    gone = sum(map(before.count, set(before).difference(after)))
    if gone == len(before) - len(after):  # all of some characters, the usual case; much faster than counting each
        return gone
    return (Counter(before) - Counter(after)).total() or sum(map(operator.ne, before, after))


def _around_first_change(before: str, after: str, width: int = 24) -> tuple[str, str]:
    place = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    cut = slice(max(0, place - width // 2), place + width)
    return before[cut].replace(PLACEHOLDER, "…"), after[cut].replace(PLACEHOLDER, "…")
