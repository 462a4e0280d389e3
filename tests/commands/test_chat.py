"""The conversation on the terminal: commands, history, interruption."""

import pytest

from arabic_qwen.commands.chat import Chat, _Streamer
from arabic_qwen.models.sources import EMBEDDED_MODEL
from arabic_qwen.terminal import VARIABLE


@pytest.fixture(scope="module")
def loaded():
    return Chat(EMBEDDED_MODEL, "", 4, do_sample=False)


@pytest.fixture
def talk(loaded, monkeypatch, capsys):
    """Lines that a user types -> (the chat afterwards, what it asked the model, standard error)."""

    def talk(*lines, answer="جواب", system=""):
        loaded.turns, loaded.system, loaded.has_dropped_turns = [], system, False
        asked = []

        def respond(conversations, max_length, **kwargs):
            asked.append([(message["role"], message["content"]) for message in conversations[0]])
            return [answer(kwargs["streamer"]) if callable(answer) else answer]

        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(loaded.trainer, "respond", respond)
        monkeypatch.setattr("builtins.input", read)
        loaded.run()
        return loaded, asked, capsys.readouterr().err

    return talk


def test_the_conversation_is_remembered(talk):
    _, asked, _ = talk("مرحبا", "وأنت؟")
    assert asked[1] == [("user", "مرحبا"), ("assistant", "جواب"), ("user", "وأنت؟")]


def test_commands(talk):
    _, asked, said = talk("أولًا", "/reset", "ثانيًا", "/system أجب بإيجاز.", "ثالثًا", "/system", "/help")
    assert asked[1:] == [[("user", "ثانيًا")], [("system", "أجب بإيجاز."), ("user", "ثالثًا")]]
    assert "\nأجب بإيجاز.\n" in said and "/reset " in said


def test_system_prompt_given_at_the_start_survives_a_reset(talk):
    _, asked, _ = talk("/reset", "مرحبا", system="بإيجاز")
    assert asked == [[("system", "بإيجاز"), ("user", "مرحبا")]]


def test_unknown_commands_are_told_and_not_said_to_the_model(talk):
    _, asked, said = talk("/sytem a", " /sytem a")
    assert "/sytem: unknown command; /help" in said
    assert asked == [[("user", "/sytem a")]]


@pytest.mark.parametrize("end", ["/exit", EOFError(), KeyboardInterrupt()], ids=repr)
def test_ends(talk, end):
    assert talk(end, "never said")[1] == []


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
    def interrupted(streamer):
        streamer.on_finalized_text("نصف ")
        raise KeyboardInterrupt

    _, asked, _ = talk("أولًا", "ثانيًا", answer=interrupted)
    assert asked[1] == [("user", "أولًا"), ("assistant", "نصف "), ("user", "ثانيًا")]


def test_the_oldest_turns_go_when_the_context_is_full(talk, loaded, monkeypatch):
    lines = [f"سؤال رقم {i} عن عاصمة الأردن" for i in range(6)]
    loaded.turns = [{"role": "user", "content": lines[0]}]
    monkeypatch.setattr(loaded.trainer.model.config, "max_position_embeddings", 3 * loaded._length())
    _, asked, said = talk(*lines)
    assert asked[0] == [("user", lines[0])]
    assert asked[-1][-1] == ("user", lines[-1]) and len(asked[-1]) < 2 * len(lines) - 1
    assert asked[-1][0][0] == "user"
    assert said.count("no longer fit") == 1


def test_the_context_is_what_rope_is_scaled_to(talk, loaded, monkeypatch):
    monkeypatch.setattr(loaded.trainer.model.config, "rope_parameters", {"rope_type": "yarn", "factor": 8.0})
    _, asked, _ = talk(*[f"سؤال رقم {i} عن عاصمة الأردن" for i in range(3)], "كلمة " * 500)
    assert len(asked[-1]) == 7


def test_a_line_longer_than_the_context_is_told(talk):
    _, asked, said = talk("كلمة " * 5000, "مرحبا")
    assert "longer than the model can read" in said
    assert asked == [[("user", "مرحبا")]]


def test_streams_what_the_model_says(loaded, monkeypatch, capsys):
    lines = iter(["مرحبا", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    loaded.turns, loaded.system = [], ""
    loaded.run()
    assert capsys.readouterr().out.strip() == loaded.turns[-1]["content"]


@pytest.mark.parametrize(
    "words", [["مرحبا ", "بك\n", "في ", "عمان"], ["مرحبا بك\nفي عمان"], ["مرحبا بك\n", "في عمان", ""]]
)
def test_whole_lines_where_the_terminal_does_not_order_them(loaded, monkeypatch, capsys, words):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv(VARIABLE, "visual")
    streamer = _Streamer(loaded.trainer.tokenizer)
    for word in words[:-1]:
        streamer.on_finalized_text(word)
    assert "نامع" not in capsys.readouterr().out
    streamer.on_finalized_text(words[-1], stream_end=True)
    assert streamer.said == "مرحبا بك\nفي عمان"
    assert (streamer.waiting, capsys.readouterr().out.splitlines()[-1]) == ("", "نامع يف")


def test_what_an_interrupted_line_said_is_shown(talk, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv(VARIABLE, "visual")

    def interrupted(streamer):
        streamer.on_finalized_text("نصف ")
        raise KeyboardInterrupt

    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: shown.append("".join(text)))
    talk("أولًا", answer=interrupted)
    assert "فصن …" in shown
