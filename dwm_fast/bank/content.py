"""The inner metadata of a mask file, checked claim by claim before anything is read or allocated for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwm_fast.bank import coding as codes
from dwm_fast.bank.header import Entry, check_shape, fail, is_count, is_name, only_keys
from dwm_fast.bank.record import FORMS, MAX_TEXT, Layout, MaskInfo, check_domain_name, check_options, is_text
from dwm_fast.errors import InputError, MaskFileError

CHECKSUMS = "sha256"
"""Name of the tensor (T, 32) that holds the SHA-256 of every other tensor, in the order of their bytes."""
BIT_ORDER = "lsb-first"
FREE_CODED_WEIGHTS = 1 << 24
CODED_WEIGHTS_PER_BYTE = 256
"""A file of s bytes describes at most 2^24 + 256 s weights in code: decoding, whose time goes with the weights (42
million, all that 100 KB may hold, take 0.4 to 0.8 s on one core of an AMD EPYC), is bounded by what was given. Raw bits
bound themselves."""


_KEYS = (
    "domain", "form", "method", "classes", "options", "backbone", "bit_order", "tensors", "checksums", "reference",
)  # fmt: skip
_TENSOR_KEYS = {"raw": (), "ans": ("frequency",), "channel": ("axis",)}
_HEX = re.compile(r"[0-9a-f]*")


def _is_digest(value: Any, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and _HEX.fullmatch(value) is not None


def most_coded_weights(size: int) -> int:
    """How many weights a file of `size` bytes may hold in code."""
    return FREE_CODED_WEIGHTS + CODED_WEIGHTS_PER_BYTE * size


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor's bits lie in the file; the plan has no levels, which come before the code itself."""

    plan: codes.Plan
    xor: bool


@dataclass(frozen=True)
class Content:
    """A checked description.

    stored: how each mask is stored. extras: full names of the tensors beside the masks. checksums: SHA-256,
    hexadecimal, of the tensor CHECKSUMS. reference: domain and bits digest that xor'ed tensors need.
    """

    info: MaskInfo
    stored: Mapping[str, StoredTensor]
    extras: tuple[str, ...]
    checksums: str
    reference: tuple[str, str] | None


def check_content(path: Path, content: Mapping[str, Any], entries: Mapping[str, Entry], size: int) -> Content:
    """The content of the header of a file of `size` bytes; MaskFileError naming file and field if it is wrong."""
    only_keys(path, "content", content, _KEYS)
    info, stored = _check_info(path, content, entries, size)
    checksums = content.get("checksums")
    sums = entries.get(CHECKSUMS)
    if not _is_digest(checksums, 64) or sums is None or (sums.code, sums.shape) != ("U8", (len(entries) - 1, 32)):
        fail(path, CHECKSUMS, f"expected a U8 tensor of shape [{len(entries) - 1}, 32] and its own checksum")
    needed = any(tensor.xor for tensor in stored.values())
    reference = _check_reference(path, content.get("reference"), needed)
    return Content(info, stored, _check_extras(path, entries), str(checksums), reference)


def _check_info(
    path: Path, content: Mapping[str, Any], entries: Mapping[str, Entry], size: int
) -> tuple[MaskInfo, dict[str, StoredTensor]]:
    texts = {key: content.get(key) for key in ("domain", "form", "method", "backbone", "bit_order")}
    for key, value in texts.items():
        if not is_text(value):
            fail(path, key, f"expected text of at most {MAX_TEXT} characters")
    if texts["bit_order"] != BIT_ORDER:
        fail(path, "bit_order", f"{texts['bit_order']!r:.60}; this release reads '{BIT_ORDER}'")
    if texts["form"] not in FORMS:
        fail(path, "form", f"{texts['form']!r:.60} is not one of {', '.join(FORMS)}")
    if texts["backbone"] and not _is_digest(texts["backbone"], 64):
        fail(path, "backbone", "expected 64 lower-case hexadecimal digits, or nothing")
    classes, options = content.get("classes"), content.get("options")
    if not isinstance(classes, list) or not all(is_text(c) for c in classes):
        fail(path, "classes", "expected a list of text")
    if not isinstance(options, dict):
        fail(path, "options", "expected an object")
    try:
        field = "domain"
        domain = check_domain_name(texts["domain"])
        field = "options"
        check_options(options)
    except InputError as error:
        raise MaskFileError(f"{path}: {field}: {error}") from error
    stored, layout, ones = _check_tensors(path, content.get("tensors"), entries, size)
    info = MaskInfo(
        domain,
        layout,
        ones,
        str(texts["form"]),
        str(texts["method"]),
        tuple(classes),
        options,
        str(texts["backbone"]),
    )
    return info, stored


