"""Tables a line a row: JSON lines, CSV and TSV. A bad row costs that row only, the ones after it are read.

A missing column is an error of the file where a header says so, and of the row in JSON, whose rows name their own.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

from gptcli.data.reading.row import (
    BadRow,
    Layout,
    Part,
    Record,
    Records,
    Row,
    Rows,
    kind_of,
    listed,
    object_row,
    require_column,
    value_row,
    whole_row,
)
from gptcli.data.reading.streams import raw_lines, text_lines
from gptcli.errors import DataError

_raw_decode = json.JSONDecoder().raw_decode


def jsonl_rows(part: Part, layout: Layout) -> Rows:
    """The rows of JSON lines; lines of nothing but white space are left out."""
    column = layout.text
    if layout.whole:
        yield from _whole_jsonl(part)
        return
    for first, lines, _ in text_lines(part):
        for number, line in enumerate(lines, first):
            if isinstance(line, BadRow):
                yield line
            elif line and not line.isspace():
                # json.loads takes twice as long for a short line, all of it around the parser.
                try:
                    value, end = _raw_decode(line)
                except (ValueError, RecursionError):
                    yield _json_row(number, line, column)
                    continue
                if end != len(line):
                    yield _json_row(number, line, column)
                elif value.__class__ is dict and (text := value.get(column)).__class__ is str and text.isascii():
                    yield Row(number, text)
                else:
                    yield _value_row(number, value, column)


def _whole_jsonl(part: Part) -> Rows:
    for first, lines, _ in text_lines(part):
        for number, line in enumerate(lines, first):
            if isinstance(line, BadRow):
                yield line
            elif line and not line.isspace():
                try:
                    yield whole_row(number, json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield BadRow(number, "not JSON", f"is not a JSON object ({error})")


def _json_row(number: int, line: str, column: str) -> Row | BadRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(number, "not JSON", f"is not a JSON object ({error})")
    return _value_row(number, value, column)


def _value_row(number: int, value: Any, column: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(number, "not JSON", f"is not a JSON object but {kind_of(value)}")
    return object_row(number, value, column)


def tsv_rows(part: Part, layout: Layout) -> Rows:
    """The rows of tab-separated values without quoting, as they are written in practice."""
    if layout.whole:
        return _whole(_tsv(part), layout, part.place)
    return _table(_tsv(part), layout, part.place)


def tsv_records(part: Part, layout: Layout) -> Records:
    """The whole rows of tab-separated values."""
    return _as_records(_whole(_tsv(part), layout, part.place), layout.text)


def csv_rows(part: Part, layout: Layout) -> Rows:
    """The rows of CSV, in which a quoted field may hold line ends."""
    if layout.whole:
        return _whole(_csv(part), layout, part.place)
    return _table(_csv(part), layout, part.place)


def csv_records(part: Part, layout: Layout) -> Records:
    """The whole rows of CSV."""
    return _as_records(_whole(_csv(part), layout, part.place), layout.text)


def jsonl_records(part: Part, layout: Layout) -> Records:
    """The whole rows of JSON lines, as they are written there; lines of nothing but white space are left out."""
    for first, lines, _ in text_lines(part):
        for number, line in enumerate(lines, first):
            if isinstance(line, BadRow):
                yield line
            elif line and not line.isspace():
                row = _json_row(number, line, layout.text)
                yield row if isinstance(row, BadRow) else Record(number, row.text, line.strip())


def _tsv(part: Part) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(raw_lines(part), start=1):
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
        if text:
            yield number, text.split("\t")


def _csv(part: Part) -> Iterator[tuple[int, list[str] | str]]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 pass as lone surrogates, so that one bad row does not end the reading of the file.
    lines = (line.decode("utf-8", "surrogateescape") for line in raw_lines(part))
    reader = csv.reader(lines, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, str(error)
            continue
        if record:
            yield number, record


def _table(records: Iterator[tuple[int, Any]], layout: Layout, place: str) -> Rows:
    chosen = None
    for number, columns, record in _records(records, layout, place):
        if isinstance(record, BadRow):
            yield record
        else:
            chosen = columns.index(layout.text) if chosen is None else chosen
            yield value_row(number, record[chosen], layout.text)


def _whole(records: Iterator[tuple[int, Any]], layout: Layout, place: str) -> Rows:
    for number, columns, record in _records(records, layout, place):
        if isinstance(record, BadRow):
            yield record
            continue
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise DataError(f"the header has more than one column {twice!r}", where=f"{place}:1")
        checked = [value_row(number, value, name) for name, value in zip(columns, record, strict=True)]
        bad = next((value for value in checked if isinstance(value, BadRow)), None)
        yield bad or Row(number, "", values=dict(zip(columns, record, strict=True)))


def _as_records(rows: Rows, column: str) -> Records:
    for row in rows:
        if isinstance(row, BadRow):
            yield row
        else:
            assert row.values is not None
            yield Record(row.number, row.values[column], json.dumps(row.values, ensure_ascii=False))


def _records(
    records: Iterator[tuple[int, Any]], layout: Layout, place: str
) -> Iterator[tuple[int, list[str], list[str] | BadRow]]:
    """(number, columns, record) of each row; a row that does not fit the columns is a `BadRow` in its place."""
    columns: list[str] | None = None
    if layout.columns is not None:
        columns = list(layout.columns)
        require_column(layout, columns, place, "columns:")
    for number, record in records:
        if isinstance(record, str):
            yield number, [], BadRow(number, "wrong columns", f"is not a row of CSV ({record})")
        elif columns is None:
            columns = list(record)
            require_column(layout, columns, place, "the header")
        elif len(record) != len(columns):
            reason = f"has {len(record)} fields where the columns are {len(columns)} ({listed(columns)})"
            yield number, columns, BadRow(number, "wrong columns", reason)
        else:
            yield number, columns, record
