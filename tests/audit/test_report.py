import errno
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arabic_qwen.audit.check import Audit
from arabic_qwen.audit.findings import CODES, Finding
from arabic_qwen.audit.report import check_target, score, write_html, write_statistics_html
from arabic_qwen.audit.statistics import RowTexts, Statistics
from arabic_qwen.errors import ConfigurationError, OutputError
from arabic_qwen.text.dialects import Prediction

HOSTILE = "\"'></blockquote><script>alert(1)</script><img src=x onerror=alert(2)>\u202eعكس\u200f \x00\ud800&lt;"


def test_every_kind_of_finding_has_an_arabic_title():
    assert all(re.search("[\u0621-\u064a]", kind.arabic) for kind in CODES.values())


class Alternating:
    def predict(self, texts):
        return [Prediction("MSA" if len(text) % 2 else "EGY", 0.9) for text in texts]


def an_audit(example="مثال", findings=3):
    statistics = Statistics(Alternating())
    statistics.add([RowTexts("ما عاصمة مصر؟", ("القاهرة", "لا")), RowTexts("من؟", ("أَنَا here",), 2)])
    found = [
        Finding(code, CODES[code].level, f"a{example}.jsonl", line, f"why {example}", example)
        for code in CODES
        for line in range(findings)
    ]
    counts = Counter(finding.code for finding in found)
    return Audit(files=[f"a{example}.jsonl"], findings=found, counts=counts, rows=10_000, statistics=statistics)


class Checked(HTMLParser):
    """Tags and texts of a page; asserts that each tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(audit, folder):
    write_html(audit, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_right_to_left_and_alone(tmp_path):
    page = page_of(an_audit(), tmp_path)
    found = Checked(page)
    assert ("html", {"dir": "rtl", "lang": "ar"}) in found.tags
    assert not re.search(r"https?:|//|url\(|@import", page)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "form"}
    for code in CODES.values():
        assert code.title in found.texts
    assert str(score(an_audit())) in found.texts
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_hostile_text_is_shown_and_does_not_run(tmp_path):
    page = page_of(an_audit(HOSTILE), tmp_path)
    found = Checked(page)
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "<script>alert(1)</script>" in "".join(found.texts)
    for shown in ("U+202E", "U+200F", "U+0000", "U+D800"):
        assert shown in found.texts
    assert not re.search("[\u202e\u200f\x00]", page)


@settings(max_examples=30)
@given(st.text())
def test_any_text_gives_a_well_formed_page(tmp_path_factory, text):
    Checked(page_of(an_audit(text, 1), tmp_path_factory.mktemp("page")))


def test_size_is_bounded(tmp_path):
    page = page_of(an_audit("كلام طويل " * 10_000, findings=200), tmp_path)
    assert len(page.encode()) < 500_000


def test_a_clean_audit_says_so(tmp_path):
    audit = an_audit()
    audit.findings, audit.counts = [], Counter()
    assert "Nothing." in page_of(audit, tmp_path)
    assert score(audit) == 100


def test_page_of_statistics_alone(tmp_path):
    statistics = Statistics(Alternating())
    statistics.add([RowTexts("ا", ("ب",))])
    write_statistics_html(statistics, ["a.jsonl", *"bcdefgh"], tmp_path / "s.html")
    found = Checked((tmp_path / "s.html").read_text(encoding="utf-8"))
    assert "Data statistics" in found.texts
    assert "Findings" not in found.texts


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, 100),
        ({"empty_answer": 1}, 99),
        ({"empty_answer": 10}, 90),
        ({"refusal": 100}, 75),
        ({"tatweel": 100}, 90),
        ({"tatweel": 250}, 90),
        ({"refusal": 100, "tatweel": 100}, 67),
        ({"empty_answer": 100, "refusal": 100}, 0),
        ({"refusal": 1}, 99),
    ],
)
def test_score_by_the_formula(counts, expected):
    assert score(Audit(files=[], counts=Counter(counts), rows=100)) == expected


@given(st.dictionaries(st.sampled_from(sorted(CODES)), st.integers(0, 300)), st.sampled_from(sorted(CODES)))
def test_score_falls_with_each_finding(counts, code):
    before = score(Audit(files=[], counts=Counter(counts), rows=100))
    after = score(Audit(files=[], counts=Counter(counts) + Counter([code]), rows=100))
    assert 0 <= after <= before <= 100


def test_only_a_page_of_ours_is_overwritten(tmp_path):
    page_of(an_audit(), tmp_path)
    page_of(an_audit(), tmp_path)
    other = tmp_path / "thesis.html"
    other.write_text("<p>mine", encoding="utf-8")
    for path in (other, tmp_path, tmp_path / "none" / "a.html"):
        with pytest.raises(ConfigurationError, match=re.escape(f"--html {path}: ")):
            check_target(path)
    with pytest.raises(ConfigurationError):
        write_html(an_audit(), other)
    assert other.read_text(encoding="utf-8") == "<p>mine"


def test_a_page_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"a\.html: cannot be written \(No space left on device: about"):
        write_html(an_audit(), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
