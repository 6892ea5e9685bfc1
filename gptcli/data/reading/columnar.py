"""Columnar files: parquet and Arrow, the latter as a file or as a stream (what `datasets.save_to_disk` writes).

Only the column of the text is read, a batch at a time. Both kinds are read from their end, so one that is compressed
or stands in an archive is first written to a temporary file.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import IO, Any
from uuid import UUID

from gptcli.data.reading.row import (
    BadRow,
    Layout,
    Part,
    Record,
    Records,
    Row,
    Rows,
    not_utf8_row,
    require_column,
    value_row,
)
from gptcli.data.reading.streams import BLOCK, FAULTS, DamagedError
from gptcli.errors import DataError

BATCH = 256
_ARROW_FILE = b"ARROW1"


def parquet_rows(part: Part, layout: Layout) -> Rows:
    """The rows of a parquet file, or of its row groups `part.groups`; numbers are those of the whole file."""
    import pyarrow.parquet as pq

    with _seekable(part) as source, _arrow_faults("parquet") as numbered, pq.ParquetFile(source) as file:
        read = _readable(file.schema_arrow, layout, part.place)
        groups = range(file.num_row_groups) if part.groups is None else part.groups
        rows = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        begin = numbered.number = sum(rows[: groups.start]) + 1
        size = part.path.stat().st_size if part.path is not None and part.on_position is not None else None
        for batch in file.iter_batches(batch_size=BATCH, columns=read, row_groups=list(groups)):
            yield from _batch_rows(numbered.number, batch, layout)
            numbered.number += len(batch)
            if size is not None and part.on_position is not None:
                part.on_position(size * (numbered.number - begin) // sum(rows))


def parquet_records(part: Part, layout: Layout) -> Records:
    """The whole rows of a parquet file; times are written as ISO texts, decimals as texts, NaN as null."""
    import pyarrow.parquet as pq

    with _seekable(part) as source, _arrow_faults("parquet") as numbered, pq.ParquetFile(source) as file:
        names = file.schema_arrow.names
        _require_text(file.schema_arrow, layout, part.place)
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"the file has more than one column {twice[0]!r}", where=part.place)
        size = part.path.stat().st_size if part.path is not None and part.on_position is not None else None
        for batch in file.iter_batches(batch_size=BATCH):
            rows = _column_rows(numbered.number, batch.column(names.index(layout.text)), layout.text)
            for index, row in enumerate(rows):
                yield row if isinstance(row, BadRow) else _record(row, batch.slice(index, 1))
            numbered.number += len(batch)
            if size is not None and part.on_position is not None:
                part.on_position(size * (numbered.number - 1) // max(1, file.metadata.num_rows))


def _record(row: Row, one: Any) -> Record | BadRow:
    """The whole row of a text, from a batch of one row."""
    try:
        values = one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return not_utf8_row(row.number, error)
    try:
        line = json.dumps(values, ensure_ascii=False, allow_nan=False, default=_plain)
    except TypeError as error:
        return BadRow(row.number, "not text", str(error))
    except ValueError:
        line = json.dumps(_finite(values), ensure_ascii=False, default=_plain)
    return Record(row.number, row.text, line)


def _plain(value: Any) -> str:
    if isinstance(value, datetime | date | clock):
        return value.isoformat()
    if isinstance(value, Decimal | UUID | timedelta):
        return str(value)
    raise TypeError(f"holds {type(value).__name__}, which a line of JSON cannot hold")


def _finite(value: Any, of_other: Callable[[Any], Any] = lambda value: value) -> Any:
    if isinstance(value, str | int) or value is None:
        return value
    if isinstance(value, dict):
        return {key: _finite(each, of_other) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each, of_other) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return of_other(value)


def arrow_rows(part: Part, layout: Layout) -> Rows:
    """The rows of an Arrow IPC file or stream, which is told from its first bytes."""
    import pyarrow as pa

    if part.path is not None and not part.path.stat().st_size:
        return
    with _seekable(part) as source, _arrow_faults("arrow") as numbered, contextlib.ExitStack() as stack:
        file = stack.enter_context(pa.OSFile(source) if isinstance(source, str) else pa.PythonFile(source, "r"))
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        open_ipc = pa.ipc.open_file if is_file else pa.ipc.open_stream
        file.seek(0)
        schema = stack.enter_context(open_ipc(file)).schema
        read = _readable(schema, layout, part.place)
        file.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in read])
        reader = stack.enter_context(open_ipc(file, options=options))
        for batch in (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader:
            for column in batch.columns:
                _checked(column)
            for start in range(0, len(batch), BATCH):
                some = batch.slice(start, BATCH)
                yield from _batch_rows(numbered.number, some, layout)
                numbered.number += len(some)
            if part.path is not None and part.on_position is not None:
                part.on_position(file.tell())


class _Numbered:
    number = 1


@contextlib.contextmanager
def _arrow_faults(what: str) -> Iterator[_Numbered]:
    import pyarrow as pa

    numbered = _Numbered()
    try:
        yield numbered
    except (pa.ArrowException, OSError, *FAULTS) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        damaged = DamagedError(f"the {what} file is damaged or truncated ({reason})")
        damaged.number = numbered.number
        raise damaged from None


@contextlib.contextmanager
def _seekable(part: Part) -> Iterator[str | IO[bytes]]:
    if part.path is not None:
        yield str(part.path)
        return
    with tempfile.TemporaryFile() as unpacked:
        while block := part.stream.read(BLOCK):
            unpacked.write(block)
        unpacked.seek(0)
        yield unpacked


def _readable(schema: Any, layout: Layout, place: str) -> list[str]:
    """The columns to read, once the file has them: that of the text, or those that are needed of whole rows."""
    if not layout.whole:
        _require_text(schema, layout, place)
        return [layout.text]
    require_column(layout, schema.names, place, "the file")
    wanted = schema.names if layout.needed is None else [name for name in schema.names if name in layout.needed]
    if twice := [name for name in wanted if schema.names.count(name) > 1]:
        raise DataError(f"the file has more than one column {twice[0]!r}", where=place)
    return list(wanted)


def _batch_rows(first: int, batch: Any, layout: Layout) -> Rows:
    if not layout.whole:
        yield from _column_rows(first, batch.column(0), layout.text)
        return
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what its writers say to be UTF-8
        for index in range(len(batch)):
            try:
                rows = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield not_utf8_row(first + index, error)
            else:
                yield Row(first + index, "", values=plain_values(rows[0]))
        return
    for number, values in enumerate(rows, first):
        yield Row(number, "", values=plain_values(values))


def plain_values(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row as JSON has them: times as ISO texts, decimals as texts, NaN as null; others as they are."""
    return {name: _finite(value, _plain_or_same) for name, value in row.items()}


