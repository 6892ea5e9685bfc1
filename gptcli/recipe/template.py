"""Texts with columns in them: `Translate: {en}` filled with a row. Plain substitution, and `{{` is a brace."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

PROMPT = "{prompt}"  # of rows that hold their prompt


@dataclass(frozen=True)
class Template:
    """Pieces of text, each with the column that follows it (None: nothing does)."""

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in it, in their order, each once."""
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))

    def fill(self, text_of: Callable[[str], str]) -> str:
        """The text with what `text_of` gives for each column."""
        return "".join(text + ("" if column is None else text_of(column)) for text, column in self.pieces)


def parse_template(text: str) -> Template:
    """Raise `ValueError` with the reason where a text is no template, or has no column in it."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces that are no column's") from None
    for _, column, spec, conversion in parsed:
        if column == "":
            raise ValueError("{} names no column")
        if spec or conversion:
            raise ValueError(f"{{{column}}} is filled in as it is; leave out what follows its name")
    found = Template(tuple((literal, column) for literal, column, _, _ in parsed))
    if not found.columns:
        raise ValueError("no column in it, so every row would be the same text; write {NAME}")
    return found
