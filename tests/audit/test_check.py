"""The doctor finds what was planted, where it was planted, and nothing on clean rows."""

import json
from pathlib import Path

import pytest

from arabic_qwen.audit.check import check, place_of
from arabic_qwen.audit.findings import CODES
from arabic_qwen.audit.fix import fix
from arabic_qwen.config import METHOD_CONFIGS
from arabic_qwen.data.sources import SAMPLES
from arabic_qwen.data.templates import set_template
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.methods.registry import METHODS

from .planted import DEFECTS, FILES, clean_row, write_planted


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def planted(tmp_path, standard_only):
    places = write_planted(tmp_path)
    return places, check([str(tmp_path / name) for name in FILES])


def test_every_code_is_planted():
    assert sorted(defect.code for defect in DEFECTS) == sorted(CODES)


def test_every_defect_is_found_once_at_its_place_and_nothing_else(planted):
    places, audit = planted
    found = {(finding.code, finding.file, finding.line) for finding in audit.findings}
    assert found == {(code, *place) for code, place in places.items()}
    assert len(audit.findings) == len(CODES) == audit.counts.total()


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.code)
def test_level_and_example(planted, defect):
    finding = next(finding for finding in planted[1].findings if finding.code == defect.code)
    assert finding.level == CODES[defect.code].level
    assert finding.message and finding.example
    assert defect.example in finding.example
    assert len(finding.example) < 160


def test_findings_are_in_the_order_of_files_and_lines(planted):
    places = [(finding.file, finding.line) for finding in planted[1].findings]
    order = list(dict.fromkeys(file for file, _ in places))
    assert places == sorted(places, key=lambda place: (order.index(place[0]), place[1]))


def test_findings_are_in_the_order_in_which_files_are_given(tmp_path):
    files = [
        write(tmp_path / "b.jsonl", [clean_row(1), clean_row(1)]),  # found at the end only
        write(tmp_path / "a.jsonl", [{"instruction": "من؟", "response": ""}]),
    ]
    assert [finding.code for finding in check(files).findings] == ["duplicate", "empty_answer"]


def test_counts_are_complete_where_fewer_findings_are_kept(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"instruction": f"سؤال {i}", "response": ""} for i in range(5)])
    audit = check([file], keep=2)
    assert audit.counts == {"empty_answer": 5} and len(audit.findings) == 2
    assert (audit.rows, audit.errors) == (5, 5)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_that_come_along_are_clean(name):
    audit = check([f"sample:{name}"])
    assert audit.findings == [] and audit.rows > 0


def test_clean_rows(tmp_path):
    audit = check([write(tmp_path / "a.jsonl", map(clean_row, range(200)))])
    assert audit.findings == []
    assert audit.statistics.rows == 200


def test_rows_that_differ_in_spelling_or_system_prompt_are_no_duplicates(tmp_path):
    row = {"instruction": "ما عاصمة الأردن؟", "response": "عمّان هي العاصمة", "system": "أجب بإيجاز"}
    others = [{**row, "system": "أجب بتفصيل"}, {**row, "response": "عمان هي العاصمه"}, {**row, "id": 3}]
    findings = check([write(tmp_path / "a.jsonl", [row, *others])]).findings
    assert [(finding.line, finding.code, finding.message) for finding in findings] == [
        (3, "near_duplicate", "is the same but for spelling as line 1"),
        (4, "duplicate", "is the same as line 1"),
    ]


def test_a_few_broken_words_are_a_warning(tmp_path):
    row = {"instruction": "ما الأمر؟", "response": "هذه جملة عربية سليمة طويلة ثم " + "كلمة".encode().decode("latin-1")}
    (finding,) = check([write(tmp_path / "a.jsonl", [row])]).findings
    assert (finding.code, finding.level) == ("mojibake", "warning")