def _plain_or_same(value: Any) -> Any:
    try:
        return _plain(value)
    except TypeError:
        return value  # a fault only where this column is used


def _require_text(schema: Any, layout: Layout, place: str) -> None:
    import pyarrow as pa

    column = layout.text
    require_column(layout, schema.names, place, "the file")
    if schema.get_field_index(column) < 0:
        raise DataError(f"the file has more than one column {column!r}", where=place)
    kind = schema.field(column).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
        raise DataError(f"column {column!r} holds {kind}, not text", where=place)


def _checked(column: Any) -> Any:
    """The column, once its offsets are known to lie in its buffers: Arrow would follow wrong ones out of the memory."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column.validate(full=True)
    else:  # as bytes, since a text that is not UTF-8 is a fault of its row only
        column.view(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).validate(full=True)
    return column


def _column_rows(first: int, column: Any, name: str) -> Rows:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what its writers say to be UTF-8
        texts = column.cast(pa.large_binary()).to_pylist()
    else:
        if not column.null_count:
            yield from map(Row, count(first), texts)
            return
    for number, text in enumerate(texts, first):
        if text is None:
            yield value_row(number, None, name)
        elif isinstance(text, bytes):
            try:
                yield Row(number, text.decode())
            except UnicodeDecodeError as error:
                yield not_utf8_row(number, error)
        else:
            yield Row(number, text)


def row_groups(path: Path) -> list[int]:
    """The bytes of each row group of a parquet file, in proportion to its uncompressed ones; [] if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(str(path)) as file:
            # Not the exact bytes of its columns: a damaged description of a column ends the process in pyarrow 26.
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, *FAULTS):
        return []
    return [max(1, path.stat().st_size * size // max(1, sum(sizes))) for size in sizes]
