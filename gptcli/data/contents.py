"""What is in a file, known without reading it again: its sha256 remembered by path, size, time of change and inode.

The same memory holds which shards were verified (see `gptcli.data.verify`). It is one small SQLite file in the cache
folder, safe for several processes. A file that changed less than two seconds before it was hashed is not remembered,
because a second change within the clock's grain would go unseen.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptcli.errors import DataError
from gptcli.files import cache_root, sha256_file

SETTLED_SECONDS = 2.0
ROWS_AT_ONCE = 500
_TABLES = (
    "CREATE TABLE IF NOT EXISTS files"
    " (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT)",
    "CREATE TABLE IF NOT EXISTS revisions (name TEXT PRIMARY KEY, commit_hash TEXT)",
    "CREATE TABLE IF NOT EXISTS verified"
    " (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, blocks TEXT)",
)


class Verified(NamedTuple):
    """A file as it was when its checksums were found right: its stat, and the sha256 of those checksums."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    blocks: str


def content_hashes(
    paths: Iterable[str], *, again: bool = False, on_bytes: Callable[[int], None] | None = None
) -> Generator[str, None, None]:
    """The sha256 of each file, read only where its path, size, time of change or inode is new (`again`: all).

    `on_bytes` is told how many bytes are done, remembered ones included. A file that cannot be read is a `DataError`.
    """
    done = 0
    with _memory() as memory, _Later(memory, "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)") as later:
        folders: dict[str, str] = {}
        for path in paths:
            try:
                stat = os.stat(path)
                name = _real(path, folders)
                key = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
                row = memory.execute(
                    "SELECT size, mtime_ns, inode, sha256 FROM files WHERE path = ?", (name,)
                ).fetchone()
                if not again and row is not None and row[:3] == key:
                    found = str(row[3])
                else:
                    started = time.time()
                    found = sha256_file(Path(path))
                    if started - stat.st_mtime > SETTLED_SECONDS:
                        later.add((name, *key, found))
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise DataError(f"cannot be read: {reason}", where=path) from None
            done += stat.st_size
            if on_bytes is not None:
                on_bytes(done)
            yield found


def remembered_revision(name: str) -> str | None:
    """The commit that `name` (a Hub set and revision) stood at when it was last seen, for offline runs."""
    with _memory() as memory:
        row = memory.execute("SELECT commit_hash FROM revisions WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else None


def remember_revision(name: str, commit: str) -> None:
    """Remember the commit of a Hub set and revision."""
    with _memory() as memory:
        _write(memory, "INSERT OR REPLACE INTO revisions VALUES (?, ?)", [(name, commit)])


def are_verified(files: Sequence[Verified]) -> list[bool]:
    """Whether each file was verified as it is now. A memory that cannot be read knows none."""
    query = "SELECT * FROM verified WHERE path = ?"
    try:
        with _memory() as memory:
            return [memory.execute(query, (file.path,)).fetchone() == file for file in files]
    except sqlite3.DatabaseError:
        return [False] * len(files)


def remember_verified(files: Sequence[Verified]) -> None:
    """Remember files whose checksums were found right."""
    if files:
        with _memory() as memory:
            _write(memory, "INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?, ?)", files)


def _write(memory: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Write rows, or not: without a memory that can be written (read-only, full disk) work is done again, no more."""
    with contextlib.suppress(sqlite3.DatabaseError):
        memory.executemany(statement, rows)
        memory.commit()


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    """Open the memory; one that is damaged, or lies in a folder that cannot be written, is replaced or done without."""
    path = cache_root() / "contents.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = _connect(str(path))
    except sqlite3.DatabaseError as error:
        if "not a database" not in str(error) and "malformed" not in str(error):
            connection = _connect(":memory:")
        else:
            path.unlink(missing_ok=True)
            connection = _connect(str(path))
    except OSError:
        connection = _connect(":memory:")
    try:
        yield connection
    finally:
        connection.close()


def _connect(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=30)
    try:
        for table in _TABLES:
            connection.execute(table)
        connection.commit()
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


class _Later:
    """Rows that are written together, some hundred or those of a second: a commit takes longer than a small file."""

    def __init__(self, memory: sqlite3.Connection, statement: str) -> None:
        self._memory = memory
        self._statement = statement
        self._rows: list[tuple[Any, ...]] = []
        self._written = time.monotonic()

    def __enter__(self) -> _Later:
        return self

    def __exit__(self, *args: object) -> None:
        self._write()

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_AT_ONCE or time.monotonic() - self._written > 1:
            self._write()

    def _write(self) -> None:
        if self._rows:
            _write(self._memory, self._statement, self._rows)
        self._rows = []
        self._written = time.monotonic()


def _real(path: str, folders: dict[str, str]) -> str:
    """The path without links; `folders` remembers those of its folders."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)
