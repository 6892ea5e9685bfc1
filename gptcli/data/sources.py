"""Where documents come from: files, globs, folders, built-in corpora and Hub sets, read one document at a time.

A source is first resolved to its inputs (so that a missing file is an error before anything is read), then read in
their sorted order. Documents of nothing but white space are dropped and counted; rows that cannot be read end the run,
or with `data.on_bad_row: skip` are counted too.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

from gptcli.data import hub
from gptcli.data.builtin import builtin_file
from gptcli.data.columns import parallel_rows
from gptcli.data.find import find_files, is_unicode
from gptcli.data.formats import RowFormat, format_row, row_layout
from gptcli.data.readers import (
    BadRow,
    Layout,
    Row,
    Rows,
    Span,
    builtin_rows,
    lines_before,
    read_rows,
    shown,
    split_suffix,
)
from gptcli.data.reading.row import Mark
from gptcli.data.tokens import TokensInput, find_tokens, size_of
from gptcli.errors import DataError
from gptcli.reporting import one_line

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source

BUILTIN = "builtin:"
MAX_EXAMPLES = 5
_MEND = "Mend it, or leave such rows out: data.on_bad_row: skip (they are counted in the report)."


@dataclass(frozen=True, slots=True)
class FileInput:
    """A file on this machine, or the `span` of it; `builtin` marks the extracted text of a built-in corpus."""

    name: str
    builtin: bool = False
    span: Span | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.name)


@dataclass(frozen=True, slots=True)
class ParallelFiles:
    """Plain text files of which each is a column, by the names of the columns: line i of all of them is a row."""

    columns: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The first of the files."""
        return Path(self.names[0])


Input: TypeAlias = FileInput | ParallelFiles | hub.HubSet | TokensInput


class Files(Sequence[FileInput]):
    """Whole files, in some thirty bytes each where a list of objects takes 200: a corpus may be millions of them."""

    __slots__ = ("_ends", "_names", "_prefix")

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self._prefix = os.path.commonprefix(names)  # noqa: RUF071  (what all begin with, no folder)
        own = [name[len(self._prefix) :] for name in names]
        self._ends = array("Q", itertools.accumulate(map(len, own)))
        self._names = "".join(own)

    def __len__(self) -> int:
        return len(self._ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Files) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    @overload
    def __getitem__(self, index: int) -> FileInput: ...

    @overload
    def __getitem__(self, index: slice) -> Files: ...

    def __getitem__(self, index: int | slice) -> FileInput | Files:
        if isinstance(index, slice):
            return Files(self[at].name for at in range(*index.indices(len(self))))
        at = range(len(self))[index]
        return FileInput(self._prefix + self._names[self._ends[at - 1] if at else 0 : self._ends[at]])


def as_inputs(inputs: Sequence[Input]) -> Sequence[Input]:
    """The same inputs, held in little memory where they are whole files."""
    if all(isinstance(part, FileInput) and part.span is None and not part.builtin for part in inputs):
        return Files(part.name for part in inputs if isinstance(part, FileInput))
    return tuple(inputs)


