"""Arabic on terminals that order it themselves, on those that do not, and in pipes."""

import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.terminal import VARIABLE, Formatter, direction_by_paragraph, displayed, does_bidi, isolated

QUESTION = "ما عاصمة الأردن؟"


def backwards(text):
    """Letters from the last to the first, each with its marks behind it."""
    return "".join(re.findall(r"[^ًّ][ًّ]*", text)[::-1])


@pytest.fixture
def terminal(monkeypatch):
    """Let standard output and error be a terminal of some columns."""

    def terminal(bidi, columns=80, is_terminal=True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
        monkeypatch.setenv(VARIABLE, "terminal" if bidi else "visual")
        monkeypatch.setenv("COLUMNS", str(columns))

    return terminal


@pytest.mark.parametrize(
    ("is_terminal", "text", "expected"),
    [
        (True, QUESTION, f"\u2068{QUESTION}\u2069"),
        (True, "نعم\nلا", "\u2068نعم\u2069\n\u2068لا\u2069"),
        (True, "yes", "yes"),
        (False, QUESTION, QUESTION),
    ],
)
def test_isolated(terminal, is_terminal, text, expected):
    terminal(bidi=True, is_terminal=is_terminal)
    assert isolated(text) == expected
    assert displayed(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QUESTION, QUESTION[::-1]),
        ("نعم\nyes\nلا", "معن\nyes\nال"),
        ("قال: Hello (نعم) 12", "12 (معن) Hello :لاق"),
        ("في x[0] = {ا} «نعم» ((ب))", "((ب)) «معن» {ا} = x[0] يف"),
        ("a (نعم) (b) > [ب]", "a (معن) (b) > [ب]"),
        ("⟦نعم.<|end|>⟧", "⟦<|end|>.معن⟧"),
        ("a = قيمة", "a = ةميق"),
        ("مُدّ", "دّمُ"),  # each mark stays behind its letter
        ("\u2068نعم\u2069\u200f", "معن"),
        ("", ""),
        ("yes, 42", "yes, 42"),
    ],
)
def test_visual_order(terminal, text, expected):
    terminal(bidi=False)
    assert displayed(text) == isolated(text) == expected


def test_lines_are_broken_before_they_are_reordered(terminal):
    terminal(bidi=False, columns=30)
    text = "القراءة توسّع المدارك وتنمّي الخيال كثيرًا"
    first, second = displayed(text, indent=6).split("\n")
    assert first == backwards("القراءة توسّع المدارك")
    assert second == " " * (6 + 2) + backwards("وتنمّي الخيال كثيرًا")  # right-aligned below the first
    assert max(map(len, displayed("كلمة " * 12).split("\n"))) <= 30


MIRRORED = str.maketrans("])", "[(")


@given(st.text(alphabet="ابتم لا؟،ab1([ ])\n", max_size=120))
def test_nothing_is_lost(text):
    environment, isatty = dict(os.environ), sys.stdout.isatty
    os.environ.update({VARIABLE: "visual", "COLUMNS": "24"})
    sys.stdout.isatty = lambda: True
    try:
        shown = displayed(text)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.isatty = isatty
    assert sorted("".join(shown.split()).translate(MIRRORED)) == sorted("".join(text.split()).translate(MIRRORED))


def test_pipes_get_text_as_it_is(terminal):
    terminal(bidi=False, is_terminal=False)
    assert displayed(QUESTION) == isolated(QUESTION) == QUESTION


def test_log_messages(terminal):
    terminal(bidi=False)
    record = logging.LogRecord("x", logging.INFO, "", 0, "row: %s", ("نعم",), None)
    assert Formatter("%(message)s").format(record) == "row: معن"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"TERM": "xterm-256color"}, False),
        ({"TERM": "xterm-256color", "VTE_VERSION": "7600"}, True),
        ({"VTE_VERSION": "5402"}, False),
        ({"VTE_VERSION": "7600", "TMUX": "/tmp/tmux-1000/default,1,0"}, False),
        ({"KONSOLE_VERSION": "230804", "STY": "1.pts-0"}, False),
        ({"KONSOLE_VERSION": "230804"}, True),
        ({"TERM_PROGRAM": "Apple_Terminal"}, True),
        ({"TERM_PROGRAM": "mintty"}, True),
        ({"TERM_PROGRAM": "vscode"}, False),
        ({"TERM": "mlterm-256color"}, True),
        ({"TMUX": "x", VARIABLE: "terminal"}, True),
        ({"VTE_VERSION": "7600", VARIABLE: "visual"}, False),
        ({"VTE_VERSION": "7600", VARIABLE: ""}, True),
    ],
)
def test_terminals(environment, expected):
    assert does_bidi(environment) is expected


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, "\x1b[?2501hنعم\x1b[?2501l"), (False, "نعم")])
def test_direction_by_paragraph(monkeypatch, capsys, is_terminal, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    with direction_by_paragraph():
        print("نعم", end="")
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(("setting", "expected"), [("visual", "؟ندرألا"), ("terminal", "الأردن؟")])
def test_on_a_real_terminal(setting, expected):
    outer, inner = pty.openpty()
    ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    program = "from arabic_qwen.terminal import displayed; print(displayed('عاصمة الأردن؟ ' * 4))"
    environment = {**os.environ, VARIABLE: setting, "COLUMNS": ""}
    subprocess.run([sys.executable, "-c", program], stdout=inner, env=environment, check=True, timeout=60)
    os.close(inner)
    lines = os.read(outer, 4096).decode().split("\r\n")[:-1]
    os.close(outer)
    assert all(expected in line for line in lines)
    assert len(lines) == (2 if setting == "visual" else 1)
