"""One file -> its rows, in a streaming way: memory is one row (for parquet and Arrow the text column of a batch).

The name of a file decides how it is read: archive, format, compression. A row that cannot be a document is handed on
as a `BadRow` with its place and reason; `sources` does with it what `data.on_bad_row` says. Policy of the text: UTF-8,
strict; a BOM at the start of a file is dropped; CRLF becomes LF in plain text; NUL and every other valid character is
kept. A row's number is the line on which it begins, from 1 (the index of the row in .json, .parquet and .arrow).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from gptcli.data.reading.archives import ARCHIVES, tar_rows, zip_rows
from gptcli.data.reading.columnar import arrow_rows, parquet_records, parquet_rows
from gptcli.data.reading.jsonfile import json_rows
from gptcli.data.reading.plain import line_records, plain_rows
from gptcli.data.reading.row import BadRow, Layout, Part, Record, Records, Row, Rows, shown, value_row
from gptcli.data.reading.spans import Span, byte_range, byte_spans, count_lines, group_spans, is_cut_at_blank
from gptcli.data.reading.streams import COMPRESSIONS, DamagedError, FileRange, buffered, decompressed
from gptcli.data.reading.tables import csv_records, csv_rows, jsonl_records, jsonl_rows, tsv_records, tsv_rows
from gptcli.errors import DataError

__all__ = [
    "BadRow",
    "Layout",
    "Record",
    "Records",
    "Row",
    "Rows",
    "Span",
    "builtin_rows",
    "has_records",
    "is_readable",
    "lines_before",
    "read_records",
    "read_rows",
    "readable_suffixes",
    "record_suffixes",
    "shown",
    "spans",
    "split_suffix",
    "value_row",
]

PLAIN = (".txt", ".md")
# Written beside its data by `datasets.save_to_disk`.
BOOKKEEPING = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})
_SHORT_TAR = {".tgz": ".gz", ".tzst": ".zst", ".txz": ".xz", ".tbz2": ".bz2"}
_FORMATS: dict[str, Callable[[Part, Layout], Rows]] = {
    ".txt": plain_rows,
    ".md": plain_rows,
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
SUFFIXES = tuple(_FORMATS)
_RECORDS: dict[str, Callable[[Part, Layout], Records]] = {
    ".jsonl": jsonl_records,
    ".txt": line_records,
    ".csv": csv_records,
    ".tsv": tsv_records,
    ".parquet": parquet_records,
}


def split_suffix(name: str) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "") of a file name: `a.JSONL.gz` -> (".jsonl", ".gz").

    Short names of compressed archives are taken apart too: `a.tgz` -> (".tar", ".gz").
    """
    lower = name.lower()
    if compression := _SHORT_TAR.get(PurePosixPath(lower).suffix):
        return ".tar", compression
    compression = next((suffix for suffix in COMPRESSIONS if lower.endswith(suffix)), "")
    return PurePosixPath(lower.removesuffix(compression)).suffix, compression


def is_readable(name: str) -> bool:
    """Whether a file of this name can be read: a format or an archive, and no bookkeeping of `datasets`."""
    return _is_format(name) or split_suffix(name) == (".zip", "") or split_suffix(name)[0] == ".tar"


def _is_format(name: str) -> bool:
    return split_suffix(name)[0] in _FORMATS and PurePosixPath(name).name not in BOOKKEEPING


def readable_suffixes() -> str:
    """The suffixes that are read, for messages."""
    return f"{_member_suffixes()}, or such files in {' '.join(ARCHIVES)} (.tar also compressed)"


def _member_suffixes() -> str:
    return f"{' '.join(SUFFIXES)}, each plain or {' '.join(COMPRESSIONS)}"


