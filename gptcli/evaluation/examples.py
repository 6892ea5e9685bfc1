"""The rows of a task: what the model is asked, and what is right, from the columns of files.

Rows are those of JSON lines, CSV, TSV and parquet, or of plain text files that go line by line together. What is wrong
with a row ends the reading, or with `data.on_bad_row: skip` is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.readers import BadRow, Layout, Row, has_records, read_records, record_suffixes, shown
from gptcli.data.reading.row import checked_row, kind_of, listed
from gptcli.data.sources import FileInput, find_inputs
from gptcli.errors import DataError, UsageError
from gptcli.recipe.template import Template

if TYPE_CHECKING:
    from gptcli.evaluation.corpus import Corpus
    from gptcli.recipe.schema import Source
    from gptcli.reporting import Reporter

_NAME_IT = "Name the columns there are in eval.prompt, for example eval.prompt: '{{hint}}'"
_MEND = "Mend it, or leave such rows out: data.on_bad_row: skip (they are counted)."
Read = Iterator[tuple[str, dict[str, Any] | str]]  # where a row stands, and its columns or what is wrong with it


@dataclass(frozen=True)
class Asked:
    """Which columns are read, and what they must hold.

    Attributes:
        prompt: the template of what the model is asked.
        references: the column of what is right; None: nothing is compared.
        check: what is wrong with the references of a row, if anything is.
    """

    prompt: Template
    references: str | None
    check: Callable[[tuple[str, ...]], str | None] = lambda references: None


@dataclass(frozen=True)
class Example:
    """A row: `where` is its file and line, `references` what is right, at least one where any is asked for."""

    where: str
    prompt: str
    references: tuple[str, ...]


def read_examples(corpus: Corpus, asked: Asked, reporter: Reporter) -> list[Example]:
    """The rows of a corpus, at most as many as its limit.

    Raises:
        UsageError: the corpus has no rows: it is what a recipe holds out of its training data.
        DataError: no row at all, or one that does not have what is asked for, by file and line.
    """
    if not corpus.sources:
        raise UsageError(
            "tasks are measured on rows of files, and the recipe names none",
            remedy="Name a file: eval.data: {path: test.jsonl}, or gptcli eval MODEL RECIPE --data FILE",
        )
    skipped: list[str] = []
    found = list(islice(_examples(corpus, asked, skipped), corpus.limit))
    if skipped:
        reporter.warn(f"{len(skipped):,} rows were left out (data.on_bad_row: skip); the first: {skipped[0]}")
    if not found:
        raise DataError(f"no row to score in {corpus.name}", remedy="Give a file with rows.")
    return found


def _examples(corpus: Corpus, asked: Asked, skipped: list[str]) -> Iterator[Example]:
    for source, where in corpus.sources:
        for place, row in islice(_rows(source, asked.prompt, where), source.limit):
            made = row if isinstance(row, str) else _example(place, row, source, asked)
            if isinstance(made, Example):
                yield made
            elif corpus.on_bad_row == "skip":
                skipped.append(f"{place} {made}")
            else:
                raise DataError(made, where=place, remedy=_MEND)


def _example(place: str, row: dict[str, Any], source: Source, asked: Asked) -> Example | str:
    """The example of a row, or the sentence that says what is wrong with it."""
    values = dict(row)
    for column, names in (source.map or {}).items():
        if column not in row:
            return f"has no column {column!r}, which map is for, only {listed(row)}"
        key = _text(row[column])
        if key not in names:
            return f"column {column!r} holds {key!r}, which map does not know ({listed(names)})"
        values[column] = names[key]
    for column in asked.prompt.columns:
        if column not in values:
            return f"has no column {column!r}, only {listed(row)}"
        if _text(values[column]) is None:
            return f"column {column!r} holds {_what(values[column])}, not text"
    references: tuple[str, ...] = ()
    if asked.references is not None:
        if asked.references not in values:
            return f"has no column {asked.references!r}, only {listed(row)}"
        given = values[asked.references]
        texts = [_text(each) for each in (given if isinstance(given, list) else [given])]
        if not texts or None in texts:
            return f"column {asked.references!r} holds {_what(given)}, no reference"
        references = tuple(text for text in texts if text is not None)
        if (wrong := asked.check(references)) is not None:
            return f"column {asked.references!r}: {wrong}"
    return Example(place, asked.prompt.fill(lambda column: _text(values[column]) or ""), references)


def _text(value: Any) -> str | None:
    """A text or a number as a text; None for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if isinstance(checked_row(0, value), Row) else None
    return str(value) if isinstance(value, int | float) else None


def _what(value: Any) -> str:
    if isinstance(value, list):
        return f"a list with {_what(next(each for each in value if _text(each) is None))}" if value else "an empty list"
    return "a lone surrogate" if isinstance(value, str) else kind_of(value)


def _rows(source: Source, template: Template, where: str | None) -> Read:
    if isinstance(source.path, dict):
        yield from _parallel({column: Path(path) for column, path in source.path.items()})
        return
    first = next(column for column in template.columns)
    layout = Layout("line", first, tuple(source.columns) if source.columns else None, remedy=_NAME_IT)
    for part in find_inputs(source, where=where):
        if not isinstance(part, FileInput) or part.builtin or not has_records(part.name):
            name = shown(part.path) if isinstance(part, FileInput) else str(source.path)
            raise DataError(
                f"{name} is no file of rows with columns", where=where, remedy=f"Read are {record_suffixes()}."
            )
        yield from _file_rows(part.path, layout)


def _file_rows(path: Path, layout: Layout, *, plain: bool = False) -> Read:
    for record in read_records(path, layout, plain=plain):
        place = f"{shown(path)}:{record.number}"
        yield place, record.reason if isinstance(record, BadRow) else json.loads(record.line)


def _parallel(paths: dict[str, Path]) -> Read:
    """The rows of plain text files of which each is a column, line by line."""
    files = [_file_rows(path, Layout("line", column), plain=True) for column, path in paths.items()]
    for number, lines in enumerate(zip_longest(*files), start=1):
        if ended := next((path for path, line in zip(paths.values(), lines, strict=True) if line is None), None):
            raise DataError(
                f"has {number - 1:,} lines, and another file of this source has more",
                where=shown(ended),
                remedy="Line i of each file belongs to line i of the others.",
            )
        row: dict[str, Any] = {}
        bad = None
        for place, line in lines:
            if isinstance(line, str):
                bad = bad or (place, line)
            else:
                row |= line
        yield bad or (lines[0][0], row)
