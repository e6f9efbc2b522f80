"""Images are read as a viewer shows them, in every mode that has one meaning; everything else is refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dwm_fast.errors import DataError
from dwm_fast.pacs.data.layouts import Record
from dwm_fast.pacs.data.pixels import LARGEST, as_rgb, decode_all

SIDE = 16


def record(content: bytes | Path) -> Record:
    return Record("photo", 0, "photo/dog/a.png", content, "a.png")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(content: bytes | Path, side: int = SIDE) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(decode_all([record(content)], side)[0].permute(1, 2, 0))


def ramp(top: int, dtype: Any) -> np.ndarray:
    return np.tile(np.linspace(0, top, SIDE).astype(dtype), (SIDE, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4), st.sampled_from(["I;16", "I"]))
def test_sixteen_bits_are_scaled_to_eight(values: list[int], mode: str) -> None:
    pixels = np.array(values).reshape(2, 2)
    image = Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    shown = np.asarray(as_rgb(image))
    assert shown.shape == (2, 2, 3)
    assert np.array_equal(shown[..., 0], np.round(pixels / 257).astype(np.uint8))


def test_a_ramp_of_sixteen_bits_in_a_file_is_a_ramp_and_not_white() -> None:
    shown = decoded(encoded(Image.fromarray(ramp(65535, np.uint16))))
    assert np.array_equal(shown[0, :, 0], np.round(ramp(65535, np.uint16)[0] / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.full((2, 2), 70000, np.int32), "32-bit pixels beyond the range of 16 bits"),
        (np.full((2, 2), -1, np.int32), "32-bit pixels beyond the range of 16 bits"),
        (np.full((2, 2), 0.5, np.float32), "floating-point pixels"),
    ],
)
def test_pixels_whose_white_is_unknown_are_refused(pixels: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        as_rgb(Image.fromarray(pixels))


def lined(mode: str) -> bytes:
    """A black line of two pixels on a transparent ground, in an image mode that can say so."""
    art = np.zeros((SIDE, SIDE, 4), np.uint8)
    art[6:8, :, 3] = 255
    image = Image.fromarray(art)
    if mode == "P":
        indexed = Image.new("P", image.size, 1)
        indexed.putpalette([0, 0, 0, 9, 9, 9])
        indexed.paste(0, (0, 6, SIDE, 8))
        return encoded(indexed, transparency=1)
    if mode == "L":
        grey = Image.new("L", image.size, 9)
        grey.paste(0, (0, 6, SIDE, 8))
        return encoded(grey, transparency=9)
    return encoded(image.convert(mode), "WEBP" if mode == "RGBA" else "PNG", lossless=True)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_shows_white(mode: str) -> None:
    shown = decoded(lined(mode))
    assert (shown[6:8] == 0).all()
    assert (np.delete(shown, [6, 7], axis=0) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    shown = decoded(encoded(Image.new("RGBA", (SIDE, SIDE), (0, 100, 200, 128))))
    # alpha 128 / 255: 0 -> 127, 100 -> 177, 200 -> 227 to the nearest whole number.
    assert np.abs(shown.astype(int) - [127, 177, 227]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation: int) -> None:
    turned = np.zeros((SIDE, SIDE, 3), np.uint8)
    turned[:4] = 255  # what a viewer shows: white on top
    turned[:, :4] = 128  # and grey on the left
    # Where the viewer's rows and columns lie in the file, by the EXIF specification (0th row, 0th column).
    stored = {
        1: turned,
        2: turned[:, ::-1],
        3: turned[::-1, ::-1],
        4: turned[::-1],
        5: turned.transpose(1, 0, 2),
        6: np.rot90(turned, 1),
        7: turned.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(turned, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(decoded(content), turned)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_ordinary_modes_are_read_as_ever(mode: str) -> None:
    image = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, SIDE, 8))
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    shown = decoded(encoded(image.convert(mode), kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert (
        np.abs(shown.astype(int) - np.asarray(image).astype(int)).max() <= 4
    )  # JPEG of a block edge at 8 is exact to 4


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS", "PPM", "ICO", "PDF", "TGA", "SGI"])
def test_other_formats_are_not_opened_whatever_their_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(encoded(Image.new("RGB", (SIDE, SIDE)), kind))
    for content in (file, file.read_bytes()):
        with pytest.raises(DataError, match=r"a.png: unreadable image \(none of JPEG, PNG, BMP, WEBP\)") as caught:
            decoded(content)
        assert "\n" not in str(caught.value)


def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("1", (LARGEST // 5000 + 1, 5000)))
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(DataError, match=r"10001 x 5000 pixels; at most 50,000,000 are decoded"):
        decoded(content)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_level_of_sixteen_bits_shows_white(channels: int) -> None:
    """Written by hand: Pillow writes no 16-bit RGB."""
    level = 0x1234
    row = b"\0" + b"".join(struct.pack(">H", value) * channels for value in (level, 0xFFFF, 0x8080, level))
    kind, clear = (0, 2)[channels == 3], struct.pack(">H", level) * channels

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, kind, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    with Image.open(io.BytesIO(png)) as image:
        assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [255, 255, 0x80, 255]
