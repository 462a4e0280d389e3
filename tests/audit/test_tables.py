import io

import pytest
from rich.console import Console

from arabic_qwen.audit.rows import Sample
from arabic_qwen.audit.statistics import RowTexts, Statistics
from arabic_qwen.audit.tables import bar, statistics_tables, tokens_tables
from arabic_qwen.audit.tokens import load_any_tokenizer, token_cost
from arabic_qwen.text.dialects import Prediction


class ByFirstLetter:
    def predict(self, texts):
        return [Prediction({"ا": "EGY", "م": "MSA"}.get(text[:1], "unknown"), 0.9) for text in texts]


def shown(tables, width=80):
    console = Console(file=io.StringIO(), width=width)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("share", "expected"), [(0, ""), (1, "████"), (0.5, "██"), (0.28, "█▏"), (0.001, ""), (0.999, "████")]
)
def test_bar(share, expected):
    assert bar(share, 4) == expected


def test_statistics_fit_a_terminal_of_80_columns():
    statistics = Statistics(ByFirstLetter())
    rows = [RowTexts("من هو؟", ("ابن بطوطة here", "لا")), RowTexts("من هو؟", ("مرحبا", "لا"), 2)]
    statistics.add(rows * 10_000)
    statistics.bad_rows = 1
    text = shown(statistics_tables(statistics))
    assert "20,000 rows, 100.0% of them copies of an earlier one, 50.0% with more than one question" in " ".join(
        text.split()
    )
    assert "1 bad row left out" in " ".join(text.split())
    assert "…" not in text
    assert "50.0% of answers in another dialect" in text
    assert "EGY" in text and "██" in text


def test_token_cost_says_what_changes_and_what_was_sampled():
    tokenizer = load_any_tokenizer("arabic-qwen-tiny")
    rows = [RowTexts("مـــرحبا", ("قسطنطينية",))]
    costs = token_cost(["مـــرحبا", "قسطنطينية"], {"a": tokenizer, "b": tokenizer}, ByFirstLetter())
    text = shown(tokens_tables(costs, Sample(rows=50, bad_rows=2, chosen=rows)))
    assert "a sample of 1 of 50 rows, 2 bad rows left out" in text
    assert "tatweel (1 text)" in text
    assert "joiners" not in text
    assert "cut up worst by b" in text and "قسطنطينية" in text
    text = shown(tokens_tables(token_cost(["نعم"], {"a": tokenizer}, ByFirstLetter()), Sample(rows=1, chosen=rows)))
    assert "no rule changes anything" in text


def test_scripts_are_ordered_by_all_sides():
    statistics = Statistics(ByFirstLetter())
    statistics.add([RowTexts("hello there", ("مرحبا x", "нет"))])
    text = shown(statistics_tables(statistics))
    assert text.index("  Latin") < text.index("  Cyrillic") < text.index("  Arabic")
