"""The rows of files with columns, for preference data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptcli.data.readers import BadRow, Layout, has_records, read_records, record_suffixes, shown
from gptcli.data.sources import FileInput, find_inputs
from gptcli.errors import DataError

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source

_NAME_IT = "Name the columns there are in data.preference, for example data.preference: {{prompt: {hint}}}"


def rows_of(source: Source, column: str, where: str | None) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Where each row of a source stands, and its columns, or the sentence that says what is wrong with it.

    Raises:
        DataError: a file that has no rows with columns, or not the `column` at all.
    """
    layout = Layout("line", column, tuple(source.columns) if source.columns else None, remedy=_NAME_IT)
    for part in find_inputs(source, where=where):
        if not isinstance(part, FileInput) or part.builtin or not has_records(part.name):
            name = shown(part.path) if isinstance(part, FileInput) else str(source.path)
            raise DataError(
                f"{name} is no file of rows with columns", where=where, remedy=f"Read are {record_suffixes()}."
            )
        for record in read_records(part.path, layout):
            place = f"{shown(part.path)}:{record.number}"
            yield place, record.reason if isinstance(record, BadRow) else json.loads(record.line)
