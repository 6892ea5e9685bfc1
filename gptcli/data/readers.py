"""One file -> its rows, in a streaming way: memory is one row (one row group's text column for parquet).

A row that cannot be a document is handed on as a `BadRow` with its place and reason; `sources` does with it what
`data.on_bad_row` says. Policy of the text: UTF-8, strict; a BOM at the start of a file is dropped; CRLF becomes LF in
plain text; NUL and every other valid character is kept. A row's number is the line on which it begins, from 1.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import zstandard

from gptcli.errors import DataError

COMPRESSIONS = (".gz", ".zst")
PLAIN = (".txt", ".md")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
SUFFIXES = PLAIN + TABLES
BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """The text of one row; `identity` when the file itself names its rows (built-in corpora)."""

    number: int
    text: str
    identity: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be a document: `kind` is what it is counted as, `reason` the sentence that names the fault."""

    number: int
    kind: Literal["not UTF-8", "not JSON", "wrong columns", "not text", "damaged file"]
    reason: str


Rows: TypeAlias = Iterator[Row | BadRow]


@dataclass(frozen=True)
class Layout:
    """How to find the documents of a file: `documents` for plain text, the column `text` (and names) for tables."""

    documents: str = "file"
    text: str = "text"
    columns: tuple[str, ...] | None = None


def split_suffix(name: str) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "") of a file name: `a.JSONL.gz` -> (".jsonl", ".gz")."""
    lower = name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if lower.endswith(suffix)), "")
    return Path(lower.removesuffix(compression)).suffix, compression


def is_readable(name: str) -> bool:
    """Whether a file of this name can be read."""
    return split_suffix(name)[0] in SUFFIXES


def readable_suffixes() -> str:
    """The suffixes that are read, for messages."""
    return f"{' '.join(SUFFIXES)}, each plain or {' '.join(COMPRESSIONS)}"


def shown(path: Path) -> str:
    """A path as it is shown: relative to the current directory where it lies in it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_rows(path: Path, layout: Layout, *, on_position: Callable[[int], None] | None = None) -> Rows:
    """The rows of one file, in order. Raises `DataError` when the file cannot be opened or lacks the column.

    `on_position` is told after each row how many bytes of the file have been read.
    """
    suffix, compression = split_suffix(path.name)
    read = _READERS[suffix]
    number = 0
    try:
        with path.open("rb") as file, _decompressed(file, compression) as stream:
            for row in read(stream, layout, path):
                number = row.number
                yield row
                if on_position is not None:
                    on_position(0 if file.closed else file.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        yield BadRow(number + 1, "damaged file", f"the {compression} file is damaged or truncated ({error})")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=shown(path)) from None


