"""Encoded images become RGB whatever they are, or a BadImage with its reason."""

import math
import warnings
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from distill.data.preprocess import to_rgb

MAX_PIXELS = 100_000_000
MAX_ASPECT = 500  # of longer to shorter side; resizing the shorter side of a longer sliver to 500 px would not fit in memory
# Pillow also opens formats that run other programs (EPS) or decode nothing but a stub; images from outside get these alone.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO", "PPM", "DIB", "JPEG2000", "AVIF")
# Pillow warns of every odd tag; what matters of it ends in a BadImage with its reason.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """Encoded data that gives no image; `reason` is a short phrase such as "truncated"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes | Path, shorter_side: int | None = None) -> Image.Image:
    """Encoded image, or a file of one, -> Pillow RGB image that holds its pixels itself.

    Greyscale, palette, alpha, CMYK, 16-bit and EXIF rotation are converted (see preprocess.to_rgb). Of several frames the
    first is taken.

    Args:
        shorter_side: the pixels that will be needed. A JPEG of at least twice as many is decoded at 1/2, 1/4 or 1/8 of its size
            (never below `shorter_side`), which is several times quicker.

    Raises:
        BadImage: empty, corrupt, truncated, missing, or of more than 100 million pixels (by its header; nothing is unpacked).
    """
    try:
        if isinstance(data, Path):
            if data.stat().st_size == 0:
                raise BadImage("empty file")
            with open(data, "rb") as file:
                return _decode(file, shorter_side)
        if not data:
            raise BadImage("empty file")
        return _decode(BytesIO(data), shorter_side)
    except (BadImage, MemoryError):
        raise
    except FileNotFoundError as e:
        raise BadImage("missing file") from e
    except Image.DecompressionBombError as e:
        raise BadImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from e
    except Image.UnidentifiedImageError as e:
        raise BadImage("not an image of a known format") from e
    except (
        Exception
    ) as e:  # Pillow's plugins raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error, IndexError ...
        raise BadImage(str(e).splitlines()[0] if str(e) else type(e).__name__) from e


def _decode(file: Any, shorter_side: int | None) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise BadImage(f"{w} x {h} is more than {MAX_PIXELS / 1e6:.0f} million pixels")
        if min(w, h) == 0:
            raise BadImage("no pixels")
        if max(w, h) > MAX_ASPECT * min(w, h):
            raise BadImage(f"{w} x {h} is too narrow: one side is more than {MAX_ASPECT} times the other")
        if shorter_side is not None and image.format in ("JPEG", "MPO"):
            scale = shorter_side / min(w, h)
            image.draft(None, (max(1, math.ceil(w * scale)), max(1, math.ceil(h * scale))))
        image.load()
        try:
            return to_rgb(image)
        except (
            Exception
        ):  # cameras and editors write broken EXIF; the picture under it is still good, and often its rotation too
            clean = Image.Exif()
            with suppress(Exception):
                clean[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
            bare = image.copy()
            for key in set(bare.info) - {"transparency"}:
                del bare.info[key]
            bare.info["exif"] = clean.tobytes()
            return to_rgb(bare)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)
