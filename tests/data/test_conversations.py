import pytest

from arabic_qwen.data.bad_rows import RowError
from arabic_qwen.data.conversations import to_conversation


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


LAYOUTS = {
    "instruction and response": (
        {"instruction": "ما عاصمة مصر؟", "response": "القاهرة"},
        [user("ما عاصمة مصر؟"), assistant("القاهرة")],
    ),
    "alpaca with input": (
        {"instruction": "ترجم", "input": "Good morning", "output": "صباح الخير"},
        [user("ترجم\n\nGood morning"), assistant("صباح الخير")],
    ),
    "alpaca without input": (
        {"instruction": "ترجم", "output": "صباح الخير"},
        [user("ترجم"), assistant("صباح الخير")],
    ),
    "alpaca with empty input": (
        {"instruction": "ترجم", "input": "", "output": "صباح الخير"},
        [user("ترجم"), assistant("صباح الخير")],
    ),
    "alpaca with null input": (
        {"instruction": "ترجم", "input": None, "output": "صباح الخير"},
        [user("ترجم"), assistant("صباح الخير")],
    ),
    "alpaca with system": (
        {"system": "كن موجزًا", "instruction": "ترجم", "input": "x", "output": "y"},
        [system("كن موجزًا"), user("ترجم\n\nx"), assistant("y")],
    ),
    "prompt and completion": (
        {"prompt": "سؤال", "completion": "جواب"},
        [user("سؤال"), assistant("جواب")],
    ),
    "prompt and completion as messages": (
        {"prompt": [system("س"), user("سؤال")], "completion": [assistant("جواب")]},
        [system("س"), user("سؤال"), assistant("جواب")],
    ),
    "prompt of several turns, completion as text": (
        {"prompt": [user("أ"), assistant("ب"), user("ج")], "completion": "د"},
        [user("أ"), assistant("ب"), user("ج"), assistant("د")],
    ),
    "messages": (
        {"messages": [user("أ"), assistant("ب")]},
        [user("أ"), assistant("ب")],
    ),
    "messages of several turns with system": (
        {"messages": [system("س"), user("أ"), assistant("ب"), user("ج"), assistant("د")]},
        [system("س"), user("أ"), assistant("ب"), user("ج"), assistant("د")],
    ),
    "conversations of human and gpt": (
        {
            "conversations": [
                {"from": "system", "value": "س"},
                {"from": "human", "value": "أ"},
                {"from": "gpt", "value": "ب"},
                {"from": "human", "value": "ج"},
                {"from": "gpt", "value": "د"},
            ]
        },
        [system("س"), user("أ"), assistant("ب"), user("ج"), assistant("د")],
    ),
    "conversations of role and content": (
        {"conversations": [user("أ"), assistant("ب")]},
        [user("أ"), assistant("ب")],
    ),
    "messages of from and value": (
        {"messages": [{"from": "user", "value": "أ"}, {"from": "model", "value": "ب"}]},
        [user("أ"), assistant("ب")],
    ),
    "conversations of prompter and bot": (
        {"conversations": [{"from": "prompter", "value": "أ"}, {"from": "bot", "value": "ب"}]},
        [user("أ"), assistant("ب")],
    ),
    "other columns": (
        {"id": 7, "instruction": "أ", "response": "ب", "source": None},
        [user("أ"), assistant("ب")],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name):
    row, expected = LAYOUTS[name]
    assert to_conversation(row) == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_system_prompt_is_put_before_conversations_without_one(name):
    row, expected = LAYOUTS[name]
    given = to_conversation(row, "أجب بالعربية")
    assert given == (expected if expected[0]["role"] == "system" else [system("أجب بالعربية"), *expected])


def test_text_is_not_changed():
    text = "  \n مُحَمَّد ـــ ﷺ \u200f کی \x00 \n"
    assert to_conversation({"instruction": text, "response": text}) == [user(text), assistant(text)]


def test_the_row_is_not_changed():
    row = {"messages": [user("أ"), assistant("ب")]}
    to_conversation(row, "س")
    assert row == {"messages": [user("أ"), assistant("ب")]}


def test_own_system_column_comes_before_the_general_one():
    row = {"instruction": "أ", "response": "ب", "system": "خاص"}
    assert to_conversation(row, "عام")[0] == system("خاص")
    assert to_conversation(row | {"system": ""}, "عام")[0] == system("عام")
    assert to_conversation(row | {"system": None}, "عام")[0] == system("عام")


WRONG_ROWS = [
    ({}, r"has the columns \(none\), but needs messages or .*instruction \+ response"),
    ({"text": "x"}, "has the columns text, but needs"),
    ({"instruction": "x"}, "has the columns instruction, but needs"),
    ({"prompt": "x", "chosen": "a"}, "has the columns prompt, chosen, but needs"),
    ({"instruction": "", "response": "x"}, "^instruction: is empty"),
    ({"instruction": "x", "response": " \n\t\u00a0"}, "^response: is empty"),
    ({"instruction": "x", "output": None}, "^output: must be text, found nothing"),
    ({"instruction": 5, "response": "x"}, "^instruction: must be text, found int"),
    ({"instruction": "x", "response": ["a"]}, "^response: must be text, found list"),
    ({"instruction": "x", "input": 5, "output": "y"}, "^input: must be text, found int"),
    ({"instruction": "x", "response": "y", "system": 5}, "^system: must be text, found int"),
    ({"instruction": "x\ud83d", "response": "y"}, "^instruction: has half of a surrogate pair"),
    ({"prompt": "x", "completion": True}, "^completion: must be text, found bool"),
    ({"prompt": {"a": 1}, "completion": "y"}, "^prompt: must be text, found dict"),
    ({"prompt": [], "completion": "y"}, "turn 1 is by assistant"),
    ({"prompt": [user("x")], "completion": []}, "does not end with an answer"),
    ({"messages": "x"}, "^messages: must be a list of messages, found a str"),
    ({"messages": None}, "^messages: must be a list of messages, found a NoneType"),
    ({"messages": []}, "does not end with an answer"),
    ({"messages": ["x"]}, r"^messages\[0\]: must be an object with role and content, found a str"),
    ({"messages": [user("x"), {"role": "assistant"}]}, r"^messages\[1\]\.content: must be text, found nothing"),
    ({"messages": [user("x"), assistant("")]}, r"^messages\[1\]\.content: is empty"),
    ({"messages": [user("x"), {"content": "y"}]}, r"^messages\[1\]\.role: None is no role"),
    ({"messages": [user("x"), {"role": "tool", "content": "y"}]}, r"^messages\[1\]\.role: 'tool' is no role"),
    ({"messages": [user("x"), {"role": ["user"], "content": "y"}]}, r"^messages\[1\]\.role: \['user'\] is no role"),
    ({"messages": [user("x"), {"role": "assistant", "content": [{"text": "y"}]}]}, "must be text, found list"),
    ({"messages": [user("x")]}, "does not end with an answer"),
    ({"messages": [system("x")]}, "does not end with an answer"),
    ({"messages": [user("a"), assistant("b"), user("c")]}, "does not end with an answer"),
    ({"messages": [assistant("a")]}, "turn 1 is by assistant; user and assistant must alternate"),
    ({"messages": [system("s"), assistant("a")]}, "turn 1 is by assistant"),
    ({"messages": [user("a"), user("b"), assistant("c")]}, "turn 2 is by user"),
    ({"messages": [user("a"), assistant("b"), assistant("c")]}, "turn 3 is by assistant"),
    ({"messages": [user("a"), system("s"), assistant("c")]}, "turn 2 is by system"),
    ({"messages": [system("s"), system("s"), user("a"), assistant("c")]}, "turn 1 is by system"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 1}]}, r"\[1\]\.value: must be text"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, r"^conversations\[0\]\.from: 'narrator' is no role"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_ROWS)
def test_wrong_row(row, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row, "س")


def test_history_of_alpaca_rows():
    row = {
        "instruction": "والآن؟",
        "input": " ",
        "output": "نعم.",
        "history": [["مرحبا", "أهلًا"], ["كيف حالك؟", "بخير"]],
    }
    assert [m["content"] for m in to_conversation(row)] == ["مرحبا", "أهلًا", "كيف حالك؟", "بخير", "والآن؟", "نعم."]
    with pytest.raises(ValueError, match="history"):
        to_conversation(row | {"history": ["مرحبا"]})


def test_text_in_a_wrong_encoding_is_a_bad_row():
    broken = "العربية لغة جميلة".encode().decode("latin-1")
    with pytest.raises(RowError, match="response: was read in a wrong encoding") as raised:
        to_conversation({"instruction": "ما العربية؟", "response": broken})
    assert raised.value.code == "mojibake"
    assert to_conversation({"instruction": f"أصلح: {broken}", "response": "العربية لغة جميلة"})
