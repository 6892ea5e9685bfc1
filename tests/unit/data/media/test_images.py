from __future__ import annotations

import io
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.image import MAX_PIXELS, load_image
from gptcli.data.media.reference import Media, Reach, media_of
from gptcli.errors import MissingError
from tests.conftest import shared_data

Image = pytest.importorskip("PIL.Image", reason="the extra multimodal is not installed")


def saved(image: Any, form: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def media(data: bytes) -> Media:
    return Media("x", data)


def pixels(data: bytes) -> NDArray[np.uint8]:
    image = load_image(media(data))
    assert image.mode == "RGB" and not image.info and not image.getexif()
    return np.asarray(image)


def fault(data: bytes, **options: Any) -> MediaFault:
    with pytest.raises(MediaFault) as caught:
        load_image(media(data), **options)
    return caught.value


def picture(height: int = 24, width: int = 32) -> Any:
    """Smooth, with some noise, so that nothing compresses to nothing."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.RandomState(0).randint(0, 8, (height, width))
    channels = [rows * 9 + noise, columns * 7 + noise, rows + columns + noise]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG put together by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [chunk(kind, body) for kind, body in ((b"IHDR", header), *chunks, (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey_png(width: int, height: int, bits: int, lines: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    return png(struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0), *chunks, (b"IDAT", zlib.compress(lines)))


SAMPLES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved(picture(), "JPEG"),
    "progressive jpeg": lambda: saved(picture(), "JPEG", progressive=True),
    "png": lambda: saved(picture(), "PNG"),
    "gif": lambda: saved(picture().convert("P"), "GIF"),
    "webp": lambda: saved(picture(), "WEBP"),
    "lossless webp": lambda: saved(picture(), "WEBP", lossless=True),
    "bmp": lambda: saved(picture(), "BMP"),
    "tiff": lambda: saved(picture(), "TIFF"),
    "lzw tiff": lambda: saved(picture(), "TIFF", compression="tiff_lzw"),
    "ppm": lambda: saved(picture(), "PPM"),
    "16 bit png": lambda: saved(Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 85), "PNG"),
}


@pytest.mark.parametrize("form", SAMPLES)
def test_formats_are_decoded_as_pillow_does(form: str) -> None:
    if form != "16 bit png":
        data = SAMPLES[form]()
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "form"),
    [("1", "PNG"), ("L", "PNG"), ("L", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_modes_without_transparency_are_converted_as_pillow_does(mode: str, form: str) -> None:
    data = saved(picture().convert(mode), form)
    image = Image.open(io.BytesIO(data))
    assert image.mode == mode
    assert np.array_equal(pixels(data), np.asarray(image.convert("RGB")))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = rgba[..., 3:] / 255
    return np.asarray(rgba[..., :3] * alpha + 255 * (1 - alpha))


@pytest.mark.parametrize(("mode", "form"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("RGBA", "TIFF")])
def test_what_is_clear_shows_white(mode: str, form: str) -> None:
    image = picture()
    image.putalpha(Image.fromarray((np.arange(768).reshape(24, 32) % 256).astype(np.uint8)))
    data = saved(image.convert(mode), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    expected = on_white(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))
    assert np.abs(pixels(data) - expected).max() <= 1
    assert (pixels(data)[0, 0] == 255).all()


def test_a_clear_colour_of_a_palette_or_of_grey_shows_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    half = saved(palette, "PNG", transparency=b"\xff\x80")
    for data in (saved(palette, "GIF", transparency=1), saved(palette, "PNG", transparency=1)):
        assert pixels(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert np.abs(pixels(half).astype(int) - [[[10, 20, 30], [147, 152, 157]]]).max() <= 1
    grey = saved(Image.fromarray(np.array([[7, 9]], dtype=np.uint8)), "PNG", transparency=9)
    assert pixels(grey).tolist() == [[[7] * 3, [255] * 3]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "big-endian TIFF"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(form: str) -> None:
    values = np.array([[0, 128, 129, 255, 256, 257], [386, 1000, 32767, 32768, 65000, 65535]], dtype=np.uint16)
    if form == "big-endian TIFF":
        data = saved(Image.fromarray(values.astype(">u2")), "TIFF")
    else:
        data = saved(Image.fromarray(values), form)
    assert np.array_equal(pixels(data)[..., 0], np.rint(values / 65535 * 255))
    assert (pixels(data) == pixels(data)[..., :1]).all()


def test_a_clear_grey_of_16_bits_shows_white() -> None:
    lines = b"\0" + struct.pack(">HH", 1000, 2000)
    data = grey_png(2, 1, 16, lines, (b"tRNS", struct.pack(">H", 1000)))
    assert pixels(data).tolist() == [[[255] * 3, [8] * 3]]


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_that_are_no_colours_are_refused(mode: str) -> None:
    data = saved(Image.new(mode, (2, 2)), "TIFF")
    assert fault(data).reason == f"has pixels of the kind {mode}, which has no one meaning as colours"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(form: str, orientation: int) -> None:
    # Row 0 and column 0 of what is stored are, in what is seen (TIFF 6.0, page 36): written as the inverse here.
    seen = np.kron(np.array([[0, 90, 180], [40, 130, 255]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.T,
        6: np.rot90(seen, 1),
        7: seen[::-1, ::-1].T,
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), form, exif=exif.tobytes(), **options)
    found = pixels(data)
    assert found.shape == (32, 48, 3)
    assert np.abs(found[..., 0].astype(int) - seen).max() <= (12 if form == "JPEG" else 0)


def test_damaged_metadata_do_not_cost_the_image() -> None:
    plain = saved(picture(), "JPEG")
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(200)), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        assert np.array_equal(pixels(plain[:2] + segment + plain[2:]), pixels(plain))
    assert np.array_equal(pixels(saved(picture(), "JPEG", exif=_orientation(99))), pixels(plain))


def _orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return bytes(exif.tobytes())


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 2


def test_an_image_of_900_million_pixels_is_refused_from_its_header() -> None:
    width = height = 30_000
    # Deflate in pieces that stand for 100 empty rows each and do not depend on one another: valid, and never held.
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes((width + 1) * 100)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", height * (width + 1) % 65521, 1)
    body = b"\x78\xda" + piece * (height // 100) + b"\x03\x00" + checksum
    data = png(struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), (b"IDAT", body))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fault(data)
    assert (found.kind, found.reason) == ("too large", "has 900,000,000 pixels, more than 50,000,000")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("size", [(10_000, 5_001), (12_000, 12_000), (65_535, 65_535)])
def test_the_limit_of_pixels_holds_for_every_size_without_a_warning(size: tuple[int, int]) -> None:
    small = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    small[6:10] = struct.pack("<HH", *size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fault(bytes(small)).reason == f"has {size[0] * size[1]:,} pixels, more than {MAX_PIXELS:,}"
    assert fault(saved(picture(), "PNG"), max_pixels=767).reason == "has 768 pixels, more than 767"
    load_image(media(saved(picture(), "PNG")), max_pixels=768)


@pytest.mark.parametrize("form", SAMPLES)
def test_a_truncated_file_is_a_fault_or_the_whole_picture_never_a_part(form: str) -> None:
    data = SAMPLES[form]()
    whole = pixels(data)
    for size in range(1, len(data), max(1, len(data) // 97)):
        try:
            found = pixels(data[:size])
        except MediaFault as error:
            assert error.kind in ("damaged file", "not media")
        else:
            assert size > len(data) - 24 and np.array_equal(found, whole)  # all but marks and checksums at the end


def test_a_jpeg_cut_in_half_is_truncated() -> None:
    for form in ("jpeg", "progressive jpeg", "png", "webp", "bmp", "lzw tiff"):
        data = SAMPLES[form]()
        assert "truncated" in fault(data[: len(data) // 2]).reason, form


@pytest.mark.parametrize("form", SAMPLES)
def test_no_damage_brings_anything_but_an_image_or_a_fault(form: str) -> None:
    data = SAMPLES[form]()
    random = np.random.RandomState(0)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(random.randint(1, 4)):  # half of them in the header
            place = random.randint(len(broken)) if random.rand() < 0.5 else random.randint(min(64, len(broken)))
            broken[place] ^= 1 << random.randint(8)
        try:
            image = load_image(media(bytes(broken)), max_pixels=1_000_000)
        except MediaFault as error:
            assert "\n" not in str(error)
        else:
            assert image.mode == "RGB" and image.width * image.height <= 1_000_000


def test_what_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("once upon a time " * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    reach = Reach.of(tmp_path / "rows.jsonl")
    expected = {"text.png": "is not an image", "empty.png": "is empty", "postscript.png": "is not an image"}
    found = {}
    for name in expected:
        with pytest.raises(MediaFault) as caught:
            load_image(media_of(name, reach)[0])
        found[name] = caught.value.reason
    assert found == expected
    with pytest.raises(MediaFault, match="is a sound, not an image"):
        load_image(media_of({"array": [0.0], "sampling_rate": 8000}, reach)[0])
    assert fault(grey_png(0, 0, 8, b"")).kind == "damaged file"


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingError) as caught:
        load_image(media(b"x"))
    assert caught.value.lines()[-1] == "pip install 'gptcli[multimodal]'"


def test_images_of_a_data_set_are_read_beside_its_rows() -> None:
    rows = shared_data("fashion_mnist/test/metadata.jsonl")
    reach = Reach.of(rows)
    (one,) = media_of("images/00001.png", reach)
    expected = np.asarray(Image.open(rows.parent / "images" / "00001.png"))
    assert np.array_equal(np.asarray(load_image(one)), np.repeat(expected[..., None], 3, axis=2))
