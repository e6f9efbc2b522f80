"""The outer shell of a mask file: a safetensors header, read with no trust in its writer, sealed by a checksum.

Layout: 8 bytes little-endian header length, the header (JSON), the tensors' bytes without gaps. Every size is
checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from dwm_fast._files import reason
from dwm_fast.errors import MaskFileError

FORMAT = "dwm-fast-mask"
VERSION = "1"
MAX_HEADER_BYTES = 16 << 20
"""A longer header is refused; ResNet-18 needs less than 16 KiB."""
MAX_DIMENSIONS = 16
_ALIGNMENT = 64
_NO_SEAL = "0" * 64
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_SEAL = re.compile(r"[0-9a-f]{64}")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""safetensors' dtype codes that a mask file may hold."""
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the data."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: `data_start` counts from the start of the file, `content` is the inner metadata."""

    entries: Mapping[str, Entry]
    content: Mapping[str, Any]
    seal: str
    data_start: int


def build_header(
    tensors: list[tuple[str, str, tuple[int, ...], int]], content: Mapping[str, Any], least: int = 0
) -> bytes:
    """The sealed header, length prefix included, for (name, dtype code, shape, bytes) in data order.

    It is filled up with spaces to at least `least` bytes.
    """
    table: dict[str, Any] = {}
    position = 0
    for name, code, shape, length in tensors:
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    inner = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    metadata = {"content": inner, "format": FORMAT, "seal": _NO_SEAL, "version": VERSION}
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text = text.ljust(least)
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    raw = len(text).to_bytes(8, "little") + text
    seal = hashlib.sha256(raw).hexdigest()
    return raw.replace(_seal_field(_NO_SEAL), _seal_field(seal), 1)


def map_file(path: Path) -> Tensor:
    """The whole file as a private memory map, uint8 (size,): one moment's file even if it is replaced meanwhile.

    No file handle stays open. Raises MaskFileError when the file cannot be read or is shorter than 8 bytes.
    """
    while True:
        before = _stat(path)
        if before.st_size < 8:
            fail(path, "header length", f"{before.st_size} bytes; a mask file is a file of at least 8")
        mapped = _try_map(path, before.st_size)
        after = _stat(path)
        same = (before.st_dev, before.st_ino, before.st_size) == (after.st_dev, after.st_ino, after.st_size)
        if same and mapped is not None:
            return mapped
        if same:
            fail(path, "file", "cannot be memory-mapped; check its permissions")


def _stat(path: Path) -> os.stat_result:
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno())
    except OSError as error:
        raise MaskFileError(f"{path}: cannot be read: {reason(error)}") from error


def open_regular(path: Path, follow: bool = True) -> BinaryIO:
    """Open an ordinary file for reading; MaskFileError for a pipe or a device, which could wait for ever.

    A link to an ordinary file counts as one (the Hub's cache consists of links) unless `follow` is False. A file that
    is not there stays a FileNotFoundError.
    """
    try:
        handle = os.open(path, os.O_RDONLY | _NO_WAIT | (0 if follow else _NO_LINK))
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, "rb")
        os.close(handle)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise MaskFileError(f"{path}: cannot be read: {reason(error)}") from error
    fail(path, "file", "is no ordinary file; expected a file, not a folder, a pipe or a device")


def _try_map(path: Path, size: int) -> Tensor | None:
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (RuntimeError, ValueError):
        return None


def parse_header(path: Path, data: memoryview) -> Header:
    """Check the header of the file whose bytes are `data`; `path` is for messages only.

    Raises MaskFileError, naming the file and the field, for anything that is not a sealed header of this
    version whose tensors tile the rest of the file exactly.
    """
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if length > size - 8 or length > MAX_HEADER_BYTES:
        fail(path, "header length", f"{length} bytes in a file of {size}; it is truncated or not a mask file")
    raw = bytes(data[: 8 + length])
    table = parse_object(path, "header", raw[8:])
    metadata = _check_metadata(path, table.pop("__metadata__", None))
    _check_seal(path, metadata["seal"], raw)
    if (8 + length) % _ALIGNMENT:
        fail(path, "header length", f"the data begin at byte {8 + length}; expected a multiple of {_ALIGNMENT}")
    entries = _check_entries(path, table, size - 8 - length)
    content = parse_object(path, "content", metadata["content"])
    return Header(entries, content, metadata["seal"], 8 + length)


