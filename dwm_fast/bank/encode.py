"""Writing one domain as one file: which bytes, and atomically. See docs/format.md."""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import numpy as np

from dwm_fast._files import write_atomic
from dwm_fast.bank import coding as codes
from dwm_fast.bank.content import BIT_ORDER, CHECKSUMS, CODED_WEIGHTS_PER_BYTE, FREE_CODED_WEIGHTS
from dwm_fast.bank.header import DTYPE_CODES, MAX_HEADER_BYTES, build_header
from dwm_fast.bank.record import DomainMasks, MaskInfo, bits_digest, check_values, tensor_bytes
from dwm_fast.errors import InputError, MaskFileError

CODINGS = ("raw", "coded")
"""How a file may be written: exactly one bit per weight, or entropy-coded where that is smaller."""


def encode_domain(record: DomainMasks, coding: str = "raw", reference: DomainMasks | None = None) -> bytes:
    """The whole file of a domain. Equal input gives equal bytes.

    Args:
        record: the domain.
        coding: "raw", or "coded" (needs the package `constriction`).
        reference: only with "coded": a domain of the same layout; tensors that shrink by it are stored as the
            exclusive or with its bits, and reading needs that domain again.
    """
    if coding not in CODINGS:
        raise InputError(f"coding '{coding}' is unknown; expected one of {', '.join(CODINGS)}")
    if reference is not None and (coding != "coded" or reference.info.layout != record.info.layout):
        raise InputError(
            f"reference '{reference.info.domain}' needs coding='coded' and masks of the same names "
            f"and shapes as '{record.info.domain}'"
        )
    check_values(record)
    tensors = _extras(record)
    table = []
    for index, where in enumerate(record.info.layout.slices()):
        about, stored = _encode_tensor(record, index, where, coding, reference)
        table.append(about)
        tensors.append((f"bits.{about['name']}", "U8", stored.shape, stored))
    sums = b"".join(hashlib.sha256(data.data).digest() for *_, data in tensors)
    tensors.append((CHECKSUMS, "U8", (len(tensors), 32), np.frombuffer(sums, np.uint8)))
    used = any(about.get("xor") for about in table)
    content = _content(record.info, table, hashlib.sha256(sums).hexdigest(), reference if used else None)
    sizes = [(name, code, shape, data.size) for name, code, shape, data in tensors]
    header = build_header(sizes, content, _least_header(table, sum(size for *_, size in sizes)))
    return b"".join([header, *(data.tobytes() for *_, data in tensors)])


def _extras(record: DomainMasks) -> list[tuple[str, str, tuple[int, ...], codes.Bytes]]:
    """Name, dtype code, shape and bytes of the tensors beside the masks, widest dtype first so that all align."""
    extras = {f"state.{name}": tensor for name, tensor in record.state.items()}
    extras |= {f"values.{name}": tensor for name, tensor in record.values.items()}
    result = []
    for name in sorted(extras, key=lambda n: (-extras[n].element_size(), n)):
        tensor = extras[name].detach().cpu().contiguous()
        if tensor.dtype not in DTYPE_CODES:
            known = ", ".join(map(str, DTYPE_CODES))
            raise InputError(f"'{name}' is {tensor.dtype}; a mask file holds {known}")
        result.append((name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor_bytes(tensor)))
    return result


def _least_header(table: list[dict[str, Any]], payload: int) -> int:
    """Header length that keeps the file within what readers decode."""
    coded = sum(math.prod(about["shape"]) for about in table if about["coding"] != "raw")
    least: int = -(-max(coded - FREE_CODED_WEIGHTS, 0) // CODED_WEIGHTS_PER_BYTE) - payload
    if least > MAX_HEADER_BYTES:
        raise InputError(f"{coded} weights in {payload} bytes of code are more than a reader decodes; use coding='raw'")
    return least


def _encode_tensor(
    record: DomainMasks, index: int, where: slice, coding: str, reference: DomainMasks | None
) -> tuple[dict[str, Any], codes.Bytes]:
    info = record.info
    shape = info.layout.shapes[index]
    n = math.prod(shape)
    packed = tensor_bytes(record.bits[where])
    about: dict[str, Any] = {"name": info.layout.names[index], "shape": list(shape), "ones": info.ones[index]}
    if coding == "raw":
        return {**about, "coding": "raw"}, packed
    keep = np.unpackbits(packed, count=n, bitorder="little")
    plan = codes.plan(keep, shape)
    if reference is not None:
        difference = keep ^ np.unpackbits(tensor_bytes(reference.bits[where]), count=n, bitorder="little")
        other = codes.plan(difference, shape)
        if other.bits < plan.bits:
            keep, plan = difference, other
            about["xor"] = True
    stored = codes.encode(keep, shape, plan)
    about["coding"] = plan.coding
    if plan.coding == "ans":
        about["frequency"] = plan.frequency
    elif plan.coding == "channel":
        about["axis"] = plan.axis
    return about, stored


def _content(
    info: MaskInfo, table: list[dict[str, Any]], checksums: str, reference: DomainMasks | None
) -> dict[str, Any]:
    base = None if reference is None else {"domain": reference.info.domain, "bits": bits_digest(reference)}
    return {
        "domain": info.domain,
        "form": info.form,
        "method": info.method,
        "classes": list(info.classes),
        "options": dict(info.options),
        "backbone": info.fingerprint,
        "bit_order": BIT_ORDER,
        "tensors": table,
        "checksums": checksums,
        "reference": base,
    }


def write_mask_file(
    path: str | os.PathLike[str],
    record: DomainMasks,
    coding: str = "raw",
    reference: DomainMasks | None = None,
) -> None:
    """Write one domain to `path` atomically: temporary file, fsync, rename. See `encode_domain`."""
    write_atomic(path, encode_domain(record, coding, reference), MaskFileError)
