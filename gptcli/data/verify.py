"""Whether the files of a shard are what was written: size and header always, each MiB's checksum when there is reason.

The checksums are xxh3_64 (12 GB/s a core from the page cache, where sha256 does 1.8), 16 hexadecimal digits a MiB in
one string. What was found good is remembered by size, time of change and inode, so that a large data set costs its
files' stats at the next start and is read again only where something changed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from gptcli.data.contents import SETTLED_SECONDS, Verified, are_verified, remember_verified
from gptcli.errors import DataError

BLOCK_BYTES = 1 << 20
DIGITS = 16
# Up to here reading everything costs less than a second; above it, what changed since the last time is read.
ALWAYS_BYTES = 1_000_000_000
# One thread reads 12 GB/s from memory and a disk is slower: more threads are for its queue.
_THREADS = 4
_MAGIC_BYTES = 6


@dataclass(frozen=True)
class Expected:
    """What a file should be.

    Attributes:
        path: the file.
        kind: what it holds, in words, for messages.
        header: its first bytes.
        size: its bytes, header included.
        blocks: the xxh3_64 of each MiB, joined.
    """

    path: Path
    kind: str
    header: bytes
    size: int
    blocks: str


def file_hashes(path: Path) -> tuple[str, str]:
    """(sha256 of a file, xxh3_64 of each MiB of it joined), both hexadecimal, in one pass: 1.4 GB/s."""
    sha256 = hashlib.sha256()
    blocks = []
    for block in _blocks(path):
        sha256.update(block)
        blocks.append(xxhash.xxh3_64_hexdigest(block))
    return sha256.hexdigest(), "".join(blocks)


def check(files: Sequence[Expected], verify: bool | None) -> None:
    """Check files of one folder.

    Args:
        files: what they should be.
        verify: True checks every block, False only sizes and headers. None checks the blocks when all the files are at
            most 1 GB, else those of files whose stat is not the one of their last verification.

    Raises:
        DataError: names the first file that is missing, unreadable or wrong, the bytes that are wrong, and the remedy.
    """
    states = [_check_shape(file) for file in files]
    if verify is False:
        return
    # One folder: to resolve every path would take as long as all else of a start that finds nothing new.
    folder = files[0].path.parent.resolve() if files else Path()
    rows = [_row(folder, file, state) for file, state in zip(files, states, strict=True)]
    known = are_verified(rows)
    everything = verify or sum(file.size for file in files) <= ALWAYS_BYTES
    started = time.time()
    chosen = [file for file, good in zip(files, known, strict=True) if everything or not good]
    with ThreadPoolExecutor(min(_THREADS, len(chosen) or 1)) as threads:
        for _ in threads.map(_check_blocks, chosen):
            pass
    remember_verified(
        [
            row
            for row, state, good in zip(rows, states, known, strict=True)
            if not good and started - state.st_mtime > SETTLED_SECONDS
        ]
    )


def broken(path: Path, what: str, folder: Path) -> DataError:
    """The error for a file of prepared data; `folder` is what to delete."""
    return DataError(
        what,
        where=str(path),
        remedy=f"Delete the folder and run again: rm -r {shlex.quote(str(folder))}",
    )


def unreadable(error: OSError) -> str:
    """Why a file cannot be read, without the path that the message has before it."""
    return f"cannot be read: {os.strerror(error.errno) if error.errno else error}"


def _check_shape(file: Expected) -> os.stat_result:
    """Check size and header; the stat, taken before anything is read."""
    try:
        state = file.path.stat()
        # Before it is opened: a pipe would block, and a folder has a message of its own.
        if not stat.S_ISREG(state.st_mode):
            raise _wrong(file, f"is not a shard: it is {'a folder' if stat.S_ISDIR(state.st_mode) else 'not a file'}")
        with file.path.open("rb") as opened:
            header = opened.read(len(file.header))
    except FileNotFoundError:
        raise _wrong(file, "is missing") from None
    except OSError as error:
        raise _wrong(file, unreadable(error)) from None
    if header and header[:_MAGIC_BYTES] != file.header[: min(_MAGIC_BYTES, len(header))]:
        raise _wrong(file, "is not a shard: it does not begin as a .npy")
    if state.st_size != file.size:
        raise _wrong(file, f"has {state.st_size:,} bytes, not {file.size:,}")
    if header != file.header:
        raise _wrong(file, f"is not a shard of this data: it does not begin as a .npy of {file.kind}")
    return state


def _check_blocks(file: Expected) -> None:
    try:
        found = [xxhash.xxh3_64_hexdigest(block) for block in _blocks(file.path)]
    except OSError as error:
        raise _wrong(file, unreadable(error)) from None
    expected = [file.blocks[begin : begin + DIGITS] for begin in range(0, len(file.blocks), DIGITS)]
    # A file that shrank since its size was checked has fewer blocks.
    found += [""] * (len(expected) - len(found))
    wrong = [index for index, (is_, should) in enumerate(zip(found, expected, strict=False)) if is_ != should]
    if wrong or len(found) != len(expected):
        first = wrong[0] if wrong else len(expected)
        begin, end = first * BLOCK_BYTES, min((first + 1) * BLOCK_BYTES, file.size)
        count = f" ({len(wrong):,} of its {len(expected):,} blocks are wrong)" if len(wrong) > 1 else ""
        raise _wrong(file, f"bytes {begin:,} to {end:,} are not what was written{count}")


def _blocks(path: Path) -> Iterator[memoryview]:
    """The MiBs of a file, one after the other in the same memory."""
    memory = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while True:
            filled = 0
            # A read may return less than was asked for, on a network file system for one.
            while filled < BLOCK_BYTES and (count := file.readinto(memory[filled:])):
                filled += count
            if filled:
                yield memory[:filled]
            if filled < BLOCK_BYTES:
                return


def _row(folder: Path, file: Expected, state: os.stat_result) -> Verified:
    # The checksums are part of it: a file that was good under another manifest is not known to be so under this one.
    blocks = hashlib.sha256(file.blocks.encode()).hexdigest()
    return Verified(str(folder / file.path.name), state.st_size, state.st_mtime_ns, state.st_ino, blocks)


def _wrong(file: Expected, what: str) -> DataError:
    # The folder of a side lies in the folder of the data set.
    return broken(file.path, what, file.path.parent.parent)