class Document(NamedTuple):
    """One document, the row that it was, and which of the inputs that stands in."""

    text: str
    row: Row
    part: int

    def mark(self) -> Mark:
        """Where it stands."""
        return mark(self.part, self.row)

    @property
    def raw(self) -> bytes:
        """What tells equal documents: the text in UTF-8, or what an example says of itself."""
        example = self.row.example
        return self.text.encode("utf-8") if example is None else bytes(example.raw)


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become documents; plain values, so that it can be sent to another process.

    `format` is of rows that are examples (see `gptcli.data.formats`); None: their text is the document.
    """

    layout: Layout
    on_bad_row: str
    where: str | None
    format: RowFormat | None = None


@dataclass
class Tally:
    """What reading inputs left out, for the report: counts by reason, and where the first few stood."""

    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[Mark, str]] = field(default_factory=list)

    def drop(self, reason: str, mark: Callable[[], Mark]) -> None:
        """Count one document that was left out; `mark` tells where it stood."""
        self.dropped[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((mark(), reason))


def find_inputs(source: Source, *, where: str | None = None) -> Sequence[Input]:
    """What a source consists of, in the order of reading. Raises `DataError` when there is nothing to read."""
    if source.tokens is not None:
        return [*find_tokens(source, where=where)]
    if not isinstance(source.path, str):
        assert source.path is not None
        return [ParallelFiles(tuple(source.path), tuple(_single(path, where) for path in source.path.values()))]
    if source.path.startswith(hub.PREFIX):
        return [hub.find(source, where=where)]
    if source.path.startswith(BUILTIN):
        return [FileInput(str(builtin_file(source.path.removeprefix(BUILTIN), where=where)), builtin=True)]
    files = find_files(source.path, split=source.split, where=where)
    if broken := next((name for name in files if not os.path.isfile(name)), None):
        what = f"{shown(Path(broken))} is a link to a file that is not there, or no regular file"
        raise DataError(what, where=where, remedy="Remove it, or put the file there.")
    if unnamed := next((name for name in files if not is_unicode(name)), None):
        what = f"{shown(Path(unnamed))}: this file's name is not valid UTF-8"
        raise DataError(what, where=where, remedy="Rename it: manifests and reports name every file.")
    return Files(files)


def _single(path: str, where: str | None) -> str:
    name = os.path.expanduser(path)
    if not os.path.isfile(name):
        raise DataError(
            f"there is no file {shown(Path(name))}", where=where, remedy="Parallel files are named one by one."
        )
    return name


def reading_of(
    source: Source, documents: str, on_bad_row: str, *, row_format: RowFormat | None = None, where: str | None = None
) -> Reading:
    """How a source is read; `documents` (file | line | blank-line) where the source itself does not say it."""
    columns = tuple(source.columns) if source.columns else None
    if row_format is not None:
        return Reading(row_layout(row_format, columns), on_bad_row, where, row_format)
    return Reading(Layout(source.documents or documents, source.text, columns), on_bad_row, where)


def read_documents(
    inputs: Iterable[Input],
    reading: Reading,
    *,
    limit: int | None = None,
    tally: Tally | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """The documents of inputs, in order, at most `limit` of them.

    `on_bytes` is told how many bytes of the files have been read. A bad row is a `DataError` naming file and row, or is
    counted in `tally`.
    """
    tally = tally if tally is not None else Tally()
    done = 0
    left = limit
    for index, part in enumerate(inputs):
        for row in input_rows(part, reading, shifted(on_bytes, done) if on_bytes is not None else None):
            if isinstance(row, BadRow):
                bad_row(row, part, mark(index, row), reading, tally)
            elif not row.text or row.text.isspace():
                tally.drop("empty", functools.partial(mark, index, row))
            else:
                if left is not None:
                    if left == 0:
                        return
                    left -= 1
                yield Document(row.text, row, index)
        done += input_size(part)
        if on_bytes is not None:
            on_bytes(done)


def bad_row(row: BadRow, part: Input, at: Mark, reading: Reading, tally: Tally) -> None:
    """Count a row that cannot be a document, or raise the `DataError` that it is, as `data.on_bad_row` has it."""
    if reading.on_bad_row == "error":
        raise DataError(row.reason, where=place(part, at, reading.layout), remedy=_MEND)
    tally.drop(row.kind, lambda: at)


def place(part: Input, at: Mark, layout: Layout) -> str:
    """A mark as a text: "file:line", "archive!member:line", or the built-in corpus's own name.

    In a span of a file, the lines before it are counted now: this is for messages, not for every row.
    """
    if at.identity:
        return at.identity
    if isinstance(part, hub.HubSet):
        return f"hub:{part.name}{f' (file {part.shard[0] + 1})' if part.shard else ''}:{at.number}"
    if isinstance(part, TokensInput):
        return f"{shown(part.path)}:{at.number}"
    if isinstance(part, ParallelFiles):
        return f"{shown(part.path)}:{at.number}"
    name = f"{shown(part.path)}!{one_line(at.member)}" if at.member else shown(part.path)
    return f"{name}:{at.number + lines_before(part.path, part.span, layout)}"


def mark(part: int, row: Row | BadRow) -> Mark:
    """Where a row of the `part`-th input stands."""
    return Mark(part, row.number, row.member or "", (row.identity or "") if isinstance(row, Row) else "")


def input_size(part: Input) -> int:
    """The bytes of an input on disk; 0 for a Hub set, which is not known."""
    if isinstance(part, hub.HubSet):
        return 0
    if isinstance(part, TokensInput):
        return size_of(part)
    if isinstance(part, ParallelFiles):
        return sum(map(os.path.getsize, part.names))
    size = os.path.getsize(part.name)
    if part.span is None or split_suffix(os.path.basename(part.name))[0] == ".parquet":
        return size
    return min(part.span.end, size) - part.span.begin


def source_name(source: Source) -> str:
    """What a source is called in reports and manifests: short, and without the folders of this machine."""
    if isinstance(source.path, dict):
        return " + ".join(Path(path).name for path in source.path.values())
    path = str(source.path or source.tokens)
    if path.startswith((BUILTIN, hub.PREFIX)):
        return path
    parts = Path(path).parts
    first_magic = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[first_magic:])


def input_format(part: Input) -> str:
    """The suffixes that decide how an input is read."""
    if isinstance(part, TokensInput):
        return f"tokens {part.dtype}"
    if isinstance(part, ParallelFiles):
        return "".join(f"{column} {split_suffix(os.path.basename(name))[1]}, " for column, name in _columns(part))
    return "".join(split_suffix(os.path.basename(part.name))) if isinstance(part, FileInput) else "hub"


def input_rows(part: Input, reading: Reading, on_position: Callable[[int], None] | None = None) -> Rows:
    """The rows of one input: texts, whole rows, or with a format examples."""
    if reading.format is None:
        return _rows(part, reading, on_position)
    row_format = reading.format
    reach = row_format.reach(file_of(part))
    return (
        row if isinstance(row, BadRow) else format_row(row, row_format, reach)
        for row in _rows(part, reading, on_position)
    )


def file_of(part: Input) -> Path:
    """The file by whose folder the media of an input's rows are found."""
    # A set of the Hub holds its media itself: there is no folder that paths could lie in.
    return Path(os.devnull) / "none" if isinstance(part, hub.HubSet) else part.path


