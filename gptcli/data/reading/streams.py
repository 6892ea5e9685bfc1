"""Bytes of files: a range of one, the four compressions, and lines cut from them without a loss at a damaged place.

Every fault of a compression library becomes a `DamagedError`, whatever it is called there; a fault of the disk stays
an OSError. Decompression hands on what it has before it reads more, so that all lines before a damage are read, and
its memory is one block, whatever a file expands to. What expands as no text does is taken for a bomb.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import zstandard

from gptcli.data.reading.row import BadRow, Part, not_utf8_row

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
BLOCK = 1 << 18
BOM = b"\xef\xbb\xbf"
# A line or a document is held in memory, so what a few bytes expand to has to end. Text of 256 MiB that compresses to a
# two-hundredth is not known; zeros in gzip compress to a thousandth, in zstd and xz without an end.
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
_ZSTD_FEED = 1 << 12  # one frame's block of 4 bytes may stand for 128 KiB, so little is fed at once
# What the libraries raise for bytes that are not theirs. RuntimeError is zipfile's word for an encrypted member.
FAULTS: tuple[type[Exception], ...] = (
    *(EOFError, ValueError, RuntimeError, ArithmeticError, LookupError, struct.error),
    *(zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile, tarfile.TarError),
)


class DamagedError(Exception):
    """Compressed or archived bytes are damaged or truncated; `number` is the row at which that was met."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.number = 1


@contextlib.contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Turn every fault that a library finds in its bytes into a `DamagedError` that names `what` is damaged."""
    try:
        yield
    except FAULTS as error:
        raise _damaged(what, error) from None
    except OSError as error:  # bz2, gzip and zipfile raise it for wrong bytes too, but then without a number
        if error.errno is not None:
            raise
        raise _damaged(what, error) from None


def _damaged(what: str, error: Exception) -> DamagedError:
    return DamagedError(f"the {what} file is damaged or truncated ({str(error) or type(error).__name__})")


class FileRange(io.RawIOBase):
    """The bytes [begin, end) of an open file; `on_position` is told how many of them have been read."""

    def __init__(
        self,
        file: io.FileIO,
        begin: int = 0,
        end: int | None = None,
        on_position: Callable[[int], None] | None = None,
    ) -> None:
        self._file = file
        self._left = None if end is None else max(0, end - begin)
        self.done = 0
        self._on_position = on_position
        if begin:
            file.seek(begin)

    def readable(self) -> bool:
        """Whether it can be read, which it can."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` as much as one system call gives."""
        view = memoryview(buffer)
        if self._left is not None:
            view = view[: self._left]
        count = self._file.readinto(view) or 0
        self._count(count)
        return count

    def readall(self) -> bytes:
        """All that is left, in one piece of memory where it is the whole file."""
        data = self._file.readall() if self._left is None else self._file.read(self._left)
        self._count(len(data))
        return data

    def _count(self, count: int) -> None:
        self.done += count
        if self._left is not None:
            self._left -= count
        if self._on_position is not None:
            self._on_position(self.done)


class Pieces(io.RawIOBase):
    """A stream from a function `read` of a library (at most that many bytes, b"" at the end), with its faults named.

    `failed` tells after a `DamagedError` that it came from here, and not from a stream around this one. `packed` tells
    how many compressed bytes have gone into it, where it expands them.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        what: str,
        on_read: Callable[[int], None] | None = None,
        packed: Callable[[], int] | None = None,
    ) -> None:
        self._read = read
        self._what = what
        self._on_read = on_read
        self._packed = packed
        self.done = 0
        self.failed = False

    def readable(self) -> bool:
        """Whether it can be read, which it can."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` what the library has at hand."""
        try:
            with faults_of(self._what):
                data = self._read(len(buffer))
        except DamagedError:
            self.failed = True
            raise
        buffer[: len(data)] = data
        self.done += len(data)
        if self._packed is not None and self.done > max(BOMB_BYTES, BOMB_RATIO * self._packed()):
            self.failed = True
            raise DamagedError(
                f"the {self._what} file expands to more than {BOMB_RATIO} times its size, as no text does"
            )
        if self._on_read is not None:
            self._on_read(len(data))
        return len(data)

    def readall(self) -> bytes:
        """All that is left."""
        return b"".join(iter(lambda: self.read(BLOCK), b""))


