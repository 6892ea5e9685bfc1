"""One sound -> float32, mono, at the rate that the processor wants: libsndfile reads, soxr resamples, in blocks.

How long it lasts is checked from the header before anything is decoded, and counted while it is, so that memory is
what may be kept of it at the wanted rate, and one block. What libsndfile says to end early is a fault; of an MP3 of
varying bit rate without the usual Xing header it reads only as much as it guesses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from gptcli.data.media.fault import Kind, MediaFault, library_faults
from gptcli.data.media.reference import Media, Samples, opened
from gptcli.errors import first_line, not_installed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK_SAMPLES = 1 << 18
# Resampling from 2 GHz takes a minute whatever the sound, and nobody hears a sound of less than 500 Hz.
_RATES = range(1_000, 1_000_001)
# libsndfile's mark of a length that the header does not tell, and what writers to a pipe put there.
_UNKNOWN_FRAMES, _UNKNOWN_BYTES = 1 << 62, 0x7FFF0000
# What libsndfile notes of a file shorter than its header says (not RIFF and FORM, which many writers get wrong).
_SIZES = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# The last frames of an MP3 may be padding that a header counts.
_MP3_SLACK = 2 * 1152
_NOT_RECOGNISED = 1
# The largest that a page of an Ogg file can be.
_OGG_PAGE = 27 + 255 + 255 * 255


@dataclass(frozen=True)
class _Sound:
    """A sound whose header has been read: `frames` is how many it says to have, None if it does not say."""

    rate: int
    frames: int | None
    slack: int
    blocks: Iterator[NDArray[Any]]


def load_audio(media: Media, rate: int, *, max_seconds: float, cut: bool = False) -> NDArray[np.float32]:
    """The samples of a sound at `rate` Hz, its channels averaged: shape (samples,), 1.0 is full scale.

    Args:
        media: the sound.
        rate: of the result, in Hz; resampled with soxr's HQ.
        max_seconds: a longer sound is a fault, or ends there with `cut`.
        cut: keep the first `max_seconds` of a longer one.

    Raises:
        MediaFault: it cannot be read, is no sound, damaged, truncated, too long, without samples, or holds NaN.
        MissingError: soundfile or soxr is not installed.
    """
    if importlib.util.find_spec("soxr") is None:
        raise not_installed("reading sounds", "soxr", "multimodal")
    import numpy as np

    name = media.name
    with _sound(media) as sound:
        if sound.rate not in _RATES:
            raise MediaFault(name, "not media", f"has a sampling rate of {sound.rate:,} Hz")
        if sound.frames is not None and sound.frames > max_seconds * sound.rate and not cut:
            raise _too_long(name, f"{sound.frames / sound.rate:,.6g} s,", max_seconds)
        parts = [*_resampled(_kept(sound, name, max_seconds, cut), sound.rate, rate)]
    samples: NDArray[np.float32] = np.concatenate(parts)
    if not samples.size:
        raise MediaFault(name, "damaged file", "has no samples")
    return samples


def _resampled(blocks: Iterator[NDArray[np.float32]], source: int, rate: int) -> Iterator[NDArray[np.float32]]:
    if source == rate:
        yield from blocks
        return
    import numpy as np
    import soxr

    stream = soxr.ResampleStream(source, rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, dtype=np.float32), last=True)


def _kept(sound: _Sound, name: str, max_seconds: float, cut: bool) -> Iterator[NDArray[np.float32]]:
    """The blocks of a sound as mono, checked, and no more of them than may be kept."""
    import numpy as np

    most = math.floor(max_seconds * sound.rate)
    seen = 0
    for block in sound.blocks:
        if seen + len(block) > most and not cut:  # the header said less, or nothing
            raise _too_long(name, "", max_seconds)
        block = block[: most - seen]
        if not np.isfinite(block).all():
            raise MediaFault(name, "not finite", f"holds {'NaN' if np.isnan(block).any() else 'infinity'}")
        seen += len(block)
        yield block if block.ndim == 1 else block.mean(axis=1, dtype=np.float32)
        if cut and seen >= most:
            return
    if not seen:
        raise MediaFault(name, "damaged file", "has no samples")
    if sound.frames is not None and seen + sound.slack < sound.frames:
        raise MediaFault(name, "damaged file", _truncated(seen, sound.frames))


@contextlib.contextmanager
def _sound(media: Media) -> Iterator[_Sound]:
    if isinstance(media.source, Samples):
        yield _of_samples(media.source, media.name)
        return
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its libsndfile
        raise not_installed("reading sounds", "soundfile", "multimodal") from None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(media))
        # By its number: into a file of Python's libsndfile calls back, and what is raised there is printed and lost.
        if isinstance(file, io.BytesIO):
            with library_faults(media.name, _fault):
                held = stack.enter_context(_numbered())
                shutil.copyfileobj(file, held)
                held.seek(0)
            file = held
        with library_faults(media.name, _fault):
            sound: Any = stack.enter_context(soundfile.SoundFile(file.fileno(), closefd=False))
        if sound.format == "OGG" and not _has_last_page(file.fileno()):
            raise MediaFault(media.name, "damaged file", "ends in the middle (truncated): its last page is missing")
        yield _of_file(sound, media.name)


def _numbered() -> BinaryIO:
    """An empty file that has a number, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("sound"), "r+b")
    return cast("BinaryIO", tempfile.TemporaryFile())