def is_mask_file(path: Path) -> bool:
    """Whether the file at `path` begins like a mask file of any version. MaskFileError when it cannot be read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            head = file.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise MaskFileError(f"{path}: cannot be read: {reason(error)}") from error
    return b'"format":"' + FORMAT.encode() + b'"' in head


def fail(path: Path, field: str, reason: str) -> NoReturn:
    """Raise the one kind of error a bad file gives."""
    raise MaskFileError(f"{path}: {field}: {reason}")


def parse_object(path: Path, field: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or infinities, 1e999 included; anything else is a MaskFileError."""
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise MaskFileError(f"{path}: {field}: not valid JSON ({str(error)[:120]})") from error
    if not isinstance(value, dict):
        fail(path, field, f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is beyond any float")
    return number


def _seal_field(seal: str) -> bytes:
    return f'"seal":"{seal}"'.encode()


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        fail(path, "format", f"not a mask file (expected '{FORMAT}' in the safetensors metadata)")
    if metadata.get("version") != VERSION:
        fail(
            path,
            "version",
            f"found {str(metadata.get('version'))[:40]!r}; this release reads version "
            f"{VERSION}; install a newer dwm-fast",
        )
    for key in ("content", "seal"):
        if not isinstance(metadata.get(key), str):
            fail(path, key, "missing, or not a string")
    only_keys(path, "__metadata__", metadata, ("content", "format", "seal", "version"))
    return metadata


def only_keys(path: Path, field: str, found: Mapping[str, Any], expected: Iterable[str]) -> None:
    """MaskFileError where an object has keys that the format does not know."""
    unknown = sorted(set(found) - set(expected))
    if unknown:
        fail(path, field, f"{unknown[0][:80]!r} is unknown to this version of the format")


def _check_seal(path: Path, seal: str, raw: bytes) -> None:
    if not _SEAL.fullmatch(seal) or raw.count(_seal_field(seal)) != 1:
        fail(path, "seal", "expected 64 lower-case hexadecimal digits, written once")
    if hashlib.sha256(raw.replace(_seal_field(seal), _seal_field(_NO_SEAL), 1)).hexdigest() != seal:
        fail(path, "seal", "the header was changed after it was written; fetch the file again")


def _check_entries(path: Path, table: dict[str, Any], size: int) -> dict[str, Entry]:
    entries = [_check_entry(path, name, value, size) for name, value in table.items()]
    position = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            fail(
                path,
                f"{entry.name}.data_offsets",
                f"starts at byte {entry.begin}, expected {position}: tensors may neither overlap nor leave gaps",
            )
        position = entry.end
    if position != size:
        fail(
            path,
            "data",
            f"the header describes {position} bytes, the file holds {size}; it is truncated or has bytes appended",
        )
    return {entry.name: entry for entry in entries}


def _check_entry(path: Path, name: str, value: Any, size: int) -> Entry:
    if not is_name(name):
        fail(path, "tensor name", f"{name[:80]!r} is not printable text of 1 to 512 characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        fail(path, name, "expected exactly dtype, shape and data_offsets")
    code = value["dtype"]
    if not isinstance(code, str) or code not in DTYPES:
        fail(path, f"{name}.dtype", f"{str(code)[:40]!r} is not one of {', '.join(DTYPES)}")
    shape = check_shape(path, f"{name}.shape", value["shape"])
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        fail(path, f"{name}.data_offsets", "expected two byte positions")
    begin, end = offsets
    if not begin <= end <= size:
        fail(path, f"{name}.data_offsets", f"[{begin}, {end}] does not lie in {size} bytes of data")
    expected = math.prod(shape) * DTYPES[code].itemsize
    if expected != end - begin:
        fail(path, f"{name}.shape", f"{list(shape)} of {code} takes {expected} bytes, the offsets span {end - begin}")
    return Entry(name, code, shape, begin, end)


def is_name(value: Any) -> bool:
    """Whether a JSON value can name a tensor: printable text of 1 to 512 characters."""
    return isinstance(value, str) and 0 < len(value) <= 512 and value.isprintable()


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number in [0, 2^53]."""
    return type(value) is int and 0 <= value <= 1 << 53


def check_shape(path: Path, field: str, value: Any) -> tuple[int, ...]:
    """A list of at most 16 sizes whose product stays below 2^53, as a tuple."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS or not all(is_count(size) for size in value):
        fail(path, field, f"expected a list of at most {MAX_DIMENSIONS} whole numbers")
    total = 1
    for size in value:
        total *= max(size, 1)
        if total > 1 << 53:
            fail(path, field, "the number of elements is beyond any file")
    return tuple(value)