def buffered(raw: io.RawIOBase) -> io.BufferedReader:
    """A raw stream with a buffer of one block."""
    return io.BufferedReader(raw, BLOCK)


def decompressed(stream: io.BufferedReader, compression: str, what: str = "") -> io.BufferedReader:
    """The stream without its compression ("": the same stream). A file of no bytes has no content, and no fault.

    `what` is damaged where it is not simply a file of that compression.
    """
    if not compression or not stream.peek(1):
        return stream
    read: Callable[[int], Any]
    if compression == ".zst":
        read = _Zstd(stream).read
    elif compression == ".gz":
        read = gzip.GzipFile(fileobj=stream).read1
    else:
        unpacked = lzma.LZMAFile(stream) if compression == ".xz" else bz2.BZ2File(stream)  # noqa: SIM115  # holds no file
        read = unpacked.read1
    raw = stream.raw
    packed = (lambda: raw.done) if isinstance(raw, FileRange | Pieces) else None
    return buffered(Pieces(read, what or compression, packed=packed))


class _Zstd:
    """Frame after frame; unlike with `zstandard.stream_reader`, a truncated last frame is an EOFError."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._compressed = b""
        self._data = memoryview(b"")

    def read(self, size: int) -> memoryview:
        while not self._data and self._fill():
            pass
        piece, self._data = self._data[:size], self._data[size:]
        return piece

    def _fill(self) -> bool:
        compressed = self._compressed or self._stream.read(_ZSTD_FEED)
        self._compressed = b""
        if not compressed:
            if self._frame is not None:
                raise EOFError("the last frame is not complete")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        self._data = memoryview(self._frame.decompress(compressed))
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
        return True


def line_blocks(part: Part) -> Iterator[bytes]:
    """The bytes of a part in blocks of whole lines, without a BOM; memory is a block, or a line that is longer."""
    head = part.stream.read(len(BOM))
    pending = [head.removeprefix(BOM) if part.from_start else head]
    while block := part.stream.read1(BLOCK):
        cut = block.rfind(b"\n") + 1
        if not cut:
            pending.append(block)
            continue
        pending.append(block[:cut])
        yield _taken(pending)
        pending.append(block[cut:])
    if any(pending):
        yield _taken(pending)


def _taken(pending: list[bytes]) -> bytes:
    block = b"".join(pending)
    pending.clear()  # so that nothing but the reader of the block holds its bytes
    return block


def raw_lines(part: Part) -> Iterator[bytes]:
    """The lines of a part with their ends, without a BOM."""
    number = 1
    try:
        for block in line_blocks(part):
            for line in io.BytesIO(block):
                number += 1
                yield line
    except DamagedError as error:
        error.number = number
        raise


def text_lines(part: Part) -> Iterator[tuple[int, list[Any], bool]]:
    """(number of the first, lines without their ends, whether all are texts) block after block.

    A line that is not UTF-8 is a `BadRow` in the place of its text. A block is decoded and cut as one, which is several
    times as fast as line by line.
    """
    number = 1
    blocks = line_blocks(part)
    while True:
        try:
            block = next(blocks, None)
        except DamagedError as error:
            error.number = number
            raise
        if block is None:
            return
        lines, clean = _cut(number, block)
        del block
        count = len(lines)
        yield number, lines, clean
        number += count


def _cut(number: int, block: bytes) -> tuple[list[Any], bool]:
    try:
        text = block.decode()
    except UnicodeDecodeError:
        raw = block.removesuffix(b"\n").split(b"\n")
        return [_decoded(number + index, line.removesuffix(b"\r")) for index, line in enumerate(raw)], False
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return ([line.removesuffix("\r") for line in lines] if "\r" in text else lines), True


def _decoded(number: int, line: bytes) -> str | BadRow:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return not_utf8_row(number, error)
