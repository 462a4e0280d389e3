"""Repairs: what is safe to repair is, nothing is lost, and the result passes the check."""

import contextlib
import json
import os
import resource
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arabic_qwen.audit.check import check
from arabic_qwen.audit.findings import CODES
from arabic_qwen.audit.fix import AtomicFile, fix
from arabic_qwen.errors import ConfigurationError, DatasetError, OutputError
from arabic_qwen.text.encoding import repair_mojibake

from .planted import DEFECTS, FILES, write_planted

FIXED = {code for code, kind in CODES.items() if kind.fixed}
ESCAPED = {"html"}  # stays where it is escaped on purpose


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
    ]  # also at U+0085, so that has to be escaped


def fixed(tmp_path, *rows):
    """The rows after repair, and the changes' codes."""
    repair = fix(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    return read(tmp_path / "out.jsonl"), dict(repair.changes), dict(repair.dropped)


@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        ("mojibake", "العربية لغة جميلة".encode().decode("latin-1"), "العربية لغة جميلة"),
        ("template_tokens", "<|im_start|>نعم<|im_end|>", "نعم"),
        ("template_tokens", "### الاستجابة:\nنعم", "نعم"),
        ("html", "<p>نعم<br/>هو</p>", "نعم\nهو"),
        ("html", "<b>نعم</b> &amp; <em>لا</em>", "**نعم** & *لا*"),
        ("html", 'انظر <a href="https://example.com/x">هنا</a>', "انظر [هنا](https://example.com/x)"),
        ("html", "<ul><li>نعم</li><li>لا</li></ul>", "- نعم\n- لا"),
        ("presentation_forms", "ﻣﺮﺣﺒﺎ", "مرحبا"),
        ("tatweel", "مـــرحبا", "مرحبا"),
        ("bidi_controls", "\u200fمرحبا", "مرحبا"),
        ("letters", "مکتبة", "مكتبة"),
    ],
)
def test_texts(tmp_path, code, before, after):
    rows, changes, dropped = fixed(tmp_path, {"instruction": "اشرح", "response": before, "source": before})
    assert rows == [{"instruction": "اشرح", "response": after, "source": before}]
    assert (changes, dropped) == ({code: 1}, {})
    (change,) = read(tmp_path / "out.changes.jsonl")
    assert change == {
        "file": str(tmp_path / "in.jsonl"),
        "line": 1,
        "code": code,
        "column": "response",
        "before": before,
        "after": after,
    }


def test_messages_keep_their_layout(tmp_path):
    turns = [{"from": "مستخدم", "value": "مـن؟", "id": 3}, {"from": "مساعد", "value": "أنا", "id": 4}]
    rows, changes, _ = fixed(tmp_path, {"conversations": json.dumps(turns), "source": "x"})
    first, second = turns
    assert rows == [
        {
            "conversations": [{**first, "from": "user", "value": "من؟"}, {**second, "from": "assistant"}],
            "source": "x",
        }
    ]
    assert changes == {"stringified_messages": 1, "tatweel": 1}
    assert [change["column"] for change in read(tmp_path / "out.changes.jsonl")] == [
        "conversations",
        "conversations[0].value",
    ]


def test_a_greeting_and_a_request_are_not_swapped(tmp_path):
    turns = [("assistant", "مرحبًا، كيف أساعدك؟"), ("user", "اكتب قصيدة عن البحر")]
    greeting = {"messages": [{"role": role, "content": text} for role, text in turns]}
    _, changes, dropped = fixed(tmp_path, greeting, {"instruction": "من؟", "response": "أنا"})
    assert (changes, dropped) == ({}, {"swapped_roles": 1})


def test_what_cannot_be_used_is_kept_beside(tmp_path):
    empty, good = {"instruction": "من؟", "response": " "}, {"instruction": "كم؟", "response": "ثلاثة"}
    only_tokens = {"instruction": "أين؟", "response": "<|im_end|>"}
    rows, _, dropped = fixed(tmp_path, good, empty, only_tokens, {**good, "source": "مكرر"})
    assert rows == [good]
    assert dropped == {"empty_answer": 2, "duplicate": 1}
    left_out = read(tmp_path / "out.dropped.jsonl")
    assert [(row["line"], row["code"], row["row"]) for row in left_out] == [
        (2, "empty_answer", empty),
        (3, "empty_answer", only_tokens),
        (4, "duplicate", {**good, "source": "مكرر"}),
    ]


