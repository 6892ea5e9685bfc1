"""What the readers of all formats share: the row that they make, the part of a file that they are given, their faults.

A row that cannot be a document is handed on as a `BadRow` with its place and reason, never raised: what to do with it
is decided by `data.on_bad_row`, far above. Only what is wrong with the whole file (no such column) is a `DataError`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from gptcli.errors import DataError
from gptcli.reporting import one_line

Kind: TypeAlias = Literal[
    "not UTF-8",
    "not JSON",
    "wrong columns",
    "not text",
    "damaged file",
    "no completion",
    "no conversation",
    "not in the template",
    "not media",
    "missing file",
    "outside the folder",
    "not fetched",
    "too large",
    "not finite",
]


@dataclass(slots=True)  # not frozen: a frozen one takes 0.8 µs to make instead of 0.2 µs, and every line is one
class Row:
    """The text of one row; `identity` when the file names its rows itself, `member` when it stands in an archive.

    A row that is read whole has no text but all its columns, as `values`; what a format makes of them is its `example`.
    """

    number: int
    text: str
    identity: str | None = None
    member: str | None = None
    values: dict[str, Any] | None = None
    example: Any = None


class Record(NamedTuple):
    """A whole row: its number, the text of the column that is asked for, and all its columns as one line of JSON."""

    number: int
    text: str
    line: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be a document: `kind` is what it is counted as, `reason` the sentence that names the fault."""

    number: int
    kind: Kind
    reason: str
    member: str | None = None


class Mark(NamedTuple):
    """Where a row stands, without the reading that a line number may need: `place` makes a text of it.

    `part` counts the inputs, `number` the rows of the part; `member` is that of an archive and `identity` the name that
    a built-in corpus has for its row, "" without.
    """

    part: int
    number: int
    member: str
    identity: str


Rows: TypeAlias = Iterator[Row | BadRow]
Records: TypeAlias = Iterator[Record | BadRow]
NAME_IT = (
    "Name the column that holds the text (text: {hint}),\nor the columns of a file without a header (columns: [...])."
)


@dataclass(frozen=True)
class Layout:
    """How to find the documents of a file: `documents` for plain text, the column `text` (and names) for tables.

    `remedy` is said where there is no such column; `{hint}` in it becomes the column that may be meant. `whole`: rows
    have all their columns as `values`, of which `text` has to be one ("": none has to); in columnar files only those
    that are `needed`.
    """

    documents: str = "file"
    text: str = "text"
    columns: tuple[str, ...] | None = None
    remedy: str = NAME_IT
    whole: bool = False
    needed: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Part:
    """What one reader reads: decompressed bytes, from the start of the file (then a BOM is dropped) or from later on.

    `place` names it in messages. `path` is set for a file that lies uncompressed on this machine, which a reader may
    open by itself; `groups` are then the row groups to read, and `on_position` is told how many bytes have been.
    """

    stream: io.BufferedReader
    place: str
    from_start: bool = True
    path: Path | None = None
    groups: range | None = None
    on_position: Callable[[int], None] | None = None


def shown(path: Path) -> str:
    """A path as it is shown: relative to the current directory where it lies in it, on one line."""
    try:
        return one_line(str(path.relative_to(Path.cwd())))
    except ValueError:
        return one_line(str(path))


def value_row(number: int, value: Any, column: str) -> Row | BadRow:
    """A row from one value of a table: text that UTF-8 can hold, or a bad row."""
    if not isinstance(value, str):
        return BadRow(number, "not text", f"column {column!r} holds {kind_of(value)}, not text")
    return checked_row(number, value)


def checked_row(number: int, text: str) -> Row | BadRow:
    """A row from a text that may hold lone surrogates (a JSON escape, or a byte decoded by `surrogateescape`)."""
    if text.isascii():  # known without a look at the characters; a trial encoding is 4 times as fast as a search
        return Row(number, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return BadRow(number, "not UTF-8", f"is not UTF-8 (byte 0x{code - 0xDC00:02x})")
        return BadRow(number, "not UTF-8", f"holds a lone surrogate (\\u{code:04x}), which no UTF-8 text can")
    return Row(number, text)


def object_row(number: int, value: dict[str, Any], column: str) -> Row | BadRow:
    """A row from one object: the text of its column."""
    if column not in value:
        return BadRow(number, "wrong columns", f"has no column {column!r}, only {listed(value)}")
    return value_row(number, value[column], column)


def whole_row(number: int, value: Any) -> Row | BadRow:
    """A row from one object, with all its columns."""
    if not isinstance(value, dict):
        return BadRow(number, "not JSON", f"is not a JSON object but {kind_of(value)}")
    return Row(number, "", values=value)


def not_utf8_row(number: int, error: UnicodeDecodeError) -> BadRow:
    """The bad row of bytes that are not UTF-8."""
    reason = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason})"
    return BadRow(number, "not UTF-8", reason)


def require_column(layout: Layout, columns: list[str], place: str, what: str) -> None:
    """Raise a `DataError` that names the columns there are, unless that of the text is one of them."""
    column = layout.text
    if column in columns or not column:
        return
    near = nearest(column, columns)
    hint = near if near else next((name for name in columns if name.isidentifier()), "NAME")
    raise DataError(
        f"{what} has no column {column!r}, only {listed(columns)}",
        where=f"{place}:1",
        remedy=layout.remedy.replace("{hint}", hint),
    )


def nearest(column: str, columns: Iterable[str]) -> str | None:
    """The column that may be meant."""
    import difflib

    near = difflib.get_close_matches(column, [*columns], n=1, cutoff=0.5)
    return near[0] if near else None


def listed(columns: Iterable[str]) -> str:
    """The names of columns for a message: at most 8 of them, none longer than 40 characters."""
    names = [repr(name if len(name) <= 40 else name[:40] + "...") for name in columns]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


_KINDS = {
    dict: "an object",
    list: "a list",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "a text",
}
