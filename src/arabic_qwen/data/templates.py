"""Chat templates, and conversations as token ids with a mask of what is learned.

Every prompt format is a Jinja chat template on the tokenizer, so the one that a model was trained with is saved
with it and used again for generation, evaluation and later stages.
"""

from __future__ import annotations

import itertools
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from arabic_qwen.config.base import TEMPLATE_SUFFIXES
from arabic_qwen.data.conversations import Conversation, Message
from arabic_qwen.data.rendering import render
from arabic_qwen.errors import ConfigurationError, HostileTemplateError
from arabic_qwen.packing.group import Completion

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

ALPACA = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{- message['content'] }}"
    "{%- elif message['role'] == 'user' %}{{- '\\n\\n### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- else %}{{- RESPONSE + message['content'] + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- RESPONSE }}{%- endif %}"
)

_LONGEST_REASON = 500  # characters of what a template says

_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def set_template(tokenizer: PreTrainedTokenizerBase, name: str, response_template: str) -> None:
    """Give the tokenizer the chat template called `name`: alpaca, chatml, tokenizer (keep its own), or a Jinja file.

    Raises:
        ConfigurationError: the tokenizer lacks what the template needs, or the file's template cannot be used.
    """
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ConfigurationError(
                "instruction_template: 'tokenizer' needs a chat template, which this model's tokenizer lacks; "
                "use chatml or alpaca"
            )
    elif name == "chatml":
        if "<|im_end|>" not in tokenizer.get_vocab():
            raise ConfigurationError(
                "instruction_template: 'chatml' needs the token <|im_end|>, which this model's tokenizer lacks; use alpaca"
            )
        tokenizer.chat_template = CHATML
    elif name.endswith(TEMPLATE_SUFFIXES):
        tokenizer.chat_template = _read_template(name)
        _check_own_template(tokenizer, name)
    else:
        tokenizer.chat_template = ALPACA.replace("RESPONSE", json.dumps(response_template, ensure_ascii=False))


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        reason = f"no UTF-8 text at byte {error.start + 1}"
    raise ConfigurationError(f"instruction_template: {path} cannot be read ({reason}); give a Jinja chat template")


def _check_own_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise ConfigurationError unless a question and its answer come out of the template."""
    question, answer = {"role": "user", "content": "سؤال"}, {"role": "assistant", "content": "جواب"}
    try:
        before, after = _render_turn(tokenizer, [question, answer])
    except (ValueError, HostileTemplateError) as error:
        raise ConfigurationError(f"instruction_template: {path}: {error}") from None
    for message, text in ((question, before), (answer, after)):
        if message["content"] not in text:
            raise ConfigurationError(
                f"instruction_template: {path}: leaves out what the {message['role']} says; it must write "
                "message['content'] of every message, and of an answer only after the generation prompt"
            )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's end token and Qwen's, as far as it has them."""
    vocabulary = tokenizer.get_vocab()
    ids = {tokenizer.eos_token_id, *(vocabulary.get(token) for token in _END_TOKENS)}
    return sorted(i for i in ids if i is not None)


class Piece(NamedTuple):
    """A stretch of a rendered conversation, and whether it is learned."""

    text: str
    is_answer: bool


def render_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[list[list[Piece]]]:
    """The groups of a conversation: of each, the pieces of each completion, after the prompt that they share.

    An answer is what rendering adds when the assistant's turn is appended to its generation prompt. One group, but for a
    conversation that `learns_turns` in a template that renders past turns differently from the last one (Qwen3's): there
    each answer has a group of its own, after the context that the model will see when it generates it.

    Raises:
        ValueError: a message holds a control token, or the template cannot render the conversation.
    """
    if conversation.learns_turns:
        return [[pieces] for pieces in _render_turns(tokenizer, conversation.messages)]
    completions = []
    for answer in conversation.answers:
        messages = [*conversation.prompt, {"role": "assistant", "content": answer}]
        check_control_tokens(tokenizer, messages)
        before, rendered = _render_turn(tokenizer, messages)
        completions.append([Piece(before, False), Piece(rendered, True)])
    return [completions]


