"""Where documents come from: files, globs, folders, built-in corpora and Hub sets, read one document at a time.

A source is first resolved to its inputs (so that a missing file is an error before anything is read), then read in
their sorted order. Documents of nothing but white space are dropped and counted; rows that cannot be read end the run,
or with `data.on_bad_row: skip` are counted too.
"""

from __future__ import annotations

import difflib
import functools
import glob
import itertools
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

from gptcli.data import hub
from gptcli.data.builtin import builtin_file
from gptcli.data.readers import (
    BadRow,
    Layout,
    Row,
    Rows,
    Span,
    builtin_rows,
    is_readable,
    lines_before,
    read_rows,
    readable_suffixes,
    shown,
    split_suffix,
)
from gptcli.data.reading.row import Mark
from gptcli.data.tokens import TokensInput, find_tokens, size_of
from gptcli.errors import DataError, not_available
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


Input: TypeAlias = FileInput | hub.HubSet | TokensInput


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
        return _mark(self.part, self.row)

    @property
    def raw(self) -> bytes:
        """What tells equal documents: the text in UTF-8."""
        return self.text.encode("utf-8")


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become documents; plain values, so that it can be sent to another process."""

    layout: Layout
    on_bad_row: str
    where: str | None


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
        raise not_available("data", "a source without a single path", where=where)
    if source.path.startswith(hub.PREFIX):
        return [hub.find(source, where=where)]
    if source.path.startswith(BUILTIN):
        return [FileInput(str(builtin_file(source.path.removeprefix(BUILTIN), where=where)), builtin=True)]
    files = find_files(source.path, split=source.split, where=where)
    if broken := next((name for name in files if not os.path.isfile(name)), None):
        what = f"{shown(Path(broken))} is a link to a file that is not there, or no regular file"
        raise DataError(what, where=where, remedy="Remove it, or put the file there.")
    if unnamed := next((name for name in files if not _is_unicode(name)), None):
        what = f"{shown(Path(unnamed))}: this file's name is not valid UTF-8"
        raise DataError(what, where=where, remedy="Rename it: manifests and reports name every file.")
    return Files(files)


def find_files(pattern: str, *, split: str | None = None, where: str | None = None) -> list[str]:
    """The names of the files of a path, a glob (`**` too) or a folder (recursive), sorted; hidden files are left out.

    `split` chooses in a folder of splits: its subfolder of that name, or the files whose names begin with it.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        return _folder_files(path, split, where)
    if path.exists():
        if not is_readable(path.name):
            raise _unreadable(f"{shown(path)} has a suffix that is not read", where)
        return [str(path)]
    if glob.has_magic(pattern):
        files = [name for name in sorted(_matches(os.path.expanduser(pattern))) if os.path.isfile(name)]
        if not files:
            raise DataError(f"no file matches {pattern}", where=where, remedy="Check the pattern; ** matches folders.")
        if not (readable := [name for name in files if is_readable(os.path.basename(name))]):
            raise _unreadable(f"none of the {len(files)} files that match {pattern} can be read", where)
        return readable
    raise DataError(f"there is no file {shown(path)}", where=where, remedy=_nearest(path))


def reading_of(source: Source, documents: str, on_bad_row: str, *, where: str | None = None) -> Reading:
    """How a source is read; `documents` (file | line | blank-line) where the source itself does not say it."""
    columns = tuple(source.columns) if source.columns else None
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
        for row in _rows(part, reading, shifted(on_bytes, done) if on_bytes is not None else None):
            if isinstance(row, BadRow):
                if reading.on_bad_row == "error":
                    raise DataError(row.reason, where=place(part, _mark(index, row), reading.layout), remedy=_MEND)
                tally.drop(row.kind, functools.partial(_mark, index, row))
            elif not row.text or row.text.isspace():
                tally.drop("empty", functools.partial(_mark, index, row))
            else:
                if left is not None:
                    if left == 0:
                        return
                    left -= 1
                yield Document(row.text, row, index)
        done += input_size(part)
        if on_bytes is not None:
            on_bytes(done)


