"""The files in .zip and .tar archives, read where they stand: nothing is extracted, so no path of theirs matters.

A tar is streamed in its own order, decompressed by `streams`; a zip has an index, so its members come sorted by name.
What is hidden, a link, a folder, another archive or no readable format is left out. A member that cannot be read costs
that member; damage of a tar itself ends it.
"""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Protocol

from gptcli.data.reading.row import BadRow, Part, Row, Rows
from gptcli.data.reading.streams import DamagedError, Pieces, buffered, decompressed, faults_of
from gptcli.errors import DataError

ARCHIVES = (".zip", ".tar")
_TAR_BLOCK = 1 << 16


class Formats(Protocol):
    """What an archive has to know of the formats: which members can be read, how, and what to say if none can."""

    def is_member(self, name: str) -> bool:
        """Whether a member of this name can be read."""

    def rows(self, part: Part, name: str) -> Rows:
        """The rows of a member, its compression undone by its name."""

    def suffixes(self) -> str:
        """The suffixes that are read, for messages."""


def zip_rows(part: Part, formats: Formats) -> Rows:
    """The rows of the members of a .zip, sorted by name."""
    if part.path is None:
        raise ValueError("a .zip is read from its end, so it has to be a file")
    with faults_of(".zip"):
        archive = zipfile.ZipFile(part.path)
    with archive:
        infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
        chosen = [info for info in infos if not stat.S_ISLNK(info.external_attr >> 16)]
        chosen = sorted((info for info in chosen if _is_chosen(info.filename, formats)), key=lambda i: i.filename)
        _require_members(chosen, len(infos), part, formats)
        done = 0
        for info in chosen:
            progress = _share(part.on_position, done, info.compress_size, info.file_size)
            yield from _zip_member(archive, info, part, formats, progress)
            done += info.compress_size
            if part.on_position is not None:
                part.on_position(done)


def _zip_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, part: Part, formats: Formats, on_read: Callable[[int], None] | None
) -> Rows:
    name = _member_name(info.filename)
    if info.flag_bits & 0x1:
        yield BadRow(1, "damaged file", "is encrypted in the .zip file and cannot be read", name)
        return
    try:
        with faults_of(".zip"):
            file: Any = archive.open(info)
    except DamagedError as error:
        yield BadRow(1, "damaged file", error.reason, name)
        return
    with file:
        pieces = Pieces(file.read1, ".zip", on_read, lambda: info.compress_size)
        yield from _member_rows(pieces, name, part, formats)


def _share(
    on_position: Callable[[int], None] | None, done: int, packed: int, unpacked: int
) -> Callable[[int], None] | None:
    """Tell how much of the archive has been read from how much has come out of a member."""
    if on_position is None:
        return None
    told = on_position
    out = 0

    def on_read(count: int) -> None:
        nonlocal out
        out += count
        told(done + packed * min(out, unpacked) // max(1, unpacked))

    return on_read


def tar_rows(part: Part, compression: str, formats: Formats) -> Rows:
    """The rows of the members of a .tar in its order; `compression` is that of the whole archive."""
    what = f".tar{compression}"
    stream = decompressed(part.stream, compression, what)
    found = others = 0
    with faults_of(what):
        archive = _Tar.open(fileobj=stream, mode="r|", bufsize=_TAR_BLOCK, tarinfo=_Member)
    with archive:
        while True:
            with faults_of(what):
                info = archive.next()
                # tarfile keeps all members that it has passed; a tar of millions would fill the memory.
                archive.members = []  # type: ignore[attr-defined]
            if info is None:
                break
            if not info.isreg() or not _is_chosen(info.name, formats):
                others += not info.isdir()
                continue
            found += 1
            with faults_of(what):
                file = archive.extractfile(info)
            if file is not None:
                pieces = Pieces(file.read, what)
                yield from _member_rows(pieces, _member_name(info.name), part, formats)
                if pieces.failed:
                    return
    fault = getattr(archive, "fault", None)
    if not isinstance(fault, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
        raise DamagedError(f"the {what} file is damaged or truncated ({fault or 'its end is missing'})")
    _require_members(found, others, part, formats)


class _Tar(tarfile.TarFile):
    """A tar that remembers why its reading ended: tarfile itself takes a truncated header for the end."""

    fault: Exception | None = None


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.fault = error
            raise


def _member_rows(pieces: Pieces, name: str, part: Part, formats: Formats) -> Rows:
    member = Part(buffered(pieces), f"{part.place}!{name}")
    for row in formats.rows(member, name):
        if isinstance(row, BadRow):
            yield BadRow(row.number, row.kind, row.reason, name)
        else:
            yield Row(row.number, row.text, row.identity, name, row.values)


def _is_chosen(name: str, formats: Formats) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return not hidden and formats.is_member(name)


def _member_name(name: str) -> str:
    # tarfile hands on bytes that are no UTF-8 as lone surrogates, which no report could hold.
    return name.removeprefix("./").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _require_members(found: Any, others: int, part: Part, formats: Formats) -> None:
    if not found:
        raise DataError(
            f"the archive holds no file that can be read ({others} others)",
            where=part.place,
            remedy=f"Files that are read in archives: {formats.suffixes()}.",
        )
