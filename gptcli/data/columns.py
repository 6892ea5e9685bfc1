"""Rows with columns: what `map:` makes of them, their values as texts, and parallel files of which each is a column.

What is wrong with a row is told as a sentence, which its place is put before: what is done with it is decided by
`data.on_bad_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gptcli.data.readers import BadRow, Layout, Row, Rows, read_rows, shown
from gptcli.data.reading.row import checked_row, kind_of, listed
from gptcli.errors import DataError
from gptcli.recipe.template import Template

Maps = Mapping[str, Mapping[str, Any]]


def mapped(row: dict[str, Any], maps: Maps) -> dict[str, Any] | str:
    """A row with the new values of the columns that `map:` is for, or the sentence that says what is wrong with it."""
    if not maps:
        return row
    values = dict(row)
    for column, names in maps.items():
        if column not in row:
            return f"has no column {column!r}, which map is for, only {listed(row)}"
        key = text_of(row[column])
        if key is None or key not in names:
            return f"column {column!r} holds {key!r}, which map does not know ({listed(names)})"
        values[column] = names[key]
    return values


def missing_text(row: dict[str, Any], columns: Iterable[str]) -> str | None:
    """What is wrong with a row of which columns are to be texts; None: nothing is."""
    for column in columns:
        if column not in row:
            return f"has no column {column!r}, only {listed(row)}"
        if text_of(row[column]) is None:
            return f"column {column!r} holds {what_of(row[column])}, not text"
    return None


def filled(template: Template, row: dict[str, Any]) -> str:
    """A template filled with a row that `missing_text` has nothing against."""
    return template.fill(lambda column: text_of(row[column]) or "")


def text_of(value: Any) -> str | None:
    """A text or a number as a text; None for anything else."""
    if isinstance(value, str):
        return value if value.isascii() or isinstance(checked_row(0, value), Row) else None
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else None


def what_of(value: Any) -> str:
    """What a value is that is no text, in words."""
    if isinstance(value, list):
        bad = [each for each in value if text_of(each) is None]
        return f"a list with {what_of(bad[0])}" if bad else "a list" if value else "an empty list"
    return "a lone surrogate" if isinstance(value, str) else kind_of(value)


def parallel_rows(
    files: Iterable[tuple[str, Path]], layout: Layout, *, on_position: Callable[[int], None] | None = None
) -> Rows:
    """The rows of plain text files (column, file), line by line; `on_position` is told the bytes read of the first.

    Raises:
        DataError: a file has fewer lines than another.
    """
    files = list(files)
    readers = [
        read_rows(
            path,
            replace(layout, text=column, whole=True),
            plain=True,
            on_position=None if number else on_position,
        )
        for number, (column, path) in enumerate(files)
    ]
    for number, lines in enumerate(zip_longest(*readers), start=1):
        if None in lines:
            raise DataError(
                f"has {number - 1:,} lines, and another file of this source has more",
                where=shown(files[lines.index(None)][1]),
                remedy="Line i of each file belongs to line i of the others.",
            )
        values: dict[str, Any] = {}
        bad: BadRow | None = None
        for (_, path), line in zip(files, lines, strict=True):
            if isinstance(line, BadRow):
                reason = line.reason if path == files[0][1] else f"{line.reason}, in {shown(path)}"
                bad = bad or replace(line, number=number, reason=reason)
            elif line is not None and line.values is not None:
                values |= line.values
        yield bad or Row(number, "", values=values)
