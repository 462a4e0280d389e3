"""data dialects and fit-dialects: counts, drift, examples, and a classifier of one's own."""

import json

import pytest

from arabic_qwen.audit.dialects import dialect_report, fit_file
from arabic_qwen.audit.statistics import RowTexts
from arabic_qwen.data.bad_rows import BadRow
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.text.dialects import UNKNOWN, Prediction, load_classifier
from tests.audit.test_split import write
from tests.commands.test_cli import in_process
from tests.text.test_dialects import EGYPTIAN, GULF


class FirstWord:
    def predict(self, texts):
        return [Prediction(text.split()[0], len(text) / 100) for text in texts]


def test_report_counts_drift_and_keeps_the_surest_examples():
    rows = [RowTexts("EGY سؤال", (f"EGY {'ج' * n}", "GLF لا")) for n in range(1, 6)]
    rows += [RowTexts("MSA سؤال", ("EGY جواب",)), RowTexts(f"{UNKNOWN} سؤال", ("MSA جواب",))]
    report = dialect_report([*rows, BadRow("a.jsonl:9", "is empty", {})], FirstWord())
    assert (report.rows, report.bad_rows) == (7, 1)
    assert report.prompts == {"EGY": 5, "MSA": 1, UNKNOWN: 1}
    assert report.answers == {"EGY": 6, "MSA": 1}
    assert report.drift_share == pytest.approx(1 / 6)
    assert report.as_dict()["drift"]["MSA"] == {"EGY": 1}
    assert [len(text) for _, text in report.examples["EGY"]] == [9, 8, 8]


def test_no_rows_have_no_drift():
    assert dialect_report([], FirstWord()).drift_share is None


@pytest.fixture
def labelled(tmp_path):
    rows = [{"text": text, "dialect": "EGY", "source": f"s{n % 5}"} for n, text in enumerate(EGYPTIAN)]
    rows += [{"text": text, "dialect": "GLF", "source": f"s{n % 5}"} for n, text in enumerate(GULF)]
    return write(tmp_path / "labelled.jsonl", rows)


def test_fit_file_holds_out_sources(labelled, tmp_path):
    out = tmp_path / "own.safetensors"
    scores, held_out = fit_file(labelled, out, "text", "dialect")
    assert held_out == "sources"
    assert [score.dialect for score in scores] == ["EGY", "GLF"]
    assert load_classifier(str(out)).predict(["انا مش عايز حاجة"])[0].dialect == "EGY"


def test_fit_file_without_sources_holds_out_texts(tmp_path):
    rows = [{"sentence": text, "country": "EGY"} for text in EGYPTIAN]
    rows += [{"sentence": text, "country": "GLF"} for text in GULF]
    file = write(tmp_path / "labelled.jsonl", rows)
    _, held_out = fit_file(file, tmp_path / "own.safetensors", "sentence", "country")
    assert held_out == "texts"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "انا مش عايز"}, r":1: has no text in column 'text' \(columns: sentence\); name it with --text"),
        ({"text": "انا مش عايز"}, r":1: has no text in column 'dialect' .*--label"),
        ({"text": "انا مش عايز", "dialect": "Cairo"}, r":1: 'Cairo' in column 'dialect' is no dialect; use MSA"),
        (["no object"], ":1: must be a JSON object"),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, row, message):
    with pytest.raises(DatasetError, match=message):
        fit_file(write(tmp_path / "labelled.jsonl", [row]), tmp_path / "own.safetensors", "text", "dialect")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.npz", "ends in .safetensors"),
        ("there.safetensors", "exists already"),
        ("no/own.safetensors", "there is no folder"),
    ],
)
def test_places_that_cannot_be_written(labelled, tmp_path, name, message):
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ConfigurationError, match=message):
        fit_file(labelled, tmp_path / name, "text", "dialect")


def test_verbs(labelled, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own.safetensors"
    code, out, _ = in_process(monkeypatch, capsys, "data", "fit-dialects", labelled, own)
    assert code == 0 and "F1" in out and "held-out sources" in out

    code, out, _ = in_process(monkeypatch, capsys, "data", "dialects", "sample:sft", "--json")
    report = json.loads(out)
    assert code == 0 and report["rows"] == 240 and {"MSA", "EGY", "MAG"} <= set(report["answers"])

    code, out, _ = in_process(monkeypatch, capsys, "data", "dialects", "sample:sft", "--model", own)
    assert code == 0 and "question" in out

    code, out, _ = in_process(monkeypatch, capsys, "data", "split", "sample:sft", tmp_path / "parts")
    assert code == 0 and "validation.jsonl" in out

    code, _, err = in_process(monkeypatch, capsys, "data", "dialects", "sample:sft", "--model", labelled)
    assert code == 2 and "holds no dialect classifier" in err