def _of_file(sound: Any, name: str) -> _Sound:
    # soundfile seeks after every read, which a FLAC without a length cannot; it does not where it believes that.
    sound.seekable = lambda: False
    frames = sound.frames if sound.frames < _UNKNOWN_FRAMES else None
    for told, found in _SIZES.findall(sound.extra_info):
        if int(found) < int(told) < _UNKNOWN_BYTES:
            raise MediaFault(name, "damaged file", _truncated(int(found), int(told), "bytes"))
    return _Sound(sound.samplerate, frames, _MP3_SLACK if sound.format == "MP3" else 0, _read(sound, frames, name))


def _has_last_page(descriptor: int) -> bool:
    """Whether an Ogg file ends with a whole page that is marked as the last one (RFC 3533, section 6)."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, min(size, 2 * _OGG_PAGE), max(0, size - 2 * _OGG_PAGE))
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return False
    segments = page[27 : 27 + page[26]]
    return bool(page[5] & 4) and len(segments) == page[26] and len(page) >= 27 + len(segments) + sum(segments)


def _read(sound: Any, frames: int | None, name: str) -> Iterator[NDArray[np.float32]]:
    # One more than there are, so that a short sound is one read: a read fills up its whole block with zeros.
    count = min(max(1, _BLOCK_SAMPLES // sound.channels), _UNKNOWN_FRAMES if frames is None else frames + 1)
    while True:
        with library_faults(name, _fault):
            block = sound.read(count, dtype="float32", always_2d=True)
        if len(block):
            yield block
        if len(block) < count:
            return


def _of_samples(samples: Samples, name: str) -> _Sound:
    import numpy as np

    values = samples.values
    if values.ndim not in (1, 2):
        raise MediaFault(name, "not media", f"has an array of {values.ndim} dimensions, not of samples or channels")
    values = values.T if values.ndim == 2 and values.shape[0] < values.shape[1] else values
    with np.errstate(over="ignore"):  # then it is infinity, which is refused
        values = values.astype(np.float32)
    blocks = (values[start : start + _BLOCK_SAMPLES] for start in range(0, len(values), _BLOCK_SAMPLES))
    return _Sound(samples.rate, len(values), 0, blocks)


def _too_long(name: str, lasts: str, max_seconds: float) -> MediaFault:
    return MediaFault(name, "too large", f"lasts {lasts} more than {max_seconds:,.6g} s".replace("  ", " "))


def _truncated(found: int, told: int, what: str = "samples") -> str:
    return f"ends in the middle (truncated): {found:,} of {told:,} {what}"


def _fault(error: Exception) -> tuple[Kind, str]:
    if getattr(error, "code", None) == _NOT_RECOGNISED:
        return "not media", "is not a sound (wav, flac, ogg, mp3, aiff, au and caf are read)"
    said = getattr(error, "error_string", None) or first_line(error)
    return "damaged file", f"is damaged or ends in the middle (truncated): {said}"