def _render_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[list[Piece]]:
    """Context, answer, context, answer … of one text, or context and answer of each turn."""
    check_control_tokens(tokenizer, messages)
    turns = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            turns.append(_render_turn(tokenizer, messages[: position + 1]))

    one_text = all(later[0].startswith(earlier[0] + earlier[1]) for earlier, later in itertools.pairwise(turns))
    if not one_text:
        return [[Piece(before, False), Piece(answer, True)] for before, answer in turns]
    pieces, done = [], 0
    for before, answer in turns:
        pieces += [Piece(before[done:], False), Piece(answer, True)]
        done = len(before) + len(answer)
    return [pieces]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The conversation up to where the assistant's answer starts.

    Raises:
        ValueError: the template cannot render the conversation.
    """
    return _render(tokenizer, messages, add_generation_prompt=True)


def last_question(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the user says last in a rendered prompt; all of the prompt where the template does not set it apart."""
    mark = "\ue000"  # of the private use area, which no template changes
    question, answer = {"role": "user", "content": mark}, {"role": "assistant", "content": mark}
    before, _, after = render_prompt(tokenizer, [question]).partition(mark)
    between = render_prompt(tokenizer, [question, answer, question]).split(mark)[2]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before[::-1], between[::-1], strict=False))
    header = "".join(letter for letter, _ in same)[::-1]
    text = prompt.removesuffix(after)
    return text.rpartition(header)[2] if header else text


def _render_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, str]:
    """What stands before the last message, an assistant's, and what rendering adds for it."""
    before = render_prompt(tokenizer, messages[:-1])
    after = _render(tokenizer, messages, add_generation_prompt=False)
    if not after.startswith(before):
        raise ValueError(
            "the chat template changes the prompt once it is answered, so what is learned has no clear beginning; "
            "with add_generation_prompt it must end where the answer starts, or use chatml"
        )
    return before, after[len(before) :]


def check_control_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Raise ValueError where a text holds a control token, which would end its turn in the middle."""
    # all_special_tokens lacks those of the vocabulary that the tokenizer's configuration does not name.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for message in messages:
        for token in special.union(tokenizer.all_special_tokens):
            if token in message["content"]:
                raise ValueError(f"the {message['role']}'s text holds the control token {token}; remove it")


def _render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    try:
        return render(
            tokenizer.get_chat_template(),
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except HostileTemplateError:  # not the row's fault, and of every row
        raise
    except Exception as error:  # a template is a program and may fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        place = f" (line {line} of the template)" if line else ""
        raise ValueError(f"the chat template refuses the conversation: {str(error)[:_LONGEST_REASON]}{place}") from None


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[list[Piece]]
) -> list[tuple[np.ndarray, Completion]]:
    """Tokenise the pieces of completions, the first of which is the prompt: (its ids, the completion).

    Each piece is tokenised by itself, as it is at generation time, so the mask follows from token positions: an
    answer's tokens up to its end token are targets. Tokens after the last target are dropped.
    """
    if not completions:
        return []
    ids = tokenizer([piece.text for pieces in completions for piece in pieces], add_special_tokens=False).input_ids
    ends = np.array(stop_token_ids(tokenizer))
    encoded = iter(ids)
    found = []
    for pieces in completions:
        prompt = np.array(next(encoded), dtype=np.int32)
        tokens, targets = [], []
        for piece in pieces[1:]:
            piece_ids = np.array(next(encoded), dtype=np.int32)
            mask = np.full(len(piece_ids), piece.is_answer)
            if piece.is_answer:
                end_positions = np.flatnonzero(np.isin(piece_ids, ends))
                if len(end_positions):
                    mask[end_positions[-1] + 1 :] = False
                elif piece is pieces[-1]:
                    piece_ids, mask = np.append(piece_ids, np.int32(tokenizer.eos_token_id)), np.append(mask, True)
            tokens.append(piece_ids)
            targets.append(mask)
        completion, mask = np.concatenate(tokens), np.concatenate(targets)
        last = np.flatnonzero(mask)[-1] + 1
        found.append((prompt, Completion(completion[:last], mask[:last])))
    return found
