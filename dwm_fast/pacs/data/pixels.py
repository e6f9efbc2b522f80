"""From an encoded image to RGB pixels as a viewer shows them, or one line that names the file and what it holds."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dwm_fast.errors import DataError
from dwm_fast.pacs.data.layouts import Record

Progress = Callable[[int, int], None]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""What PACS and its relatives are stored as. Nothing else is opened, whatever a file is called: Pillow would hand an
EPS to Ghostscript."""
POOL_FROM = 2000  # images; below, starting threads costs more than it saves
LARGEST = 50_000_000
"""Pixels of the largest image that is decoded, 150 MB in RGB. A few kilobytes of PNG can claim more."""


def decode_all(records: Sequence[Record], image_size: int, progress: Progress | None = None) -> Tensor:
    """Decode records to (N, 3, image_size, image_size) uint8; DataError names an image that cannot be read right."""
    pixels = torch.empty((len(records), 3, image_size, image_size), dtype=torch.uint8)
    view = pixels.numpy()

    def decode_chunk(start: int) -> int:
        for i in range(start, min(start + 100, len(records))):
            view[i] = _decode(records[i], image_size).transpose(2, 0, 1)
        return min(start + 100, len(records))

    starts = range(0, len(records), 100)
    workers = min(8, os.cpu_count() or 1) if len(records) > POOL_FROM else 1
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in pool.map(decode_chunk, starts):
                if progress is not None:
                    progress(done, len(records))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pixels


def _decode(record: Record, image_size: int) -> NDArray[np.uint8]:
    """RGB pixels (image_size, image_size, 3) of one record."""
    source = io.BytesIO(record.source) if isinstance(record.source, bytes) else record.source
    try:
        with source() if callable(source) else Image.open(source, formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST:
                raise ValueError(f"{opened.width} x {opened.height} pixels; at most {LARGEST:,} are decoded")
            image = as_rgb(opened)
            if image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{record.origin}: unreadable image (none of {', '.join(FORMATS)}); replace the file or remove it"
        ) from error
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{record.origin}: unreadable image ({reason}); replace the file or remove it") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB as a viewer shows it.

    EXIF orientation is followed, 16 bits are scaled to 8 (divided by 257), and what is transparent shows white. Raises
    ValueError for pixels without a known range (32-bit whole numbers above 65,535, floating point).
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("floating-point pixels, of which nothing says what is white")
    if upright.mode.startswith("I"):
        values = np.asarray(upright).astype(np.int64)
        if values.size and (values.max() > 65535 or values.min() < 0):
            raise ValueError("32-bit pixels beyond the range of 16 bits, of which nothing says what is white")
        clear = values == upright.info.get("transparency", -1)
        upright = Image.fromarray(np.where(clear, 255, (values + 128) // 257).astype(np.uint8))
    see_through = upright.info.get("transparency")
    if (
        isinstance(see_through, tuple) and max(see_through) > 255
    ):  # of 16 bits a channel, of which Pillow keeps the upper 8
        upright.info["transparency"] = tuple(value >> 8 for value in see_through)
    if upright.has_transparency_data:
        over = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return upright.convert("RGB")
