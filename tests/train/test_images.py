import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from grkan.train import images
from grkan.train.images import UnreadableImageError, as_shown, image_size, is_image_name, open_image

RAMP = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
PHOTO = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(32)[None] * 8, np.arange(24)[:, None] * 10, 90), -1).astype(np.uint8)


def _png(width, height, depth, color, rows, transparency=b""):
    """A PNG by hand, of the kinds that Pillow does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    key = chunk(b"tRNS", transparency) if transparency else b""
    return b"\x89PNG\r\n\x1a\n" + head + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _pixels(path):
    image = open_image(path)
    assert image.mode in ("L", "RGB")
    return np.asarray(image)


# Depth


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    deep = RAMP.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / name)
    assert np.abs(_pixels(tmp_path / name).astype(int) - RAMP).max() <= (1 if name.endswith("jp2") else 0)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        (np.float32, 1),
        (np.float32, 255),
        (np.float32, 65535),
        (np.int32, 255),
        (np.int32, 65535),
        (np.int32, 2**31 - 1),
    ],
)
def test_floats_and_long_integers_are_scaled_by_their_white(tmp_path, dtype, white):
    Image.fromarray((RAMP / 255.0 * white).astype(dtype)).save(tmp_path / "a.tif")
    expected = np.rint((RAMP / 255.0 * white).astype(dtype) * (255.0 / white))
    assert np.array_equal(_pixels(tmp_path / "a.tif"), expected)


def test_floats_may_overshoot_white_and_black(tmp_path):
    Image.fromarray(np.array([[-0.1, 0.0, 0.5, 1.0, 1.1]], np.float32)).save(tmp_path / "a.tif")
    assert _pixels(tmp_path / "a.tif").tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e9, "up to 1e\\+09")])
def test_floats_that_mean_no_gray_are_refused(tmp_path, value, reason):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=reason):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("depth", [8, 16])
def test_a_tiff_whose_white_is_zero(tmp_path, depth):
    values = RAMP if depth == 8 else RAMP.astype(np.uint16) * 257
    stored = values if depth == 8 else values.max() - values  # Pillow turns what it writes in 8 bits, but not in 16
    Image.fromarray(stored).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(_pixels(tmp_path / "a.tif"), RAMP)


def test_a_pgm_of_10_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert _pixels(tmp_path / "a.pgm").tolist() == [[0, 128, 255]]


# Colour, transparency, orientation


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "tif"), ("YCbCr", "tif"), ("LAB", "tif"), ("P", "png")])
def test_other_colour_spaces(tmp_path, mode, suffix):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 takes a TIFF of this kind for truncated")
    Image.fromarray(SMOOTH).convert(mode).save(tmp_path / f"a.{suffix}")
    assert np.abs(_pixels(tmp_path / f"a.{suffix}").astype(int) - SMOOTH).mean() < {"P": 20}.get(mode, 2)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("hidden", [0, 255])
def test_transparent_pixels_lie_on_white(tmp_path, name, hidden):
    alpha = np.zeros((24, 32), np.uint8)
    alpha[:, 8:16], alpha[:, 16:] = 51, 255
    colour = np.where(alpha[..., None], PHOTO, hidden).astype(np.uint8)
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / name, lossless=True)
    weight = alpha[..., None] / 255
    assert np.abs(_pixels(tmp_path / name) - (PHOTO * weight + 255 * (1 - weight))).max() <= 1


def test_transparent_gray_stays_gray(tmp_path):
    Image.fromarray(np.dstack([RAMP, np.full_like(RAMP, 102)])).save(tmp_path / "a.png")
    pixels = _pixels(tmp_path / "a.png")
    assert pixels.shape == RAMP.shape
    assert np.abs(pixels - (RAMP * 0.4 + 255 * 0.6)).max() <= 1


@pytest.mark.parametrize("transparency", [2, bytes([255, 255, 0, 255])])
def test_a_transparent_colour_of_a_palette(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert _pixels(tmp_path / "a.png").tolist() == [[[10, 20, 30], [40, 50, 60], [255, 255, 255], [100, 110, 120]]]


def test_a_transparent_colour_of_16_bits(tmp_path):
    gray = _png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0, 1000, 65535), struct.pack(">H", 1000))
    (tmp_path / "gray.png").write_bytes(gray)
    assert _pixels(tmp_path / "gray.png").tolist() == [[0, 255, 255]]
    rows = b"\0" + struct.pack(">6H", 0, 257, 514, 65535, 0, 0)
    (tmp_path / "rgb.png").write_bytes(_png(2, 1, 16, 2, rows, struct.pack(">3H", 65535, 0, 0)))
    assert _pixels(tmp_path / "rgb.png").tolist() == [[[0, 1, 2], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
def test_an_image_is_upright(tmp_path, orientation, name):
    """What turns the upright image into the stored one, for each value of EXIF's tag."""
    stored = {
        1: SMOOTH,
        2: SMOOTH[:, ::-1],
        3: SMOOTH[::-1, ::-1],
        4: SMOOTH[::-1],
        5: SMOOTH.transpose(1, 0, 2),
        6: np.rot90(SMOOTH),
        7: SMOOTH[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(SMOOTH, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {} if name.endswith("tif") else {"quality": 100}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **settings)
    pixels = _pixels(tmp_path / name)
    assert pixels.shape == SMOOTH.shape
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 5


def test_a_damaged_exif_leaves_the_image_as_it_lies(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert np.array_equal(_pixels(tmp_path / "a.png"), PHOTO)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo"])
def test_the_first_frame_counts(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert np.abs(_pixels(tmp_path / name).astype(int) - [200, 0, 0]).max() <= 3


@pytest.mark.parametrize("name", ["a.gif", "a.AVIF", "a.jp2", "a.JfIf", "a.bmp", "a.jpeg", "a.ppm"])
def test_the_endings_of_images(tmp_path, name):
    assert is_image_name(name)
    Image.fromarray(SMOOTH).save(tmp_path / name, {"a.JfIf": "JPEG"}.get(name))
    assert np.abs(_pixels(tmp_path / name).astype(int) - SMOOTH).mean() < 10
    assert image_size(tmp_path / name) == (32, 24)


def test_heic_by_its_content(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(SMOOTH)).save(tmp_path / "a.heic", quality=100)
    (tmp_path / "a.heic").rename(tmp_path / "a.jpg")
    assert np.abs(_pixels(tmp_path / "a.jpg").astype(int) - SMOOTH).mean() < 10


def test_heic_without_its_package(tmp_path, monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(12))
    with pytest.raises(UnreadableImageError, match="HEIC needs pillow-heif; install it with: pip install pillow-heif"):
        open_image(tmp_path / "a.heic")


def test_an_opened_file_and_an_image_in_memory(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(buffer, "PNG")
    buffer.seek(0)
    assert np.array_equal(np.asarray(open_image(buffer)), RAMP)
    assert np.array_equal(np.asarray(as_shown(Image.fromarray(RAMP.astype(np.uint16) * 257))), RAMP)


# What goes wrong


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html></html>", "it is not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "it is not an image of a known format"),
        (None, "No such file or directory"),
    ],
)
def test_no_image(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f"^{reason}$") as caught:
        open_image(tmp_path / "a.jpg")
    assert "\n" not in str(caught.value)


def test_a_bomb_is_not_decompressed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_damage_has_one_error(kind):
    """Whatever Pillow makes of it."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, kind)
    whole = np.frombuffer(buffer.getvalue(), np.uint8)
    refused = 0
    for _ in range(40):
        damaged = whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole.copy()
        if len(damaged) == len(whole):
            damaged[rng.integers(0, min(len(whole), 200), 8)] = rng.integers(0, 256, 8)
        try:
            open_image(io.BytesIO(damaged.tobytes()))
        except UnreadableImageError:
            refused += 1
    assert refused > 5


def test_nothing_is_printed(tmp_path):
    """Neither warnings, as for very large images and transparent palettes, nor what Pillow logs."""
    Image.new("L", (9500, 9500)).save(tmp_path / "large.png")
    image = Image.fromarray(SMOOTH).quantize(8)
    image.save(tmp_path / "palette.png", transparency=bytes(range(8)))
    code = (
        "import logging, sys\n"
        "from grkan.train.images import open_image\n"
        "for path in sys.argv[1:]: open_image(path)\n"
        "logging.getLogger('PIL.TiffImagePlugin').error('odd')\n"
    )
    paths = [tmp_path / name for name in ("large.png", "palette.png")]
    done = subprocess.run([sys.executable, "-W", "default", "-c", code, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_formats_are_pillows():
    Image.init()
    assert set(images._FORMATS) - {"HEIF"} <= set(Image.OPEN)
