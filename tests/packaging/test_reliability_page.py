"""The audit in docs/reliability.md names tests that are there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY

ROWS = [
    line
    for line in (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    if "`tests/" in line
]


@pytest.mark.parametrize("row", ROWS)
def test_each_test_that_the_page_names_is_there(row: str) -> None:
    files = re.findall(r"`(tests/[\w/.]+\.py)`", row)
    assert files
    text = "\n".join((REPOSITORY / file).read_text(encoding="utf-8") for file in files)
    for name in re.findall(r"`(test_\w+)`", row):
        assert f"def {name}(" in text, name
