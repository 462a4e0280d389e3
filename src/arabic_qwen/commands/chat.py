"""`arabic-qwen chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from transformers import TextStreamer

from arabic_qwen.config import SFTConfig
from arabic_qwen.data.conversations import Message
from arabic_qwen.data.templates import render_prompt
from arabic_qwen.models.loading import positions
from arabic_qwen.terminal import direction_by_paragraph, displayed, is_visual
from arabic_qwen.training.base_trainer import BaseTrainer

HELP = """\
/system TEXT  set the system prompt and start again (without TEXT: show it)
/reset        forget the conversation
/help         this
/exit         end (as Ctrl-D and Ctrl-C do; Ctrl-C while the model answers stops the answer)
A line that starts with a space is said to the model, whatever follows."""


class _Streamer(TextStreamer):
    """Prints the answer as it comes and remembers it, for one that is stopped on the way."""

    said = ""
    waiting = ""  # the line that can be put in visual order once it is whole

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said += text
        if not is_visual():
            super().on_finalized_text(text, stream_end)
            return
        text = self.waiting + text + ("\n" if stream_end else "")
        lines, newline, self.waiting = text.rpartition("\n")
        if newline:
            print(displayed(lines), flush=True)


class Chat:
    """A conversation with a model.

    Args:
        model: hub id, model folder, or the output folder of a run.
        system: system prompt; empty: the run's own, if it had one.
        max_length: new tokens an answer at most.
        sampling: further arguments for `generate()`.

    Raises:
        ModelLoadError: the model cannot be loaded.
    """

    def __init__(self, model: str, system: str, max_length: int, **sampling: Any):
        self.trainer = BaseTrainer(SFTConfig(model_name=model, instruction_template="tokenizer"))
        self.trainer.load_model(model)
        self.system = system or self.trainer.config.system_prompt or ""
        self.max_length = max_length
        self.sampling = sampling
        self.turns: list[Message] = []
        self.has_dropped_turns = False

    def run(self) -> None:
        """Read lines and answer them until the input ends."""
        prompt = ""
        if sys.stdin.isatty():
            prompt = "> "
            print("/help lists the commands", file=sys.stderr)
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() then edits lines and recalls earlier ones
        with direction_by_paragraph():
            while True:
                try:
                    # bytes that are no UTF-8 become the replacement character
                    line = input(prompt).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                except (EOFError, KeyboardInterrupt):
                    if prompt:
                        print()
                    return
                if line.startswith("/exit"):
                    return
                if line.startswith("/"):
                    print(displayed(self._command(line), sys.stderr), file=sys.stderr)
                elif line.strip():
                    self._answer(line.strip())

    def _command(self, line: str) -> str:
        """Do what a command says; what to reply."""
        name, _, text = line.strip().partition(" ")
        if name == "/help":
            return HELP
        if name == "/system" and not text.strip():
            return self.system or "there is no system prompt"
        if name not in ("/system", "/reset"):
            return f"{name}: unknown command; /help lists them (start with a space to say it to the model)"
        self.turns, self.has_dropped_turns = [], False
        if name == "/system":
            self.system = text.strip()
        return "the conversation starts again"

    def _answer(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        if not self._fit():
            self.turns.pop()
            print("that is longer than the model can read; say it shorter", file=sys.stderr)
            return
        streamer = _Streamer(self.trainer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            (answer,) = self.trainer.respond([self._messages()], self.max_length, streamer=streamer, **self.sampling)
        except KeyboardInterrupt:
            answer = streamer.said
            print(f"{displayed(streamer.waiting)} …")
        self.turns.append({"role": "assistant", "content": answer})

    def _messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def _fit(self) -> bool:
        """Drop the oldest turns until the conversation leaves room for an answer; whether it does."""
        room = positions(self.trainer.model.config) - self.max_length
        while self._length() > room:
            if len(self.turns) == 1:
                return False
            del self.turns[:2]
            if not self.has_dropped_turns:
                print("(the oldest turns no longer fit the model's context and are forgotten)", file=sys.stderr)
            self.has_dropped_turns = True
        return True

    def _length(self) -> int:
        tokenizer = self.trainer.tokenizer
        return len(tokenizer(render_prompt(tokenizer, self._messages()), add_special_tokens=False).input_ids)