def read_rows(
    path: Path,
    layout: Layout,
    *,
    span: Span | None = None,
    plain: bool = False,
    on_position: Callable[[int], None] | None = None,
) -> Rows:
    """The rows of one file, or of a span of it, in order. A file that is damaged or truncated ends in a bad row.

    `plain`: a plain text, whatever its suffix (parallel texts are named by their language). `on_position` is told
    during the reading how many bytes of the file (of the span) have been read. Raises `DataError` when the file cannot
    be opened, lacks the column, or is an archive without a file that can be read.
    """
    suffix, compression = split_suffix(path.name)
    formats = _Formats(layout, plain)
    suffix = ".txt" if plain else suffix
    if span is not None and not _is_divisible(suffix, compression, layout):
        raise ValueError(f"{path.name} is not read in spans")
    try:
        begin, end, groups = 0, None, None
        if span is not None and suffix == ".parquet":
            groups = range(span.begin, span.end)
        elif span is not None:
            begin, end = byte_range(path, span, layout, suffix)
        # What a reader that seeks has read is not where the file stands: such readers tell their progress themselves.
        seeks = not compression and suffix in (".parquet", ".arrow", ".zip")
        with path.open("rb", buffering=0) as file:
            stream = buffered(FileRange(file, begin, end, None if seeks else on_position))
            place = None if compression else path
            part = Part(stream, shown(path), begin == 0, place, groups, on_position if seeks else None)
            if suffix in ARCHIVES:
                yield from _archive_rows(part, suffix, compression, formats)
            else:
                yield from formats.rows(part, path.name)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=shown(path)) from None


def read_records(path: Path, layout: Layout, *, on_position: Callable[[int], None] | None = None) -> Records:
    """The whole rows of one file of `record_suffixes`, in order: as `read_rows`, each as a line of JSON."""
    suffix, compression = split_suffix(path.name)
    seeks = not compression and suffix == ".parquet"
    try:
        with path.open("rb", buffering=0) as file:
            stream = buffered(FileRange(file, on_position=None if seeks else on_position))
            place = None if compression else path
            part = Part(decompressed(stream, compression), shown(path), path=place, on_position=on_position)
            yield from _RECORDS[suffix](part, layout)
    except DamagedError as error:
        yield BadRow(error.number, "damaged file", error.reason)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=shown(path)) from None


def has_records(name: str) -> bool:
    """Whether a file of this name is one of whole rows."""
    return split_suffix(name)[0] in _RECORDS


def record_suffixes() -> str:
    """The suffixes of files of whole rows, for messages."""
    return f"{' '.join(_RECORDS)}, each plain or {' '.join(COMPRESSIONS)}"


def builtin_rows(path: Path) -> Rows:
    """The rows of a built-in corpus, which name themselves."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            value = json.loads(line)
            yield Row(number, value["text"], value["id"])


def spans(path: Path, layout: Layout, size: int) -> list[Span | None]:
    """The parts of about `size` bytes in which several processes can read a file; [None] where it is not divided.

    Divided are uncompressed .jsonl, .txt and .md (in documents line or blank-line) by bytes, .parquet by row groups.
    """
    suffix, compression = split_suffix(path.name)
    if size < 1:
        raise ValueError(f"a span of {size} bytes")
    if not _is_divisible(suffix, compression, layout):
        return [None]
    try:
        if suffix == ".parquet":
            return group_spans(path, size)
        return byte_spans(path, size, blank=suffix in PLAIN and is_cut_at_blank(layout, suffix))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=shown(path)) from None


def lines_before(path: Path, span: Span | None, layout: Layout) -> int:
    """How many lines of the file precede the span's first one: added to a row's number, it names the file's line.

    It reads the file up to there. 0 for no span, and for parquet, whose rows are numbered in the whole file.
    """
    suffix, _ = split_suffix(path.name)
    if span is None or suffix == ".parquet":
        return 0
    return count_lines(path, byte_range(path, span, layout, suffix)[0])


def _is_divisible(suffix: str, compression: str, layout: Layout) -> bool:
    if compression:
        return False
    by_lines = layout.whole or layout.documents in ("line", "blank-line")
    return suffix in (".jsonl", ".parquet") or (suffix in PLAIN and by_lines)


def _archive_rows(part: Part, suffix: str, compression: str, formats: _Formats) -> Rows:
    try:
        yield from zip_rows(part, formats) if suffix == ".zip" else tar_rows(part, compression, formats)
    except DamagedError as error:
        yield BadRow(error.number, "damaged file", error.reason)


@dataclass(frozen=True)
class _Formats:
    """The readers by name, for a file and for the members of an archive."""

    layout: Layout
    plain: bool = False

    def is_member(self, name: str) -> bool:
        return _is_format(name)

    def suffixes(self) -> str:
        return _member_suffixes()

    def rows(self, part: Part, name: str) -> Rows:
        suffix, compression = split_suffix(name)
        try:
            stream = decompressed(part.stream, compression)
            whole = replace(part, stream=stream, path=None if compression else part.path)
            yield from _FORMATS[".txt" if self.plain else suffix](whole, self.layout)
        except DamagedError as error:
            yield BadRow(error.number, "damaged file", error.reason)