def place(part: Input, mark: Mark, layout: Layout) -> str:
    """A mark as a text: "file:line", "archive!member:line", or the built-in corpus's own name.

    In a span of a file, the lines before it are counted now: this is for messages, not for every row.
    """
    if mark.identity:
        return mark.identity
    if isinstance(part, hub.HubSet):
        return f"hub:{part.name}{f' (file {part.shard[0] + 1})' if part.shard else ''}:{mark.number}"
    if isinstance(part, TokensInput):
        return f"{shown(part.path)}:{mark.number}"
    name = f"{shown(part.path)}!{one_line(mark.member)}" if mark.member else shown(part.path)
    return f"{name}:{mark.number + lines_before(part.path, part.span, layout)}"


def _mark(part: int, row: Row | BadRow) -> Mark:
    return Mark(part, row.number, row.member or "", (row.identity or "") if isinstance(row, Row) else "")


def input_size(part: Input) -> int:
    """The bytes of an input on disk; 0 for a Hub set, which is not known."""
    if isinstance(part, hub.HubSet):
        return 0
    if isinstance(part, TokensInput):
        return size_of(part)
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
    return "".join(split_suffix(os.path.basename(part.name))) if isinstance(part, FileInput) else "hub"


def _rows(part: Input, reading: Reading, on_position: Callable[[int], None] | None) -> Rows:
    if isinstance(part, hub.HubSet):
        return hub.rows(part, reading.layout.text, where=reading.where)
    if isinstance(part, TokensInput):
        raise DataError("these are tokens, and the texts are needed", where=reading.where or str(part.path))
    if part.builtin:
        return builtin_rows(part.path)
    return read_rows(part.path, reading.layout, span=part.span, on_position=on_position)


def shifted(on_bytes: Callable[[int], None], offset: int) -> Callable[[int], None]:
    """`on_bytes` for a part that begins after `offset` bytes of the whole."""
    return lambda position: on_bytes(offset + position)


def _folder_files(folder: Path, split: str | None, where: str | None) -> list[str]:
    if split is not None and (folder / split).is_dir():
        folder, split = folder / split, None
    readable: list[str] = []
    others = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and is_readable(name):
                readable.append(os.path.join(parent, name))
            else:
                others += not name.startswith(".")
    if not readable:
        raise _unreadable(f"the folder {shown(folder)} holds no file that can be read ({others} others)", where)
    readable.sort()
    if split is None:
        return readable
    of_split = [name for name in readable if re.match(re.escape(split) + r"[-_.]", os.path.basename(name))]
    if not of_split:
        raise DataError(
            f"the folder {shown(folder)} has no split {split!r}",
            where=where,
            remedy=f"A split is a subfolder {split}/ or files named {split}.SUFFIX or {split}-*.SUFFIX.",
        )
    return of_split


def _matches(pattern: str) -> Iterator[str]:
    """What a glob matches, as `glob.glob` has it; but `**` enters each folder once, however many links lead there.

    A link to a folder above it is a circle, and two of them are more paths than can be walked.
    """
    if pattern == "**" or pattern.endswith("/**"):  # folders are no files, so this is the same
        pattern += "/*"
    begin, stars, rest = pattern.partition("**/")
    if not stars or (begin and not begin.endswith("/")):
        return iter(glob.glob(pattern, recursive=True))
    entered: set[tuple[int, int]] = set()
    found: set[str] = set()
    for root in sorted(glob.glob(begin)) if begin else [""]:
        for folder, folders, _ in os.walk(root or ".", followlinks=True):
            status = os.stat(folder)
            if (key := (status.st_dev, status.st_ino)) in entered:
                folders.clear()
                continue
            entered.add(key)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = os.path.relpath(folder, root or ".")
            at = root if inside == "." else os.path.join(root, inside, "")
            found.update(_matches(glob.escape(at) + rest))
    return iter(found)


def _is_unicode(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _unreadable(what: str, where: str | None) -> DataError:
    return DataError(what, where=where, remedy=f"Files that are read: {readable_suffixes()}.")


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {shown(parent / near[0])}?"
    kind = "file" if is_readable(path.name) else "file or folder"
    return (
        f"{shown(parent) if str(shown(parent)) != '.' else 'The current folder'} holds no such {kind}. Check the path."
    )
