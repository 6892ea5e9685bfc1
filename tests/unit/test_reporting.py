from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.reporting import one_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("Ünïcödé 世界 👩‍👩‍👧", "Ünïcödé 世界 👩‍👩‍👧"),
        ("\x1b[31m", "␛[31m"),
        ("a\rb\x7f\x00", "a␍b␡␀"),
        ("\x9b2J", "\ufffd2J"),
        ("\udcff", "\\udcff"),
    ],
)
def test_control_characters_are_shown_as_pictures(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters(codec=None)))
def test_no_text_holds_what_a_terminal_acts_on_or_utf8_cannot(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    shown.encode("utf-8")
    assert visible(shown) == shown
    assert len(one_line(text).splitlines()) <= 1
