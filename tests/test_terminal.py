"""Marks for right-to-left text: on a terminal only."""

import sys

import pytest

from arabic_qwen.terminal import direction_by_paragraph, isolated


@pytest.mark.parametrize(
    ("is_terminal", "text", "expected"),
    [
        (True, "ما عاصمة الأردن؟", "\u2068ما عاصمة الأردن؟\u2069"),
        (True, "نعم\nلا", "\u2068نعم\u2069\n\u2068لا\u2069"),
        (True, "yes", "yes"),
        (False, "ما عاصمة الأردن؟", "ما عاصمة الأردن؟"),
    ],
)
def test_isolated(monkeypatch, is_terminal, text, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert isolated(text) == expected


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, "\x1b[?2501hنعم\x1b[?2501l"), (False, "نعم")])
def test_direction_by_paragraph(monkeypatch, capsys, is_terminal, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    with direction_by_paragraph():
        print("نعم", end="")
    assert capsys.readouterr().out == expected