@contextlib.contextmanager
def _decompressed(file: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    if compression == ".gz":
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream  # type: ignore[misc]  # GzipFile is an IO[bytes] in all that is used here
    elif compression == ".zst":
        yield _ZstdStream(file)  # type: ignore[misc]
    else:
        yield file


class _ZstdStream:
    """Decompress frame after frame; unlike `zstandard.stream_reader`, a truncated last frame is an EOFError."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._compressed = b""
        self._buffer = bytearray()
        self._begin = 0
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        while not self._ended and (size < 0 or len(self._buffer) - self._begin < size):
            self._fill()
        end = len(self._buffer) if size < 0 else min(len(self._buffer), self._begin + size)
        return self._take(end)

    def readline(self) -> bytes:
        searched = self._begin
        while (newline := self._buffer.find(b"\n", searched)) < 0:
            if self._ended:
                return self._take(len(self._buffer))
            pending = len(self._buffer) - self._begin
            self._fill()
            searched = self._begin + pending
        return self._take(newline + 1)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _take(self, end: int) -> bytes:
        data = bytes(self._buffer[self._begin : end])
        self._begin = end
        return data

    def _fill(self) -> None:
        if self._begin:
            del self._buffer[: self._begin]
            self._begin = 0
        if not self._compressed:
            self._compressed = self._file.read(BLOCK >> 3)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the last frame is not complete")
            self._ended = True
            return
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        self._buffer += self._frame.decompress(self._compressed)
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream with their ends, without a BOM."""
    for index, line in enumerate(stream):
        yield line.removeprefix(_BOM) if index == 0 else line


def _plain(stream: IO[bytes], layout: Layout, path: Path) -> Rows:
    del path
    if layout.documents == "line":
        for number, line in enumerate(_lines(stream), start=1):
            yield _text_row(number, line.rstrip(b"\n").removesuffix(b"\r"))
    elif layout.documents == "blank-line":
        yield from _paragraphs(stream)
    else:
        yield _text_row(1, stream.read().removeprefix(_BOM))


def _paragraphs(stream: IO[bytes]) -> Rows:
    block: list[bytes] = []
    start = 1
    for number, line in enumerate(_lines(stream), start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield _text_row(start, b"".join(block).rstrip(b"\r\n"))
            block = []
    if block:
        yield _text_row(start, b"".join(block).rstrip(b"\r\n"))


def _text_row(number: int, raw: bytes) -> Row | BadRow:
    try:
        return Row(number, raw.decode("utf-8").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        return BadRow(number + raw.count(b"\n", 0, error.start), "not UTF-8", _not_utf8(error))


def _jsonl(stream: IO[bytes], layout: Layout, path: Path) -> Rows:
    del path
    for number, line in enumerate(_lines(stream), start=1):
        if line.strip():
            yield _json_row(number, line, layout.text)


def _json_row(number: int, line: bytes, column: str) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(number, "not UTF-8", _not_utf8(error))
    except (ValueError, RecursionError) as error:
        return BadRow(number, "not JSON", f"is not a JSON object ({error})")
    if not isinstance(value, dict):
        return BadRow(number, "not JSON", f"is not a JSON object but {_kind(value)}")
    if column not in value:
        return BadRow(number, "wrong columns", f"has no column {column!r}, only {_listed(value)}")
    return value_row(number, value[column], column)


def builtin_rows(path: Path) -> Rows:
    """The rows of a built-in corpus, which name themselves."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            value = json.loads(line)
            yield Row(number, value["text"], value["id"])


def _tsv(stream: IO[bytes], layout: Layout, path: Path) -> Rows:
    """Tab-separated values without quoting, as they are written in practice."""

    def records() -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(_lines(stream), start=1):
            text = line.decode("utf-8", "surrogateescape").rstrip("\n").removesuffix("\r")
            if text:
                yield number, text.split("\t")

    yield from _table(records(), layout, path)


def _csv(stream: IO[bytes], layout: Layout, path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 pass as lone surrogates, so that one bad row does not end the reading of the file.
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(stream))
    reader = csv.reader(lines, strict=True)

    def records() -> Iterator[tuple[int, list[str] | str]]:
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

    yield from _table(records(), layout, path)


def _table(records: Iterator[tuple[int, Any]], layout: Layout, path: Path) -> Rows:
    columns: list[str] | None = None
    if layout.columns is not None:
        columns = list(layout.columns)
        _require_column(layout.text, columns, path, "columns:")
    for number, record in records:
        if isinstance(record, str):
            yield BadRow(number, "wrong columns", f"is not a row of CSV ({record})")
        elif columns is None:
            columns = record
            _require_column(layout.text, columns, path, "the header")
        elif len(record) != len(columns):
            reason = f"has {len(record)} fields where the columns are {len(columns)} ({_listed(columns)})"
            yield BadRow(number, "wrong columns", reason)
        else:
            yield value_row(number, record[columns.index(layout.text)], layout.text)


def _parquet(stream: IO[bytes], layout: Layout, path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        if split_suffix(path.name)[1]:  # parquet is read from its end, which needs a file
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            while block := stream.read(BLOCK):
                unpacked.write(block)
            stream = unpacked
        number = 0
        try:
            file = stack.enter_context(pq.ParquetFile(stream))
            _require_column(layout.text, file.schema_arrow.names, path, "the file")
            kind = file.schema_arrow.field(layout.text).type
            value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
                raise DataError(f"column {layout.text!r} holds {kind}, not text", where=shown(path))
            for batch in file.iter_batches(batch_size=256, columns=[layout.text]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for raw in column.cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield _binary_row(number, raw, layout.text)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield BadRow(number + 1, "damaged file", f"the parquet file is damaged or truncated ({reason})")


def _binary_row(number: int, raw: bytes | None, column: str) -> Row | BadRow:
    if raw is None:
        return value_row(number, None, column)
    try:
        return Row(number, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(number, "not UTF-8", _not_utf8(error))


def value_row(number: int, value: Any, column: str) -> Row | BadRow:
    """A row from one value of a table: text that UTF-8 can hold, or a bad row."""
    if not isinstance(value, str):
        return BadRow(number, "not text", f"column {column!r} holds {_kind(value)}, not text")
    if found := _SURROGATE.search(value):
        code = ord(found.group())
        if 0xDC80 <= code <= 0xDCFF:
            return BadRow(number, "not UTF-8", f"is not UTF-8 (byte 0x{code - 0xDC00:02x})")
        return BadRow(number, "not UTF-8", f"holds a lone surrogate (\\u{code:04x}), which no UTF-8 text can")
    return Row(number, value)


def _require_column(column: str, columns: list[str], path: Path, place: str) -> None:
    if column in columns:
        return
    import difflib

    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = near[0] if near else next((name for name in columns if name.isidentifier()), "NAME")
    raise DataError(
        f"{place} has no column {column!r}, only {_listed(columns)}",
        where=f"{shown(path)}:1",
        remedy=f"Name the column that holds the text (text: {hint}),\n"
        "or the columns of a file without a header (columns: [...]).",
    )


def _listed(columns: Any) -> str:
    names = [repr(name if len(name) <= 40 else name[:40] + "...") for name in columns]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})"


_SURROGATE = re.compile("[\ud800-\udfff]")
_READERS: dict[str, Callable[[IO[bytes], Layout, Path], Rows]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
