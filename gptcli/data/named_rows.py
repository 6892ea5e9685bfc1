"""The rows of a source with all their columns, each with the place where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.data.readers import BadRow, Layout, Row, readable_suffixes, shown
from gptcli.data.sources import FileInput, Reading, file_of, find_inputs, input_rows, mark, place
from gptcli.data.tokens import TokensInput
from gptcli.errors import DataError

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source


def named_rows(
    source: Source, column: str, name_it: str, where: str | None
) -> Iterator[tuple[str, Row | BadRow, Path]]:
    """Where each row of a source stands, the row, and the file by whose folder its media are found.

    Args:
        source: files with columns, or a Hub set.
        column: one that has to be there.
        name_it: the remedy where it is not; `{hint}` in it becomes the column that may be meant.
        where: the source in the recipe, for errors.

    Raises:
        DataError: the source has no rows with columns, or not that one.
    """
    columns = tuple(source.columns) if source.columns else None
    layout = Layout("line", column, columns, remedy=name_it, whole=True)
    for part in find_inputs(source, where=where):
        if isinstance(part, TokensInput) or (isinstance(part, FileInput) and part.builtin):
            raise DataError(
                f"{shown(part.path)} is no file of rows with columns",
                where=where,
                remedy=f"Read are {readable_suffixes()}.",
            )
        for row in input_rows(part, Reading(layout, "error", where)):
            yield place(part, mark(0, row), layout), row, file_of(part)
