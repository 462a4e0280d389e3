"""The kinds of findings."""

from pathlib import Path

import pytest

from arabic_qwen.audit.findings import CODES

DOCS = Path(__file__).parents[2] / "docs" / "arabic_data.md"


@pytest.mark.parametrize("code", sorted(CODES))
def test_the_docs_explain_every_code(code):
    assert f"`{code}`" in DOCS.read_text(encoding="utf-8")
