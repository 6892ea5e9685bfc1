"""Pictures and sounds as files, whole and spoilt, and rows that name them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000


def picture(seed: int = 0, size: tuple[int, int] = (28, 28)) -> Any:
    """Noise, as Pillow's image."""
    from PIL import Image

    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def picture_bytes(seed: int = 0, size: tuple[int, int] = (28, 28), kind: str = "PNG") -> bytes:
    """Noise, as the bytes of a file."""
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind)
    return buffer.getvalue()


def huge_png(side: int = 30_000) -> bytes:
    """A PNG whose header says a size, and that holds next to nothing."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0" * 99),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tone(seconds: float = 0.5, rate: int = RATE) -> Any:
    """A tone that rises: float32."""
    at = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 200 * at) * at)).astype(np.float32)


def wav(path: Path, samples: Any, rate: int = RATE, subtype: str = "FLOAT") -> None:
    """Samples as a file."""
    import soundfile

    soundfile.write(path, samples, rate, subtype=subtype)


def hour(path: Path) -> None:
    """A wav of an hour of silence that takes no room."""
    rate, size = 1000, 3_600_000
    head = b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8)
    with path.open("wb") as file:
        file.write(head + b"data" + struct.pack("<I", size))
        file.truncate(size + 44)


def make_media(folder: Path) -> None:
    """Whole and spoilt files under `media/`."""
    media = folder / "media"
    media.mkdir()
    (media / "good.png").write_bytes(picture_bytes(1))
    (media / "wide.png").write_bytes(picture_bytes(2, (60, 40)))
    jpeg = picture_bytes(3, (64, 64), "JPEG")
    (media / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (media / "huge.png").write_bytes(huge_png())
    (media / "empty.png").write_bytes(b"")
    (media / "text.png").write_text("no picture at all\n")
    wav(media / "good.wav", tone())
    wav(media / "none.wav", tone(0))
    wav(media / "nan.wav", np.where(np.arange(8000) == 70, np.nan, tone()))
    hour(media / "hour.wav")
