"""Open image files: convert their content to 8-bit gray or RGB pixels, as a viewer shows them.

Training, testing and predicting all open their images here.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import GrkanValueError

EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("pbm", "pgm", "ppm", "pnm", "pfm", "jp2", "j2k", "jpf", "jpx", "avif", "heic", "heif", "hif"),
    )
)
"""The endings of image files, in lower case."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""The formats that a file may have, whatever its ending. Pillow's others are not for photos, and EPS runs a program."""
_GRAY = ("1", "L")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of one channel that is deeper than 8 bits."""
_WHITES = (1, 255, 65535)
"""Possible values of white, for pixels whose type does not define it."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339

# Without a handler Python would print what Pillow logs about unusual files.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImageError(GrkanValueError):
    """An image cannot be read; the message is only the reason."""


def is_image_name(name: str) -> bool:
    """Return whether a file of that name should contain an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Open the first frame of an image file, converted as by `as_shown`.

    Args:
        file: its path, or a file opened for reading bytes.

    Raises:
        UnreadableImageError: the file does not exist, is not an image, or is damaged.
    """
    with _reading(), _open(file) as image:
        return _flatten(_upright(image))


def as_shown(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to mode L or RGB, upright.

    Pixels of more than 8 bits are scaled by their depth, transparent ones are placed on white, and the orientation of
    the camera (EXIF) is applied. In an image of floats white is 1, or 255 or 65535 if there are larger values. With
    32-bit integers it is 255, 65535 or the largest 32-bit integer.

    Raises:
        UnreadableImageError: its pixels cannot be read.
    """
    with _reading():
        return _flatten(_upright(image))


def image_size(file: str | os.PathLike[str] | BinaryIO) -> tuple[int, int]:
    """Return width and height from the header of an image file.

    Raises:
        UnreadableImageError: as for `open_image`.
    """
    with _reading(), _open(file) as image:
        return image.size


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Suppress warnings, and turn every error that Pillow raises for a damaged file into UnreadableImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (UnreadableImageError, MemoryError):
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreadableImageError(" ".join(reason.split())) from error


def _open(file: Any) -> Image.Image:
    Image.init()
    try:
        return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        head = _head(file)
    if head[4:8] == b"ftyp" and "HEIF" not in Image.OPEN:  # a HEIF file, whatever its ending
        try:
            import_module("pillow_heif").register_heif_opener()
        except ModuleNotFoundError as error:
            if error.name != "pillow_heif":
                raise
            raise UnreadableImageError("HEIC needs pillow-heif; install it with: pip install pillow-heif") from None
        return _open(file)
    raise UnreadableImageError("it is not an image of a known format" if head else "it is empty")


def _head(file: Any) -> bytes:
    """Return the first bytes of a file, and rewind it."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return opened.read(12)
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head


def _upright(image: Image.Image) -> Image.Image:
    """Read the pixels, and rotate them by the camera's orientation."""
    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # only the EXIF data is damaged
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _flatten(image: Image.Image) -> Image.Image:
    """Convert an image to mode L or RGB."""
    key = image.info.get("transparency")
    if image.mode in _DEEP:
        values, tags = np.asarray(image), getattr(image, "tag_v2", {})
        gray = _to_8_bits(values, _white(image.mode, tags))
        if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is 0, which Pillow respects only in 8-bit images
            gray = 255 - gray
        if isinstance(key, int):  # a PNG's transparent gray
            gray[values == key] = 255
        return Image.fromarray(gray)
    if isinstance(key, tuple) and max(key) > 255:  # 16 bits per channel, of which Pillow reads the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        gray_too = image.mode in (*_GRAY, "LA", "La")
        return ground.convert("RGB").convert("L") if gray_too else ground.convert("RGB")
    if image.mode in _GRAY:
        return image.convert("L")
    return image.convert("RGB")


def _white(mode: str, tags: Mapping[int, Any]) -> float | None:
    """Return the value of white that a file defines, or None; `tags` are those of a TIFF file."""
    if mode == "F":
        return None
    if not tags:
        return 65535
    bits = tags.get(_TIFF_BITS, (16,))[0]
    signed = tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 2
    return 2 ** (bits - signed) - 1 if bits <= 16 else None


def _to_8_bits(values: np.ndarray, white: float | None) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UnreadableImageError("it has pixels that are not finite")
    if white is None:
        largest = values.max(initial=0)
        # A float may exceed white a little, for example after resampling.
        slack = 2 if values.dtype.kind == "f" else 1
        whites = _WHITES if values.dtype.kind == "f" else (*_WHITES[1:], 2**31 - 1)
        white = next((white for white in whites if largest <= slack * white), None)
        if white is None:
            raise UnreadableImageError(f"it has pixels up to {largest:g}, and does not define which value is white")
    return np.rint(values.clip(0, white) * (255.0 / white)).astype(np.uint8)
