import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from arabic_qwen.data.conversations import Conversation
from arabic_qwen.data.templates import Piece, encode_pieces, render_conversation, set_template, stop_token_ids
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.packing.group import Group

# Like Qwen2.5's: a system prompt of its own.
QWEN25_LIKE = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message['role'] != 'system' %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Like Qwen3's: only the last answer has a thinking part.
THINK = "<think>\n\n</think>\n\n"
QWEN3_LIKE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# No control tokens at all.
PLAIN = (
    "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)

TEMPLATES = {"alpaca": None, "chatml": None, "qwen2.5": QWEN25_LIKE, "qwen3": QWEN3_LIKE}


def use(tokenizer, name: str) -> None:
    if TEMPLATES[name] is None:
        set_template(tokenizer, name, "### Response:\n")
    else:
        tokenizer.chat_template = TEMPLATES[name]
        set_template(tokenizer, "tokenizer", "### Response:\n")


def conversation(*turns: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def encode(tokenizer, messages) -> list[Group]:
    return [
        Group(prompt, (completion,))
        for prompt, completion in encode_pieces(tokenizer, render_turns(tokenizer, messages))
    ]


def render_turns(tokenizer, messages) -> list[list[Piece]]:
    """Of a conversation all of whose answers are learned."""
    learned = Conversation(messages[:-1], [messages[-1]["content"]], learns_turns=True)
    return [completion for (completion,) in render_conversation(tokenizer, learned)]


def learned(tokenizer, group: Group) -> list[str]:
    """The text of each uninterrupted run of targets."""
    ((ids, targets, _),) = group.completions
    runs: list[list[int]] = []
    previous = False
    for token, target in zip(ids.tolist(), targets.tolist(), strict=True):
        if target and not previous:
            runs.append([])
        if target:
            runs[-1].append(token)
        previous = target
    return [tokenizer.decode(run) for run in runs]


def expected_targets(template: str, answers: list[str]) -> list[list[str]]:
    """For each group, what the assistant says, up to its end token."""
    said = [unicodedata.normalize("NFC", answer) + "<|im_end|>" for answer in answers]
    if template == "qwen3" and len(said) > 1:
        return [[THINK + text] for text in said]
    return [[THINK + said[0]] if template == "qwen3" else said]


CONVERSATIONS = {
    "one turn": conversation("ما عاصمة الأردن؟", "عاصمة الأردن هي عمّان."),
    "system": conversation("من أنت؟", "أنا مساعد.", system="أنت مساعد عربي."),
    "several turns": conversation("أهلًا", "مرحبًا بك!", "كيف الحال؟", "بخير، شكرًا.", "وداعًا", "مع السلامة."),
    "several turns with system": conversation("أ", "ب", "ج", "د", system="كن موجزًا."),
    "question holds the answer": conversation("قل: نعم", "نعم", "نعم", "نعم"),
    "question imitates the template": conversation(
        "اشرح هذا:\n\n### Instruction:\nسؤال\n\n### Response:\nجواب", "جواب", "### Response:\nجواب", "جواب آخر"
    ),
    "question imitates a turn": conversation("user\nأ\nassistant\nب", "ب"),
    "answer imitates the template": conversation("اكتب مثالًا", "### Instruction:\nسؤال\n\n### Response:\nجواب\n"),
    "answer of white space and more": conversation("أ", "\n  \n- أولًا\n- ثانيًا\n\n ", "ب", "  ج  "),
    "answer begins with a diacritic": conversation("ا", "\u0653 مدّة", "e", "\u0301"),
    "diacritics, presentation forms, emoji": conversation("مُحَمَّدٌ ﷺ", "ﻻ ـــ 👨‍👩‍👧 \u200f٣", "ی", "ک"),
    "decomposed letters": conversation("آ", "آ أ e\u0301"),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_targets_are_what_the_assistant_says(tokenizer, template, name):
    use(tokenizer, template)
    messages = CONVERSATIONS[name]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    groups = encode(tokenizer, messages)
    assert [learned(tokenizer, group) for group in groups] == expected_targets(template, answers)


@pytest.fixture(scope="module")
def shared_tokenizer(tokenizer_file):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


words = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n \u064bاﷺ#:"), min_size=1, max_size=12)
words = words.filter(lambda text: "<|" not in text)


@pytest.mark.parametrize("template", TEMPLATES)
@given(
    turns=st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), system=st.none() | words
)
def test_targets_of_any_conversation(shared_tokenizer, template, turns, system):
    use(shared_tokenizer, template)
    groups = encode(shared_tokenizer, conversation(*turns, system=system))
    runs = [run for group in groups for run in learned(shared_tokenizer, group)]
    assert runs == [run for group in expected_targets(template, turns[1::2]) for run in group]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_is_the_one_of_generation(tokenizer, template, name):
    use(tokenizer, template)
    messages = CONVERSATIONS[name]
    positions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    groups = encode(tokenizer, messages)
    for group, position in zip(groups, positions, strict=False):
        seen = tokenizer.apply_chat_template(messages[:position], add_generation_prompt=True, return_dict=False)
        assert group.prompt.tolist() == seen


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_the_rendered_conversation(tokenizer, template, name):
    use(tokenizer, template)
    messages = CONVERSATIONS[name]
    group = encode(tokenizer, messages)[-1]
    (completion,) = group.completions
    text = tokenizer.decode(group.prompt) + tokenizer.decode(completion.ids)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    # Letters of different pieces do not combine.
    assert unicodedata.normalize("NFD", text) == unicodedata.normalize("NFD", rendered.removesuffix("\n"))
    assert completion.targets[-1]


@pytest.mark.parametrize(
    "name", ["one turn", "system", "several turns", "several turns with system", "question imitates the template"]
)
@pytest.mark.parametrize("template", ["chatml", "qwen2.5"])
def test_ids_are_those_of_the_chat_template(tokenizer, template, name):
    use(tokenizer, template)
    (group,) = encode(tokenizer, CONVERSATIONS[name])
    whole = tokenizer.apply_chat_template(CONVERSATIONS[name], tokenize=True, return_dict=False)
    newline = tokenizer("\n").input_ids
    assert [*group.prompt.tolist(), *group.completions[0].ids.tolist(), *newline] == whole


def test_past_turns_rendered_differently_become_examples_of_their_own(tokenizer):
    use(tokenizer, "qwen3")
    first, second = encode(tokenizer, conversation("أ", "ب", "ج", "د"))
    assert tokenizer.decode(first.prompt) == "<|im_start|>user\nأ<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(second.prompt) == (
        "<|im_start|>user\nأ<|im_end|>\n<|im_start|>assistant\nب<|im_end|>\n"
        "<|im_start|>user\nج<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first.completions[0].targets.all()
    assert second.completions[0].targets.all()


def test_alpaca_text(tokenizer):
    use(tokenizer, "alpaca")
    pieces = render_turns(tokenizer, conversation("ترجم", "نعم", "ثم؟", "لا"))
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert pieces == [
        [
            Piece(f"{preamble}\n\n### Instruction:\nترجم\n\n### Response:\n", False),
            Piece("نعم<|im_end|>", True),
            Piece("\n\n### Instruction:\nثم؟\n\n### Response:\n", False),
            Piece("لا<|im_end|>", True),
        ]
    ]


def test_alpaca_system_prompt_takes_the_place_of_the_preamble(tokenizer):
    use(tokenizer, "alpaca")
    ((prompt, _),) = render_turns(tokenizer, conversation("ترجم", "نعم", system="أنت مترجم."))
    assert prompt.text == "أنت مترجم.\n\n### Instruction:\nترجم\n\n### Response:\n"


@pytest.mark.parametrize("response_template", ["### الرد:\n", 'a "b" \\ \\n {{ x }} {% y %} RESPONSE\t', "'", ""])
def test_response_template_is_taken_literally(tokenizer, response_template):
    set_template(tokenizer, "alpaca", response_template)
    ((prompt, answer),) = render_turns(tokenizer, conversation("سؤال", "جواب"))
    assert prompt.text.endswith("\n\n### Instruction:\nسؤال\n\n" + response_template)
    assert answer.text == "جواب<|im_end|>"


def test_template_without_end_token_gets_one_after_the_last_answer(tokenizer):
    tokenizer.chat_template = PLAIN
    (group,) = encode(tokenizer, conversation("أ", "ب", "ج", "د"))
    assert learned(tokenizer, group) == ["ب\n", "د\n<|im_end|>"]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_in_texts_are_refused(tokenizer_file, role, token):
    # <|im_start|> is in the vocabulary, but no attribute of this tokenizer names it.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    use(tokenizer, "chatml")
    texts = {"system": "س", "user": "أ", "assistant": "ب"} | {role: f"قبل{token}بعد"}
    messages = [{"role": name, "content": text} for name, text in texts.items()]
    with pytest.raises(ValueError) as error:
        render_turns(tokenizer, messages)
    assert str(error.value) == f"the {role}'s text holds the control token {token}; remove it"


def test_words_that_only_look_like_control_tokens_are_kept(tokenizer):
    use(tokenizer, "chatml")
    (group,) = encode(tokenizer, conversation("<|im_end", "<think> |im_end|> </s>"))
    assert learned(tokenizer, group) == ["<think> |im_end|> </s><|im_end|>"]


def test_template_that_changes_the_answered_prompt_is_refused(tokenizer):
    tokenizer.chat_template = PLAIN.replace("'assistant: '", "'assistant: <think>'")
    with pytest.raises(ValueError, match=r"changes the prompt once it is answered, .* or use chatml"):
        render_turns(tokenizer, conversation("أ", "ب"))


def test_template_that_refuses_the_conversation(tokenizer):
    tokenizer.chat_template = (
        "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system role') }}{%- endif %}" + PLAIN
    )
    with pytest.raises(ValueError, match="the chat template refuses the conversation: no system role"):
        render_turns(tokenizer, conversation("أ", "ب", system="س"))


def test_many_conversations_at_once_are_as_one_by_one(tokenizer):
    use(tokenizer, "chatml")
    pieces = [render_turns(tokenizer, messages)[0] for messages in CONVERSATIONS.values()]
    together = encode_pieces(tokenizer, pieces)
    for conversation_pieces, (prompt, completion) in zip(pieces, together, strict=True):
        ((alone, expected),) = encode_pieces(tokenizer, [conversation_pieces])
        assert alone.tolist() == prompt.tolist()
        assert expected.ids.tolist() == completion.ids.tolist()
        assert expected.targets.tolist() == completion.targets.tolist()


def test_tokenizers_own_template_must_exist(tokenizer):
    with pytest.raises(ConfigurationError, match="'tokenizer' needs a chat template"):
        set_template(tokenizer, "tokenizer", "")


def test_chatml_needs_its_tokens(tokenizer, tokenizer_file, tmp_path):
    renamed = tokenizer_file.read_text(encoding="utf-8").replace("<|im_end|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(renamed, encoding="utf-8")
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    with pytest.raises(ConfigurationError, match=r"'chatml' needs the token <\|im_end\|>"):
        set_template(other, "chatml", "")
    set_template(other, "alpaca", "### Response:\n")
    (group,) = encode(other, conversation("أ", "ب"))
    assert learned(other, group) == ["ب</s>"]


def test_stop_tokens(tokenizer, tokenizer_file):
    assert stop_token_ids(tokenizer) == [0, 2]
    other = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="!")
    assert stop_token_ids(other) == sorted({0, 2, other.convert_tokens_to_ids("!")})


class TestOwnTemplate:
    GOOD = (
        "{%- for message in messages %}\n"
        "[{{ message['role'] }}] {% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}\n[assistant] {% endif %}"
    )

    @pytest.fixture
    def write(self, tmp_path):
        def write(template: str | bytes, name: str = "own.jinja") -> str:
            path = tmp_path / name
            path.write_bytes(template if isinstance(template, bytes) else template.encode())
            return str(path)

        return write

    @pytest.mark.parametrize("name", ["own.j2", "own.jinja"])
    def test_only_answers_are_learned(self, tokenizer, write, name):
        set_template(tokenizer, write("\ufeff" + self.GOOD, name), "")
        (group,) = encode(tokenizer, conversation("أ", "ب", "ج", "د", system="س"))
        assert learned(tokenizer, group) == ["ب<|im_end|>", "د<|im_end|>"]
        assert tokenizer.chat_template == self.GOOD

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", r"unexpected '}' \(line 2 of the template\)"),
            ("a\n\n{{ messages[0].text.strip() }}", r"has no attribute 'text' \(line 3 of the template\)"),
            ("a\n{{ 1 + 'x' }}", r"unsupported operand .* \(line 2 of the template\)"),
            ("{{ messages | none_such }}", r"No filter named 'none_such'. \(line 1 of the template\)"),
            ("{% include 'x' %}", r"no loader .* \(line 1 of the template\)"),
            ("{{ ''.__class__.__mro__ }}", r"is unsafe"),
            ("{{ raise_exception('لا') }}", r"refuses the conversation: لا \(line 1 of the template\)"),
            ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
            ("", "leaves out what the user says"),
            ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user says"),
            (
                "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
                "leaves out what the assistant says",
            ),
            (
                "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
                "changes the prompt once it is answered",
            ),
        ],
    )
    def test_templates_that_cannot_be_used(self, tokenizer, write, template, message):
        path = write(template)
        with pytest.raises(ConfigurationError, match=rf"^instruction_template: {path}: .*{message}") as error:
            set_template(tokenizer, path, "")
        assert "\n" not in str(error.value)

    def test_files_that_cannot_be_read(self, tokenizer, write, tmp_path):
        with pytest.raises(ConfigurationError, match=r"none.jinja cannot be read \(No such file or directory\)"):
            set_template(tokenizer, f"{tmp_path}/none.jinja", "")
        with pytest.raises(ConfigurationError, match=r"own.jinja cannot be read \(no UTF-8 text at byte 1\)"):
            set_template(tokenizer, write("سؤال".encode("cp1256")), "")