def _check_tensors(
    path: Path, table: Any, entries: Mapping[str, Entry], size: int
) -> tuple[dict[str, StoredTensor], Layout, tuple[int, ...]]:
    if not isinstance(table, list):
        fail(path, "tensors", "expected a list")
    stored: dict[str, StoredTensor] = {}
    shapes: list[tuple[int, ...]] = []
    ones: list[int] = []
    for about in table:
        name = about.get("name") if isinstance(about, dict) else None
        if not isinstance(name, str) or not is_name(name) or name in stored:
            fail(path, "tensors", "expected objects with a name each, no name twice")
        shapes.append(check_shape(path, f"{name}.shape", about.get("shape")))
        n = math.prod(shapes[-1])
        if not is_count(about.get("ones")) or about["ones"] > n:
            fail(path, f"{name}.ones", f"expected a whole number in [0, {n}]")
        ones.append(about["ones"])
        stored[name] = _check_stored(path, about, shapes[-1], entries.get(f"bits.{name}"))
        known = _TENSOR_KEYS[stored[name].plan.coding]
        only_keys(path, name, about, ("name", "shape", "ones", "coding", "xor", *known))
    coded = sum(math.prod(s) for s, kept in zip(shapes, stored.values(), strict=True) if kept.plan.coding != "raw")
    if coded > most_coded_weights(size):
        fail(path, "tensors", f"{coded} coded weights in {size} bytes; at most {most_coded_weights(size)} are read")
    unknown = {n for n in entries if n.startswith("bits.")} - {f"bits.{n}" for n in stored}
    if unknown:
        fail(path, min(unknown), "is not described in tensors")
    return stored, Layout(tuple(stored), tuple(shapes)), tuple(ones)


def _check_stored(path: Path, about: dict[str, Any], shape: tuple[int, ...], entry: Entry | None) -> StoredTensor:
    name, n = about["name"], math.prod(shape)
    if entry is None or entry.code != "U8" or len(entry.shape) != 1:
        fail(path, f"bits.{name}", "missing, or not a one-dimensional U8 tensor")
    nbytes = entry.end - entry.begin
    coding, xor = about.get("coding"), about.get("xor", False)
    if not isinstance(xor, bool):
        fail(path, f"{name}.xor", "expected true or false")
    if coding == "raw":
        if nbytes != (n + 7) // 8:
            fail(path, f"{name}.shape", f"{list(shape)} needs {(n + 7) // 8} bytes of bits, found {nbytes}")
        return StoredTensor(codes.Plan("raw", 8.0 * nbytes), xor)
    if coding == "ans":
        frequency = about.get("frequency")
        if type(frequency) is not int or not 0 < frequency < 1 << codes.PRECISION:
            fail(path, f"{name}.frequency", f"expected a whole number in 1 .. 2^{codes.PRECISION} - 1")
        return StoredTensor(codes.Plan("ans", 8.0 * nbytes, frequency=frequency), xor)
    if coding == "channel":
        axis = about.get("axis")
        if type(axis) is not int or not 0 <= axis < min(2, len(shape)) or shape[axis] > nbytes:
            fail(path, f"{name}.axis", "expected dimension 0 or 1, with one stored level per index of it")
        return StoredTensor(codes.Plan("channel", 8.0 * nbytes, axis=axis), xor)
    return fail(path, f"{name}.coding", f"{str(coding)[:40]!r} is not raw, ans or channel")


def _check_extras(path: Path, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    extras = tuple(name for name in entries if not name.startswith("bits.") and name != CHECKSUMS)
    for name in extras:
        group, _, rest = name.partition(".")
        if group not in ("state", "values") or not rest:
            fail(path, name, "expected names that begin with 'bits.', 'state.' or 'values.'")
    return extras


def _check_reference(path: Path, reference: Any, needed: bool) -> tuple[str, str] | None:
    if reference is None and not needed:
        return None
    if not isinstance(reference, dict) or not needed:
        fail(path, "reference", "expected an object exactly when a tensor has xor")
    only_keys(path, "reference", reference, ("domain", "bits"))
    check = reference.get("bits")
    try:
        domain = check_domain_name(reference.get("domain"))
    except InputError as error:
        raise MaskFileError(f"{path}: reference: {error}") from error
    if not _is_digest(check, 32):
        fail(path, "reference.bits", "expected the first 32 hexadecimal digits of a SHA-256")
    return domain, str(check)