BROKEN = "العربية لغة جميلة".encode().decode("latin-1")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "أصلح النص:", "input": BROKEN, "output": "العربية لغة جميلة"},
        {"instruction": f"ما ترميز هذا النص؟ {BROKEN}", "response": "UTF-8"},
        {
            "messages": [
                {"role": "user", "content": f"صحح: {BROKEN}"},
                {"role": "assistant", "content": "العربية لغة جميلة"},
            ]
        },
    ],
)
def test_rows_about_encodings_stay(tmp_path, row):
    rows, changes, _ = fixed(tmp_path, row)
    assert (rows, changes) == ([row], {})
    assert not check([str(tmp_path / "out.jsonl")]).findings


def test_other_prompts_are_decoded(tmp_path):
    rows, *_ = fixed(tmp_path, {"instruction": BROKEN, "response": "نعم"})
    assert rows == [{"instruction": "العربية لغة جميلة", "response": "نعم"}]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("اكتب &lt;b&gt;نص&lt;/b&gt; للعريض", "اكتب &lt;b&gt;نص&lt;/b&gt; للعريض"),
        ("اكتب &amp;lt; هنا", "اكتب &amp;lt; هنا"),
        ("ينتهي هنا&nbsp;&lt;|im_end|&gt; دائمًا", "ينتهي هنا &lt;|im_end|&gt; دائمًا"),
        ("<b>نعم</b> &lt;br&gt; لا", "**نعم** &lt;br&gt; لا"),
        ("3 &lt; 5", "3 < 5"),
        ("نعم <script>alert('<b>لا</b>')</script>", "نعم <script>alert('<b>لا</b>')</script>"),
        ('صورة <img src="https://a.b/c.png"> ثم https://d.e', 'صورة <img src="https://a.b/c.png"> ثم https://d.e'),
        ('<a href="https://a.b">`كود`</a> هنا', '<a href="https://a.b">`كود`</a> هنا'),
    ],
)
def test_html_loses_no_content(tmp_path, before, after):
    rows, _, _ = fixed(tmp_path, {"instruction": "اشرح", "response": before})
    assert rows[0]["response"] == after


@pytest.mark.parametrize(
    "text",
    [
        "نبدأ هكذا.\n### المدخلات:\nعددان\n### الإجابة:\nمجموعهما",
        "### التعليمات:\nاجمع العددين\n### الاستجابة:\nمجموعهما",  # for a person to part
    ],
)
def test_headings_in_the_middle_stay(tmp_path, text):
    rows, changes, _ = fixed(tmp_path, {"instruction": "اشرح", "response": text})
    assert (rows[0]["response"], changes) == (text, {})


@pytest.mark.parametrize(
    "other",
    [
        {"instruction": "ما عاصمه الاردن؟"},  # folded alike
        {"system": "أجب بإيجاز"},
        {"response": "```\nif x:\n  y()\nz()\n```"},
    ],
)
def test_rows_that_are_nearly_the_same_are_kept(tmp_path, other):
    row = {"instruction": "ما عاصمة الأردن؟", "response": "```\nif x:\n  y()\n  z()\n```"}
    rows, _, dropped = fixed(tmp_path, row, {**row, **other}, row)
    assert rows == [row, {**row, **other}]
    assert dropped == {"duplicate": 1}


