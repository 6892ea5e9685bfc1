"""The media of one row, in the order of their places in its text, and how they are kept beside its tokens.

In a text the place of a medium is a mark of characters for private use, which no text of a user can be taken for; what
stands there for the model (`<image>`, as often as the model wants it) is the processor's to say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from gptcli.data.media.fault import MediaFault, shown_name
from gptcli.data.media.reference import (
    NAMELESS,
    Media,
    Reach,
    Samples,
    Url,
    Video,
    content_hash,
    media_of,
    videos_of,
)

Modality: TypeAlias = Literal["image", "audio", "video"]
MODALITIES: tuple[Modality, ...] = ("image", "audio", "video")
NOUNS = {"image": "image", "audio": "sound", "video": "video"}
A_NOUN = {"image": "an image", "audio": "a sound", "video": "a video"}
PLACE = re.compile("\ue0c3(image|audio|video)\ue0c4")


@dataclass(frozen=True, eq=False)
class Medium:
    """An image, a sound or a video of a row.

    Attributes:
        modality: which of them.
        value: where it is, or what.
        hash: that of its content, "" where it was not worked out.
        extent: width and height in pixels, or seconds, and `tokens`: those that stand for it; where it was read.
    """

    modality: Modality
    value: Video
    hash: str = ""
    extent: tuple[float, ...] = ()
    tokens: int = 0

    @property
    def name(self) -> str:
        """What messages call it."""
        first = self.value[0] if isinstance(self.value, list) else self.value
        return first.name


def place_of(modality: Modality) -> str:
    """What stands in a text for a medium."""
    return f"\ue0c3{modality}\ue0c4"


def media_in(value: Any, modality: Modality, reach: Reach, called: str = NAMELESS) -> list[Medium]:
    """The media that a value of a row holds, `called` so if they have no name. Raises `MediaFault` as `media_of`."""
    try:
        found: Sequence[Video] = videos_of(value, reach) if modality == "video" else media_of(value, reach)
    except MediaFault as fault:
        raise MediaFault(called if fault.name == NAMELESS else fault.name, fault.kind, fault.reason) from None
    if any(isinstance(each, list) and not each for each in found):
        raise MediaFault(called, "not media", "is a video without frames")
    named = (
        replace(each, name=called) if isinstance(each, Media) and each.name == NAMELESS else each for each in found
    )
    return [Medium(modality, each) for each in named]


def check_places(text: str, media: Sequence[Medium]) -> str | None:
    """What is wrong with a text whose media are not those that it has places for, in their order; None: nothing is."""
    wanted = PLACE.findall(text)
    if wanted == [each.modality for each in media]:
        return None
    places, given = Counter(wanted), Counter(each.modality for each in media)
    for modality in MODALITIES:
        if places[modality] != given[modality]:
            return f"has {counted(given[modality], NOUNS[modality])} and {counted(places[modality], 'place')} for them"
    return "has its media in another order than their places"


def hashed(medium: Medium) -> Medium:
    """A medium with the hash of its content. Raises `MediaFault` where it cannot be read."""
    parts = medium.value if isinstance(medium.value, list) else [medium.value]
    hashes = [content_hash(part) for part in parts]
    return replace(medium, hash=hashes[0] if len(hashes) == 1 else _joined(hashes))


def identity(media: Sequence[Medium]) -> bytes:
    """What tells equal media of rows without reading files: their names, and the bytes of those that are no files."""
    import xxhash

    told = []
    for medium in media:
        for part in medium.value if isinstance(medium.value, list) else [medium.value]:
            inline = isinstance(part.source, bytes | Samples)
            told.append([medium.modality, content_hash(part) if inline else part.name])
    return xxhash.xxh3_128(json.dumps(told).encode()).digest() if told else b""


def kept(media: Iterable[Medium]) -> bytes:
    """Media as bytes, for `restored`: where files lie, what else there is as it was; nothing for none.

    A line of JSON says what follows it: the bytes of those that are not files, one after the other.
    """
    about: list[dict[str, Any]] = []
    body = bytearray()
    for medium in media:
        parts = medium.value if isinstance(medium.value, list) else [medium.value]
        made = []
        for part in parts:
            entry: dict[str, Any] = {"name": part.name}
            if isinstance(part.source, Path):
                entry["path"] = str(part.source)
            elif isinstance(part.source, Url):
                entry["url"] = part.source.address
            else:
                data = part.source
                if isinstance(data, Samples):
                    entry |= {"rate": data.rate, "dtype": data.values.dtype.str, "shape": data.values.shape}
                    data = data.values.tobytes()
                entry["bytes"] = len(data)
                body += data
            made.append(entry)
        about.append({"modality": medium.modality, "hash": medium.hash, "parts": made})
        if isinstance(medium.value, list):
            about[-1]["frames"] = True
    return json.dumps(about, ensure_ascii=True).encode() + b"\n" + bytes(body) if about else b""


def restored(data: bytes) -> list[Medium]:
    """What `kept` made bytes of. Raises `ValueError` for anything else."""
    if not data:
        return []
    head, _, body = data.partition(b"\n")
    at = 0
    media = []
    for entry in json.loads(head):
        parts = []
        for part in entry["parts"]:
            source: Any
            if "path" in part:
                source = Path(part["path"])
            elif "url" in part:
                source = Url(part["url"])
            else:
                source = body[at : at + part["bytes"]]
                at += part["bytes"]
                if "rate" in part:
                    source = Samples(np.frombuffer(source, part["dtype"]).reshape(part["shape"]), part["rate"])
            parts.append(Media(part["name"], source))
        media.append(Medium(entry["modality"], parts if "frames" in entry else parts[0], entry["hash"]))
    return media


def shown_extent(medium: Medium) -> str:
    """The size of a medium that was read, for people: "28 x 28", "1.5 s"."""
    return f"{medium.extent[0]:,.3g} s" if len(medium.extent) == 1 else pixels(medium.extent)


def pixels(size: Sequence[float]) -> str:
    """Width and height, for people."""
    return " x ".join(f"{side:,.0f}" for side in size)


def shown_media(media: Iterable[Medium]) -> str:
    """Media for people: what and which."""
    return ", ".join(f"{each.modality} {shown_name(each.name)}" for each in media)


def _joined(hashes: Sequence[str]) -> str:
    import xxhash

    return xxhash.xxh3_128("".join(hashes).encode()).hexdigest()


def counted(number: int, what: str) -> str:
    """So many of something, for people."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