def _rows(part: Input, reading: Reading, on_position: Callable[[int], None] | None) -> Rows:
    if isinstance(part, hub.HubSet):
        return hub.rows(part, reading.layout, where=reading.where)
    if isinstance(part, TokensInput):
        raise DataError("these are tokens, and the texts are needed", where=reading.where or str(part.path))
    if isinstance(part, ParallelFiles):
        columns = [(column, Path(name)) for column, name in _columns(part)]
        rows = parallel_rows(columns, reading.layout, on_position=on_position)
        if reading.layout.whole:
            return rows
        text = reading.layout.text
        return (row if isinstance(row, BadRow) else Row(row.number, (row.values or {})[text]) for row in rows)
    if part.builtin:
        if reading.layout.whole:
            raise DataError(
                "a built-in corpus is texts, no rows with columns", where=reading.where, remedy="Give a file of rows."
            )
        return builtin_rows(part.path)
    return read_rows(part.path, reading.layout, span=part.span, on_position=on_position)


def _columns(part: ParallelFiles) -> Iterator[tuple[str, str]]:
    return zip(part.columns, part.names, strict=True)


def shifted(on_bytes: Callable[[int], None], offset: int) -> Callable[[int], None]:
    """`on_bytes` for a part that begins after `offset` bytes of the whole."""
    return lambda position: on_bytes(offset + position)
