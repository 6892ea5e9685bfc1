"""Columns that a recipe names and no source has, told before anything is tokenized: from the first rows of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from gptcli.data.formats import RowFormat
from gptcli.data.hub import HubSet
from gptcli.data.readers import Row
from gptcli.data.reading.row import listed, nearest
from gptcli.data.sources import Input, Reading, input_rows
from gptcli.errors import RecipeError

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe

LOOKED_AT = 100  # JSON rows may leave columns out


def check_columns(loaded: LoadedRecipe, parts: Sequence[tuple[Sequence[Input], Reading]]) -> None:
    """Raise `RecipeError`, at the place of its template, for a column that no source has.

    Nothing is said of Hub sets, and where a first file has rows that cannot be read: that is told when they are.
    """
    formats = [reading.format for _, reading in parts if reading.format is not None]
    if not formats:
        return
    found: dict[str, None] = {}
    for inputs, reading in parts:
        first = _first_columns(inputs[0], reading)
        if first is None:
            return
        found |= dict.fromkeys(first)
    for key, columns in _wanted(formats[0]):
        for column in columns:
            if column not in found:
                near = nearest(column, found)
                raise RecipeError(
                    f"{key}: no source has a column {column!r}, only {listed(found)}",
                    where=loaded.where(key),
                    remedy=f"Did you mean {near}?" if near else "Name one of these.",
                )


def _wanted(row_format: RowFormat) -> list[tuple[str, tuple[str, ...]]]:
    media = [(f"data.{kind}s", columns) for kind, columns in row_format.media]
    if row_format.kind == "chat":
        return [("data.messages", row_format.columns), *media]
    asked = tuple(column for column in row_format.prompt.columns if column in row_format.columns)
    return [("data.prompt", asked), ("data.completion", row_format.completion.columns), *media]


def _first_columns(part: Input, reading: Reading) -> list[str] | None:
    if isinstance(part, HubSet):
        return None
    layout = replace(reading.layout, text="", needed=None)
    columns: dict[str, None] = {}
    for row in islice(input_rows(part, replace(reading, layout=layout, format=None)), LOOKED_AT):
        if not isinstance(row, Row) or row.values is None or "" in row.values:  # "": lines, called as they are needed
            return None
        columns |= dict.fromkeys(row.values)
    return list(columns) or None
