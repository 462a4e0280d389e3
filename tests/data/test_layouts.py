"""Public sets are read as they are; what is unusual in a row is told, and hostile text does no harm."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.audit.findings import CODES
from arabic_qwen.config import METHOD_CONFIGS, SFTConfig
from arabic_qwen.data.bad_rows import RowError
from arabic_qwen.data.conversations import to_conversation
from arabic_qwen.data.layouts import LAYOUTS, canonical, recognise, role_of
from arabic_qwen.data.preferences import to_contrast, to_feedback, to_pair
from arabic_qwen.data.sources import read_rows
from arabic_qwen.data.templates import set_template
from arabic_qwen.methods.registry import METHODS, methods_of

FILES = sorted(Path(__file__).with_name("layouts").glob("*.jsonl"))
READERS = {"sft": to_conversation, "kto": to_feedback, "cpo": to_contrast}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(user="user", assistant="assistant", answer="جواب"):
    return [{"role": user, "content": "سؤال"}, {"role": assistant, "content": answer}]


def as_json(messages):
    return json.dumps(messages, ensure_ascii=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_training_reads_public_sets_as_they_are(path, tokenizer):
    set_template(tokenizer, "chatml", "")
    rows = read(path)
    for method in methods_of(recognise(rows[0]).kind):
        config = METHOD_CONFIGS[method](dataset_path=str(path), validation_split=0)
        loader = METHODS[method].data_loader
        dataset = loader(config, tokenizer).load()["train"]
        text = tokenizer.decode([token for group in dataset for token in group.prompt])
        assert len(dataset) == len(rows) and "[{" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_table_names_public_sets(path):
    names = [name.split("/")[1] for layout in LAYOUTS for name in layout.sets]
    letters = [
        name.lower().replace("-", "").replace("_", "").replace(".", "").replace("ayaaya", "aya") for name in names
    ]
    assert path.stem.replace("_", "") in letters


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " + ".join(layout.columns))
def test_examples_of_the_table(layout):
    assert recognise(layout.example) == layout
    assert layout.example.keys() <= {*layout.columns, *layout.optional}
    assert set(methods_of(layout.kind)) <= METHOD_CONFIGS.keys()
    for method in methods_of(layout.kind):
        READERS.get(method, to_pair)(layout.example)
    assert canonical(layout.example) == (layout.example, [])


def test_prompt_of_an_instruction_with_input():
    row = {"instruction": "ترجم", "input": "Hello", "chosen": "مرحبًا", "rejected": "وداعًا"}
    assert to_pair(row).prompt == [{"role": "user", "content": "ترجم\n\nHello"}]
    with pytest.raises(RowError, match="such a row is a preference, for method dpo and its relatives"):
        to_conversation(row)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, name) for name in ("system", "user", "assistant")),
        *((name, "user") for name in ("human", "User ", "HUMAN", "المستخدم", "مُستخدِم", "مستخدمة", "الإنسان", "بشري")),
        *(
            (name, "assistant")
            for name in ("gpt", "AI", "bot", "المساعد", "مساعدة", "المساعد الذكي", "الذكاء الاصطناعي")
        ),
        *((name, "system") for name in ("نظام", "النظام")),
        *((name, None) for name in ("tool", "معلم", "ال", "", " ")),
    ],
)
def test_roles(name, role):
    found, is_translated = role_of(name)
    assert found == role
    assert is_translated == (role is not None and not name.isascii())


def as_numpy(messages):
    return str(np.array(messages, dtype=object))


@pytest.mark.parametrize("dump", [as_json, repr, as_numpy], ids=["JSON", "Python", "numpy"])
def test_messages_as_text(dump):
    answer = "سطر\nثانٍ: \"قال: it's\" \\ [{'role': …}] \t{}"
    row = {"messages": dump(turns("المستخدم", "المساعد", answer)), "id": 3}
    expected = {"messages": turns(answer=answer), "id": 3}
    assert canonical(row) == (expected, ["stringified_messages", "translated_role"])
    assert to_conversation(row) == expected["messages"]
    pair = {"chosen": dump(turns()), "rejected": dump(turns(answer="لا"))}
    assert to_pair(pair) == to_pair({"chosen": turns(), "rejected": turns(answer="لا")})


def test_python_lists_in_csv(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages"], [repr(turns())], [as_numpy(turns())], [as_json(turns())]])
    rows = [row.values for row in read_rows(SFTConfig(), str(path))]
    assert [to_conversation(row) for row in rows] == [turns()] * 3
    assert [canonical(row)[1] for row in rows] == [["stringified_messages"]] * 2 + [[]]  # a cell can hold no list


def test_rows_in_our_own_layout_are_not_copied():
    row = {"messages": turns()}
    found, codes = canonical(row)
    assert found is row and codes == []


def test_lists_of_one_text():
    row = {"prompt": "س", "chosen": ["نعم"], "rejected": ["لا"]}
    assert to_pair(row).answers == to_contrast(row).answers == ["نعم", "لا"]
    assert canonical(row)[1] == []


@pytest.mark.parametrize(
    "text", ["[1] انظر المرجع", "[]", '["أ", "ب"]', '[{"name": "علي"}]', "[{}]", "[x]", "[إجابة طويلة] ثم"]
)
def test_text_that_is_no_list_of_messages_stays_text(text):
    row = {"prompt": "سؤال", "completion": text}
    assert canonical(row) == (row, [])
    assert to_conversation(row)[-1]["content"] == text


HOSTILE = {
    "cut off": "[{'role': 'user', 'content': 'سؤال'",
    "unescaped quote": "[{'role': 'user', 'content': 'it's'}]",
    "code": "[{'role': __import__('os').system('true')}]",
    "sums": "[{'role': " + "1+" * 100_000 + "1}]",
    "signs": "[{'role': " + "-" * 100_000 + "1}]",
    "depth": "[{'role': " + "[" * 100_000 + "]" * 100_000 + "}]",
    "depth of JSON": '[{"role": ' + "[" * 100_000,
    "quotes": "[{'role': '" + "\\'" * 100_000,
    "digits": "[{'role': " + "9" * 100_000 + "}]",
    "null byte": "[{'role': 'user\0', 'content': x}]",
}


def test_keys_of_messages_in_any_order():
    text = "[{'weight': None, 'from': 'human', 'value': 'س'}, {'weight': 1.5, 'from': 'gpt', 'value': 'ج'}]"
    assert [turn["content"] for turn in to_conversation({"conversations": text})] == ["س", "ج"]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("column", ["messages", "chosen"])
def test_hostile_text(column, text):
    row = {column: text} if column == "messages" else {"prompt": "س", "chosen": text, "rejected": "لا"}
    with pytest.raises(RowError, match=f"^{column}: is a list of messages stored as text, which is broken") as error:
        (to_conversation if column == "messages" else to_pair)(row)
    assert error.value.code == "stringified_messages"


@given(st.text(alphabet="[]{}'\":, \\\nroleuscntaم9.-", max_size=60))
def test_any_text_gives_a_row_or_our_error(text):
    try:
        to_conversation({"messages": "[{'role':" + text})
    except RowError as error:
        assert error.code in CODES


USER, ASSISTANT = turns()
CODED = {
    "empty_answer": [
        {"instruction": "س", "response": " "},
        {"prompt": "س", "chosen": "", "rejected": "لا"},
        {"prompt": "س", "chosen": "نعم", "rejected": " \n"},
        {"prompt": "س", "completion": "", "label": True},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"conversations": [{"from": "المستخدم", "value": "س"}, {"from": "المساعد", "value": ""}]},
    ],
    "placeholder_answer": [
        *({"instruction": "س", "output": text} for text in ("N/A", " tbd. ", "TODO", "...", "…", "--")),
        *(
            {"inputs": "س", "targets": text}
            for text in (
                "لا يوجد رد",
                "أدخل إجابتك هنا",
                "[اكتب الإجابة هنا]",
                "TODO: write answer",
                "[إجابة]",
                "<answer>",
                "[الإجابة].",
                "Lorem ipsum",
            )
        ),
        {"prompt": "س", "chosen": "n/a", "rejected": "لا"},
        {"prompt": "س", "completion": "TODO", "label": 1},
        {"messages": [USER, {"role": "assistant", "content": "n/a"}, *turns()]},
    ],
    "swapped_roles": [
        {"messages": [ASSISTANT, USER]},
        {"messages": [{"role": "system", "content": "س"}, ASSISTANT, USER, ASSISTANT, USER]},
    ],
    "missing_end_of_turn": [{"messages": [USER]}, {"messages": [*turns(), USER]}, {"messages": []}],
    "equal_answers": [{"prompt": "س", "chosen": "نعم", "rejected": "نعم"}],
    "broken_row": [
        {"x": 1},
        {"instruction": "", "response": "ج"},
        {"prompt": "س", "completion": "ج", "label": 7},
        {"messages": [USER, USER, ASSISTANT]},
        {"messages": "نص"},
    ],
}


@pytest.mark.parametrize(("code", "row"), [(code, row) for code, rows in CODED.items() for row in rows], ids=str)
def test_codes_of_row_errors(code, row):
    layout = recognise(row)
    with pytest.raises(RowError) as error:
        READERS.get(methods_of(layout.kind)[0] if layout else "sft", to_pair)(row)
    assert error.value.code == code
    assert CODES[code].level == "error"


@pytest.mark.parametrize(
    "answer",
    [
        "None",
        "null",
        "NaN",
        "undefined",
        "-",
        "TODO: add tests",
        "اكتب اسمك هنا",
        "لا",
        "لا يوجد",
        "نعم.",
        "42",
        "Na",
        "؟",
        "+",
        "👍",
        "لا أحد",
        "None of them",
        "[1, 2]",
    ],
)
def test_short_answers_are_answers(answer):
    assert to_conversation({"instruction": "س", "response": answer})[-1]["content"] == answer


@pytest.mark.parametrize(
    "row", [{"prompt": "س", "chosen": "نعم", "rejected": "N/A"}, {"prompt": "س", "completion": "N/A", "label": False}]
)
def test_bad_answers_may_be_placeholders(row):
    assert (to_feedback if "label" in row else to_pair)(row)