def test_the_method_decides_what_is_an_error(tmp_path):
    file = write(
        tmp_path / "a.jsonl", [{"prompt": "ما عاصمة الأردن؟", "chosen": "عمّان", "rejected": ["إربد", "الزرقاء"]}]
    )
    assert check([file]).errors == 0
    assert check([file], "cpo").errors == 0
    assert check([file], "dpo").counts == {"broken_row": 1}
    with pytest.raises(ConfigurationError, match="--method: 'ppo' is unknown; choose one of sft, dpo"):
        check([file], "ppo")


def test_each_row_has_its_own_method(tmp_path):
    pair = {"prompt": "ما عاصمة الأردن؟", "chosen": "عمّان", "rejected": "إربد"}
    broken, row = {"text": "نص"}, {"instruction": "ما لون السماء؟", "response": "أزرق"}
    for name, rows in (("a", [broken, pair, row]), ("b", [row, pair])):
        file = write(tmp_path / f"{name}.jsonl", rows)
        assert check([file]).counts.total() == len(rows) - 2
        assert fix(file, tmp_path / f"{name}.out.jsonl").written == 2


def test_an_undesirable_answer_may_be_bad(tmp_path):
    row = {"prompt": "ما عاصمة الأردن؟", "completion": "كنموذج لغوي، لا أستطيع مساعدتك", "label": False}
    assert check([write(tmp_path / "a.jsonl", [row])]).findings == []
    assert check([write(tmp_path / "b.jsonl", [{**row, "label": True}])]).counts == {"refusal": 1}


def test_a_missing_file(tmp_path):
    with pytest.raises(DatasetError, match="no_such_file"):
        check([str(tmp_path / "no_such_file.jsonl")])


def test_rows_that_one_process_reads_need_no_torch(tmp_path):
    import subprocess
    import sys

    code = "import sys; from arabic_qwen.audit.check import check; check(['sample:sft']); print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout == "set()\n", run.stdout + run.stderr


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("أنت لا تمتلك الصلاحية لنقل هذه الصفحات إلى مكان آخر.", True),
        ("الملف ده فيه معلومات إضافية، غالبا ما تكون أضيفت من الكاميرا الديجيتال.", False),
        ("معندكش صلاحية تنقل الصفحات دي لمكان تاني.", False),
        ("عدد التعديلات في آخر المراجعات", False),  # could be either
    ],
)
def test_standard_arabic_where_a_dialect_is_asked_for(tmp_path, answer, wrong):
    row = {"instruction": "ترجم إلى العربية المصرية: You may not move these pages.", "response": answer}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert ("dialect_mismatch" in check([str(path)]).counts) == wrong


@pytest.mark.parametrize(("name", "method"), [("sft", "sft"), ("chat", "sft"), ("pairs", "dpo")])
def test_an_error_is_a_bad_row_of_training(planted, name, method, tokenizer, tmp_path):
    found = [finding for finding in planted[1].findings if Path(finding.file).stem == name]
    errors = {finding.line for finding in found if finding.level == "error"}
    config = METHOD_CONFIGS[method](
        dataset_path=found[0].file, max_bad_rows=100, validation_split=0, output_dir=tmp_path / "run"
    )
    set_template(tokenizer, "chatml", "")
    loader = METHODS[method].data_loader(config, tokenizer)
    loader.load()
    bad = {place_of(where)[1] for where in loader.bad_rows.places}
    # Tokens of its own tokenizer training refuses too.
    assert errors and bad - errors <= {finding.line for finding in found if finding.code == "template_tokens"}
    assert errors <= bad


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"instruction": "ما عاصمة قطر؟", "response": "\u200f"}, "empty_answer"),
        ({"instruction": "ما عاصمة قطر؟", "response": "ـــ"}, "empty_answer"),
        ({"prompt": "ما عاصمة البحرين؟", "chosen": "المنـــامة", "rejected": "المنامة"}, "equal_answers"),
        ({"instruction": "ما عاصمة قطر؟", "response": "الدوحة<|im_end|>"}, "template_tokens"),
    ],
)
def test_what_training_refuses_once_it_has_normalised_is_an_error(tmp_path, row, code):
    path = tmp_path / "rows.jsonl"
    write(path, [row])
    assert [(finding.code, finding.level) for finding in check([str(path)]).findings] == [(code, "error")]
