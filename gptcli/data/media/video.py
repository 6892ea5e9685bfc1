"""One video -> some of its frames as images, evenly spaced: from a list of frames, or a file if PyAV is installed.

A file is gone through twice, once for its number of frames, which headers do not tell reliably, and once up to the last
frame that is wanted; memory is the frames that are kept. A rotation that a container notes is not applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptcli.data.media.fault import Kind, MediaFault, library_faults
from gptcli.data.media.image import MAX_PIXELS, check_pixels, load_image
from gptcli.data.media.reference import Media, Samples, Video, opened
from gptcli.errors import first_line, not_installed

if TYPE_CHECKING:
    from PIL.Image import Image

# Of FFmpeg's demuxers those of one file: others (hls, concat, dash) open what a file names, on this machine or another.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif,h264,hevc,ivf"


def load_video(video: Video, count: int, *, max_seconds: float, max_pixels: int = MAX_PIXELS) -> list[Image]:
    """`count` frames of a video in the order of time as images of mode RGB, or all of one that has no more.

    Kept is the frame in the middle of each of `count` equal parts. `max_seconds` limits a file, `max_pixels` a frame.

    Raises:
        MediaFault: a frame or the file cannot be read, is none, damaged, truncated, without frames, or too large.
        MissingError: Pillow, or PyAV for a file, is not installed.
    """
    if count < 1:
        raise ValueError(f"{count} frames of a video")
    if isinstance(video, list):
        if not video:
            raise MediaFault("the value", "not media", "is a video without frames")
        return [load_image(video[index], max_pixels=max_pixels) for index in evenly(len(video), count)]
    if isinstance(video.source, Samples):
        raise MediaFault(video.name, "not media", "is a sound, not a video")
    try:
        import av
    except ImportError:
        raise not_installed("reading files of videos", "av", "video") from None
    total = _count_frames(av, video, max_seconds, max_pixels)
    wanted = evenly(total, count)
    images: list[Image] = []
    for index, frame in enumerate(_frames(av, video, max_seconds, max_pixels)):
        if index == wanted[len(images)]:
            with library_faults(video.name, _fault):
                images.append(frame.to_image())
            if len(images) == len(wanted):
                return images
    raise MediaFault(video.name, "damaged file", f"ends in the middle (truncated): of {total:,} frames")


def evenly(total: int, count: int) -> list[int]:
    """The indices of `count` of `total` things, the middle one of each of `count` equal parts; all, if no more."""
    return [(2 * part + 1) * total // (2 * count) for part in range(count)] if total > count else list(range(total))


def _count_frames(av: Any, video: Media, max_seconds: float, max_pixels: int) -> int:
    with opened(video) as file, _open(av, file, video.name) as container, library_faults(video.name, _fault):
        stream = _stream(container, video.name, max_seconds, max_pixels)
        total = sum(1 for packet in container.demux(stream) if packet.size)
    if not total:
        raise MediaFault(video.name, "damaged file", "has no frames")
    return total


def _frames(av: Any, video: Media, max_seconds: float, max_pixels: int) -> Iterator[Any]:
    with opened(video) as file, _open(av, file, video.name) as container, library_faults(video.name, _fault):
        yield from container.decode(_stream(container, video.name, max_seconds, max_pixels))


def _open(av: Any, file: Any, name: str) -> Any:
    with library_faults(name, lambda _: ("not media", "is not a video, or damaged")):
        return av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"})


def _stream(container: Any, name: str, max_seconds: float, max_pixels: int) -> Any:
    if not container.streams.video:
        raise MediaFault(name, "not media", "is not a video: it has no pictures")
    stream = container.streams.video[0]
    length = stream.duration and float(stream.duration * stream.time_base)
    seconds = length or (container.duration or 0) / 1e6
    if seconds > max_seconds:
        raise MediaFault(name, "too large", f"lasts {seconds:,.6g} s, more than {max_seconds:,.6g} s")
    check_pixels(name, stream.codec_context.width, stream.codec_context.height, max_pixels)
    stream.codec_context.options = {"max_pixels": str(max_pixels)}  # of later frames, whose size may be another
    return stream


def _fault(error: Exception) -> tuple[Kind, str]:
    return "damaged file", f"is damaged or ends in the middle (truncated): {first_line(error)}"
