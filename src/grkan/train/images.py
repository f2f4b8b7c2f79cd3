"""The one door for image files: what is in a file becomes gray or RGB pixels of 8 bits, as a viewer shows them.

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
"""The endings of image files, in small letters."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""What a file may hold, whatever its name ends in. Pillow's others are no photographs, and EPS runs a program."""
_GRAY = ("1", "L")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of one channel that is deeper than 8 bits."""
_WHITES = (1, 255, 65535)
"""Of pixels whose type does not tell what white is."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339

# Without a handler Python would print what Pillow logs of odd files.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImageError(GrkanValueError):
    """An image cannot be read; the message is the reason alone."""


def is_image_name(name: str) -> bool:
    """Whether a file of that name should hold an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The first frame of an image file, as `as_shown` makes it.

    Args:
        file: its path, or the file itself, opened for reading bytes.

    Raises:
        UnreadableImageError: there is no such file, or it is no image, or a damaged one.
    """
    with _reading(), _open(file) as image:
        return _flatten(_upright(image))


def as_shown(image: Image.Image) -> Image.Image:
    """Any image of Pillow's, upright, in mode L or RGB.

    Pixels of more than 8 bits are scaled by their depth, transparent ones lie on white, and the orientation of the
    camera (EXIF) is applied. White is 1 in an image of floats, or 255 or 65535 if it has larger values; so with
    integers of 32 bits, where it is the largest one beyond that.

    Raises:
        UnreadableImageError: its pixels cannot be read.
    """
    with _reading():
        return _flatten(_upright(image))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height, as the head of an image file tells them.

    Raises:
        UnreadableImageError: as for `open_image`.
    """
    with _reading(), _open(path) as image:
        return image.size


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Without warnings, and with one error for all that a damaged file makes Pillow raise."""
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
    if head[4:8] == b"ftyp" and "HEIF" not in Image.OPEN:  # of a HEIF file, whatever its name ends in
        try:
            import_module("pillow_heif").register_heif_opener()
        except ModuleNotFoundError as error:
            if error.name != "pillow_heif":
                raise
            raise UnreadableImageError("HEIC needs pillow-heif; install it with: pip install pillow-heif") from None
        return _open(file)
    raise UnreadableImageError("it holds no image of a known format" if head else "it is empty")


def _head(file: Any) -> bytes:
    """The first bytes of a file, which is left at its beginning."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return opened.read(12)
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head


def _upright(image: Image.Image) -> Image.Image:
    """The pixels, read and turned as the camera's orientation says."""
    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # the image is whole, its EXIF is not
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _flatten(image: Image.Image) -> Image.Image:
    """To mode L or RGB."""
    key = image.info.get("transparency")
    if image.mode in _DEEP:
        values, tags = np.asarray(image), getattr(image, "tag_v2", {})
        gray = _to_8_bits(values, _white(image.mode, tags))
        if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is 0, which Pillow heeds in images of 8 bits alone
            gray = 255 - gray
        if isinstance(key, int):  # a PNG's transparent gray
            gray[values == key] = 255
        return Image.fromarray(gray)
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits a channel, of which Pillow reads the upper 8
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
    """The value of white that a file tells, if it does; `tags` are those of a TIFF file."""
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
        # A float may overshoot white a little, as after resampling.
        slack = 2 if values.dtype.kind == "f" else 1
        whites = _WHITES if values.dtype.kind == "f" else (*_WHITES[1:], 2**31 - 1)
        white = next((white for white in whites if largest <= slack * white), None)
        if white is None:
            raise UnreadableImageError(f"it has pixels up to {largest:g}, and does not tell which value is white")
    return np.rint(values.clip(0, white) * (255.0 / white)).astype(np.uint8)