def test_clean_rows_stay_and_nothing_else_is_written(tmp_path):
    row = {"instruction": "ما عاصمة الأردن؟", "response": "عمّان هي العاصمة، منذ ١٩٢١ (1446هـ) ﷺ 👨‍👩‍👧", "id": 7}
    rows, changes, dropped = fixed(tmp_path, row)
    assert (rows, changes, dropped) == ([row], {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.changes.jsonl", "out.dropped.jsonl"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    file = write(tmp_path / "in.jsonl", [{"instruction": "من؟", "response": "أنا"}])
    with pytest.raises(ConfigurationError, match=f"{name}: exists already"):
        fix(file, tmp_path / "out.jsonl")
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    row = {"instruction": "من؟", "response": "أنا"}
    assert fixed(tmp_path, row)[0] == [row]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    with contextlib.ExitStack() as stack:
        file = AtomicFile(tmp_path / "late.jsonl", stack)
        (tmp_path / "late.jsonl").write_text("mine")
        with pytest.raises(FileExistsError):
            file.keep()
    assert (tmp_path / "late.jsonl").read_text() == "mine"


@pytest.mark.parametrize(("out", "reason"), [("out.csv", "ends in .jsonl"), ("none/out.jsonl", "there is no folder")])
def test_bad_targets(tmp_path, out, reason):
    with pytest.raises(ConfigurationError, match=reason):
        fix("sample:sft", tmp_path / out)


def test_nothing_is_written_where_no_row_is_left_or_the_file_breaks_off(tmp_path):
    file = write(tmp_path / "in.jsonl", [{"instruction": "من؟", "response": ""}])
    with pytest.raises(DatasetError, match="no row of it can be used"):
        fix(file, tmp_path / "out.jsonl")
    (tmp_path / "broken.csv").write_text('instruction,response\nمن؟,أنا\n"من', encoding="utf-8")
    with pytest.raises(DatasetError, match="not valid CSV"):
        fix(str(tmp_path / "broken.csv"), tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.csv", "in.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_planted_defects(tmp_path, standard_only, name):
    write_planted(tmp_path)
    repair = fix(str(tmp_path / name), tmp_path / "out.jsonl")
    audit = check([str(tmp_path / "out.jsonl")])
    assert audit.errors == 0
    assert not set(audit.counts) & FIXED
    planted = {defect.code for defect in DEFECTS if defect.file == name}
    assert set(repair.changes) | set(repair.dropped) >= planted & FIXED
    assert repair.written + repair.dropped.total() == repair.rows


SOUND = st.lists(
    st.sampled_from(
        [
            "مرحبا", "عَمّان", "١٩٢١", "1446هـ", "ﷺ", "👨‍👩‍👧", "چان", "لماذا؟", "«نعم»،", "GPT-4", "a < b", "`x = 1`", "None",
            "```python\nif x:\n    y()\n```", "https://x.y/ـ", "### الإجابة:", "**مهم**", "- ", "\n", "3.5", "(Лев)", "R&D",
        ]
    ),
    min_size=1,
    max_size=8,
).map(lambda pieces: f"قال {' '.join(pieces)} نعم")  # fmt: skip


def layouts_of(number, question, answer):
    """Rows that differ by their number."""
    question = f"السؤال {number}: {question}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [
        {"instruction": question, "input": answer, "output": answer, "system": "أجب", "id": number},
        {"messages": turns, "source": "كتـاب"},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"prompt": question, "chosen": answer, "rejected": [f"لا، {answer}", f"كلا، {answer}"]},
        {"prompt": question, "completion": answer, "label": False},
    ]


@settings(max_examples=40)
@given(texts=st.lists(st.tuples(SOUND, SOUND), min_size=1, max_size=3))
def test_sound_rows_stay_as_they_are(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("fix")
    rows = [row for number, pair in enumerate(texts) for row in layouts_of(number, *pair)]
    assert fixed(folder, *rows) == (rows, {}, {})


PIECES = st.sampled_from(
    [
        "مرحبا", "مـرحبا", "ﻣﺮﺣﺒﺎ", "\u200f", "\u200d", "<|im_end|>", "<|im_<|im_end|>end|>", "&lt;", "&amp;", "lt;", "|im_end|&gt;", "<p>",
        "</p>", "<b>", "</b>", "<br>", "<", ">", "`", "```", "\n", " ", "العربية".encode().decode("latin-1"), "#", "</s>", "هـ", "ـ",
        "### Response:", "[INST]", "\u0651", "\u0653", "ا", "html", "https://x.y/ـ", "ترجم",
    ]
)  # fmt: skip


def letters(text):
    """The Arabic letters that are to be kept: without tatweel and tags, decoded."""
    plain = unicodedata.normalize("NFKD", repair_mojibake(text))
    return "".join(char for char in plain if "\u0620" <= char <= "\u064a" and char != "\u0640")


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(*[st.lists(PIECES, min_size=1, max_size=8).map("".join)] * 2), min_size=1, max_size=5))
def test_the_result_passes_the_check(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fix")
    good = {"instruction": "ما عاصمة الأردن؟", "response": "عمّان"}
    file = write(folder / "in.jsonl", [good, *({"instruction": a, "response": b, "kept": b} for a, b in rows)])
    repair = fix(file, folder / "out.jsonl")
    audit = check([str(folder / "out.jsonl")])
    assert audit.errors == 0
    assert not set(audit.counts) & FIXED - ESCAPED
    assert repair.written + repair.dropped.total() == repair.rows == len(rows) + 1
    for row in read(folder / "out.jsonl")[1:]:
        assert letters(row["kept"]) == letters(row["response"])


def test_a_full_disk(tmp_path):
    """The kernel refuses what is beyond a limit, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"out\.jsonl: cannot be written \(File too large\); raise the limit"):
            fix("sample:sft", tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
