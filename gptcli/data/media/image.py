"""One image -> RGB, 8 bits a channel, as it is meant to be seen: turned as its EXIF says, on white where it is clear.

The size stands in the header and is checked before a pixel is decoded. A file that ends early is a fault: Pillow fills
up with grey only when told to, and is told not to. JPEG 2000 is not read, since half of such a file decodes as a whole
one; nor are formats that run other programs (EPS) or hide a second size behind the first (ICO).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptcli.data.media.fault import Kind, MediaFault, library_faults
from gptcli.data.media.reference import Media, Samples, opened
from gptcli.errors import first_line, not_installed

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "QOI")
_CUT = re.compile(r"truncated|unexpected end|not enough image data|reached EOF|got 0|Expected to read", re.IGNORECASE)
_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LA", "PA", "HSV"})
_ORIENTATION = 0x0112
# What undoes each orientation but 1, which is upright (TIFF 6.0, page 36).
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_WHITE = (255, 255, 255, 255)
# What Pillow warns of is either refused here (size) or of no matter (odd metadata). Once, and for Pillow alone: any
# change of the filters makes Python repeat the warnings it has shown, and `catch_warnings` is one for all threads.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def load_image(media: Media, *, max_pixels: int = MAX_PIXELS) -> Image:
    """The first frame of an image as mode RGB, without its metadata.

    Grey of 16 bits is scaled to 8 by rounding. Colour profiles are not applied.

    Raises:
        MediaFault: it cannot be read, is no image, damaged, truncated, or has more than `max_pixels`.
        MissingError: Pillow is not installed.
    """
    if isinstance(media.source, Samples):
        raise MediaFault(media.name, "not media", "is a sound, not an image")
    with opened(media) as file, library_faults(media.name, _fault), _image(file, media.name, max_pixels) as image:
        image.load()
        return _upright(_rgb(image, media.name), image)


@contextlib.contextmanager
def _image(file: Any, name: str, max_pixels: int) -> Iterator[Any]:
    """An image whose header has been read and whose size is allowed."""
    try:
        from PIL import Image, ImageFile, UnidentifiedImageError
    except ImportError:
        raise not_installed("reading images", "pillow", "multimodal") from None
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(16)
        if any((accepts := Image.OPEN[known][1]) is not None and accepts(head) for known in formats):
            raise MediaFault(name, "damaged file", "is damaged or ends in the middle (truncated): its header") from None
        raise MediaFault(name, "not media", "is not an image") from None
    except Image.DecompressionBombError as error:  # above 179 million: "Image size (N pixels) exceeds ..."
        raise _too_many(name, max(map(int, re.findall(r"\d+", str(error)))), max_pixels) from None
    with image:
        check_pixels(name, image.width, image.height, max_pixels)
        yield image


def check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise a `MediaFault` for a picture of no pixels or too many."""
    if width * height > max_pixels:
        raise _too_many(name, width * height, max_pixels)
    if width < 1 or height < 1:
        raise MediaFault(name, "damaged file", "has no pixels")


def _too_many(name: str, pixels: int, max_pixels: int) -> MediaFault:
    return MediaFault(name, "too large", f"has {pixels:,} pixels, more than {max_pixels:,}")


def _fault(error: Exception) -> tuple[Kind, str]:
    if isinstance(error, EOFError) or _CUT.search(str(error)):
        return "damaged file", "ends in the middle (truncated)"
    return "damaged file", f"is damaged or ends in the middle (truncated): {first_line(error)}"


def _rgb(image: Any, name: str) -> Image:
    """A loaded image as a new one of mode RGB."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bits(image)
    if image.mode not in _MODES:
        raise MediaFault(name, "not media", f"has pixels of the kind {image.mode}, which has no one meaning as colours")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    rgb: Image.Image = image.convert("RGB")
    return rgb


def _from_16_bits(image: Any) -> Image:
    """Grey of 0 to 65535 as 0 to 255, which is a 257th; Pillow's own `convert` cuts off what is above 255 of mode I."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    grey = ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _upright(rgb: Image, image: Any) -> Image:
    """An image turned as the metadata of the one that it was made of says, and then without any.

    Without, since processors turn an image once more when it still says so. Damaged metadata say nothing.
    """
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a TIFF of its own, in which Pillow may stumble over anything; the pixels are whole
        orientation = 1
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    upright = rgb if turn is None else rgb.transpose(Transpose[turn])
    upright.info = {}
    return upright
