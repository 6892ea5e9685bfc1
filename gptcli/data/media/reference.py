"""The values of the columns `images`, `audios` and `videos`, made one small plain value each that a worker can be sent.

A value is a path, bytes, a base64 data URL, a URL where they are allowed, a value of the features `Image` and `Audio`
of `datasets`, or a list of any of these. A path belongs to its data file: it is relative to that file's folder, and
once every link and `..` in it is followed, it has to end in there. Nothing is opened here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from gptcli.data.media.fault import Kind, MediaFault, shown_name, unreadable
from gptcli.data.media.fetch import fetched
from gptcli.data.reading.row import kind_of, listed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK = 1 << 20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
# By which a list of videos is told from a list of the frames of one.
_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv")


@dataclass(frozen=True)
class Samples:
    """A sound that is decoded already: `values` of one dimension or two, the shorter of them channels; `rate` in Hz."""

    values: NDArray[np.generic] = field(repr=False)
    rate: int


@dataclass(frozen=True, eq=False)
class Media:
    """One image, sound or video, not yet opened: a path without links, a URL, the bytes of a file, or samples.

    `name` is what messages call it. It can be pickled, and takes the memory of its bytes only.
    """

    name: str
    source: Path | Url | bytes | Samples = field(repr=False)


@dataclass(frozen=True)
class Url:
    """An address that may be fetched from."""

    address: str


@dataclass(frozen=True)
class Reach:
    """What the values of a data file may name: files below `folder` (a path without links), more where it says so."""

    folder: Path
    allow_outside: bool = False
    allow_urls: bool = False
    urls_by: str = "data.allow_urls is true"  # what lets them be fetched, for messages

    @classmethod
    def of(cls, data_file: Path, **allowed: Any) -> Reach:
        """That of the rows of a file; `allowed`: what else a `Reach` says."""
        return cls(Path(os.path.realpath(data_file.parent)), **allowed)


Video: TypeAlias = Media | list[Media]


def media_of(value: Any, reach: Reach) -> list[Media]:
    """The images or sounds that one value of a row holds, in order; none for null and an empty list.

    Raises:
        MediaFault: a value is none of what it may be, or names what it must not.
    """
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [_one(item, reach) for item in value]
    return [_one(value, reach)]


def videos_of(value: Any, reach: Reach) -> list[Video]:
    """The videos that one value of a row holds: each a file or a list of frames.

    A list of lists is several videos, a flat list the frames of one, unless all in it are named as files of videos.

    Raises:
        MediaFault: as `media_of`.
    """
    if not isinstance(value, list | tuple):
        return [*media_of(value, reach)]
    if any(isinstance(item, list | tuple) for item in value):
        return [media_of(item, reach) if isinstance(item, list | tuple) else _one(item, reach) for item in value]
    items = media_of(value, reach)
    if all(item.name.lower().endswith(_VIDEO_SUFFIXES) for item in items):
        return [*items]
    return [items]


def _one(value: Any, reach: Reach) -> Media:
    if isinstance(value, str):
        return _named(value, reach)
    if isinstance(value, os.PathLike):
        return _file(os.fsdecode(value), reach)
    if isinstance(value, bytes | bytearray | memoryview):
        return Media("the value", bytes(value))
    if isinstance(value, dict):
        return _feature(value, reach)
    raise MediaFault("the value", "not media", f"is {kind_of(value)}: neither a path nor bytes")


def _feature(value: dict[str, Any], reach: Reach) -> Media:
    """A value of the features of `datasets`: {"bytes", "path"}, one of them null, or {"array", "sampling_rate"}."""
    path, data, array = value.get("path"), value.get("bytes"), value.get("array")
    name = shown_name(path) if isinstance(path, str) and path else "the value"
    if array is not None:
        return Media(name, _samples(name, array, value.get("sampling_rate")))
    if isinstance(data, bytes | bytearray | memoryview):
        return Media(name, bytes(data))
    if data is not None:
        raise MediaFault(name, "not media", f"has under 'bytes' {kind_of(data)}, no bytes")
    if isinstance(path, str):
        return _named(path, reach)
    raise MediaFault(name, "not media", f"has neither bytes, path nor array, only {listed(map(str, value))}")


def _samples(name: str, array: Any, rate: Any) -> Samples:
    import numpy as np

    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not float(rate).is_integer():
        raise MediaFault(name, "not media", f"has the sampling rate {shown_name(str(rate))}, no number of Hz")
    try:
        values = np.asarray(array)
    except (ValueError, TypeError, OverflowError):
        values = np.empty(0, dtype=object)
    if values.dtype.kind == "f":
        return Samples(values, int(rate))
    if values.dtype in (np.int16, np.int32):
        return Samples(values.astype(np.float32) / np.float32(-float(np.iinfo(values.dtype).min)), int(rate))
    # Whole numbers of another width have no scale that everybody agrees on.
    raise MediaFault(name, "not media", f"has an array of {values.dtype}, not of floats, int16 or int32")


def _named(text: str, reach: Reach) -> Media:
    """What a text stands for: a data URL, a URL or a path."""
    if text[:5].lower() == "data:":
        return _data_url(text)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _file(text, reach)
    name = shown_name(text)
    if scheme[1].lower() not in ("http", "https"):
        raise MediaFault(name, "not fetched", f"is a URL of the kind {scheme[1]}, which is not fetched")
    if not reach.allow_urls:
        raise MediaFault(name, "not fetched", f"is a URL, which is not fetched unless {reach.urls_by}")
    return Media(name, Url(text))


def _data_url(text: str) -> Media:
    head = _DATA_URL.match(text)
    name = shown_name(f"{text[:40]}..." if len(text) > 40 else text)
    if head is None or not head[0][:-1].lower().endswith(";base64"):
        raise MediaFault(name, "not media", "is a data URL, but not one of base64")
    body = "".join(text[head.end() :].split())
    try:
        return Media(name, base64.b64decode(body + "=" * (-len(body) % 4), validate=True))
    except (binascii.Error, ValueError):
        raise MediaFault(name, "damaged file", "is a data URL whose base64 is damaged") from None


def _file(text: str, reach: Reach) -> Media:
    name = shown_name(text)
    if not text:
        raise MediaFault("the value", "not media", "is an empty text, no path")
    try:
        path = Path(os.path.realpath(reach.folder / text))
    except (ValueError, OSError):  # a NUL, a lone surrogate
        raise MediaFault(name, "missing file", "is no name that a file can have") from None
    if not reach.allow_outside and not path.is_relative_to(reach.folder):
        raise MediaFault(name, "outside the folder", "lies outside the folder of the data file")
    return Media(name, path)


@contextlib.contextmanager
def opened(media: Media) -> Iterator[BinaryIO]:
    """The bytes of a medium as a file that can seek, at its start; a URL is fetched first.

    Raises:
        MediaFault: there is no such file, it is none, it cannot be read or is empty, or the URL cannot be fetched.
    """
    if isinstance(media.source, Path):
        with _open_file(media.name, media.source) as file:
            yield file
        return
    if isinstance(media.source, Samples):
        raise MediaFault(media.name, "not media", "is a sound that is decoded already")
    data = fetched(media.source.address, media.name) if isinstance(media.source, Url) else media.source
    if not data:
        raise MediaFault(media.name, "damaged file", "is empty")
    with io.BytesIO(data) as file:
        yield file


def _open_file(name: str, path: Path) -> BinaryIO:
    try:
        # Not blocking, since a pipe would never open; what is no file is refused before a byte is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(name, error) from None
    except ValueError:
        raise MediaFault(name, "missing file", "is no name that a file can have") from None
    try:
        about = os.fstat(descriptor)
        kind: Kind = "damaged file" if stat.S_ISREG(about.st_mode) else "not media"
        if not stat.S_ISREG(about.st_mode):
            reason = "is a folder, not a file" if stat.S_ISDIR(about.st_mode) else "is no regular file"
            raise MediaFault(name, kind, reason)
        if not about.st_size:
            raise MediaFault(name, kind, "is empty")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def content_hash(media: Media) -> str:
    """32 hexadecimal digits of what a medium holds (xxh3_128), the same wherever the same bytes lie.

    For caches: it says nothing of how the bytes are decoded. A file is read in blocks, a URL fetched.

    Raises:
        MediaFault: as `opened`.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    if isinstance(media.source, Samples):
        values = media.source.values
        digest.update(f"samples {values.dtype.str} {values.shape} {media.source.rate} ".encode())
        digest.update(values.tobytes())
        return digest.hexdigest()
    with opened(media) as file:
        try:
            while block := file.read(_BLOCK):
                digest.update(block)
        except OSError as error:
            raise unreadable(media.name, error) from None
    return digest.hexdigest()
