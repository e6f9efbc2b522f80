"""What one domain consists of: a description, packed keep bits, and the real tensors it may have of its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwm_fast import ops
from dwm_fast.bank.header import MAX_DIMENSIONS, is_name
from dwm_fast.errors import InputError

FORMS = ("binary", "ternary", "soft", "edit", "kept")
"""What a domain does to a weight W with keep bits m: W * m; W * m * sign; W * (m or a value); W + a value; a value of
its own where m is 1 and 0 elsewhere, whatever W is."""

VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TEXT = 4096
MAX_DEPTH = 32
MAX_NUMBER = 1 << 1023
"""Whole numbers stay below it, so that any program can read them as floats."""
_HALF = re.compile("[\ud800-\udfff]")
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the masked tensors, in the order of their bits."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def numels(self) -> list[int]:
        """Bits per tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @cached_property
    def places(self) -> dict[str, int]:
        """Number of each tensor, by name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def starts(self) -> list[int]:
        """First byte of each tensor in a network buffer, and the buffer's length."""
        return ops.packed_offsets(self.numels)

    def slices(self) -> list[slice]:
        """Each tensor's ceil(n / 8) bytes inside a network buffer."""
        return [slice(start, start + (n + 7) // 8) for start, n in zip(self.starts, self.numels, strict=False)]


@dataclass(frozen=True)
class MaskInfo:
    """The description of a domain: all that its file's header says, without any tensor.

    fingerprint: of the backbone's masked weights, 64 hexadecimal digits, or "" when it is unknown.
    ones: kept weights per tensor, in the layout's order.
    """

    domain: str
    layout: Layout
    ones: tuple[int, ...]
    form: str = "binary"
    method: str = ""
    classes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def fraction_kept(self) -> float:
        """Ones over all bits, in [0, 1]; 0 for a domain without weights."""
        return sum(self.ones) / max(sum(self.layout.numels), 1)


@dataclass(frozen=True)
class DomainMasks:
    """One domain in memory.

    bits: network buffer (uint8) of the layout. state: tensors by state_dict name that replace the backbone's
    own (head, batch norm). values: by masked tensor, what the form needs beside the bits: "soft" and "edit"
    floats, one per weight or one per ZERO bit in order; "ternary" uint8 packed sign bits (1 = minus); "kept"
    floats, one per ONE bit in order.
    """

    info: MaskInfo
    bits: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def masks(self) -> dict[str, Tensor]:
        """Keep masks by name, bool, in their own shapes."""
        layout = self.info.layout
        flat = ops.unpack(self.bits, layout.numels)
        return {n: m.reshape(s) for n, m, s in zip(layout.names, flat, layout.shapes, strict=True)}


def make_domain(
    domain: str,
    masks: Mapping[str, Tensor],
    *,
    form: str = "binary",
    method: str = "",
    classes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    values: Mapping[str, Tensor] | None = None,
    fingerprint: str = "",
) -> DomainMasks:
    """Pack bool masks (any shapes, 0-d and empty included) and check everything that belongs to the domain.

    Raises InputError that names the argument when a name, dtype, shape or length does not fit.
    """
    check_domain_name(domain)
    for what, text in (("method", method), *(("classes", str(name)) for name in classes)):
        if not is_text(text):
            raise InputError(
                f"{what}: {str(text)[:80]!r} is not text of at most {MAX_TEXT} characters that UTF-8 holds"
            )
    if form not in FORMS:
        raise InputError(f"form '{form}' is unknown; expected one of {', '.join(FORMS)}")
    for name, mask in [*masks.items(), *(state or {}).items(), *(values or {}).items()]:
        check_tensor(name, mask)
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise InputError(f"mask '{name}' is {mask.dtype}; expected torch.bool (see dwm_fast.bank.as_masks)")
    layout = Layout(tuple(masks), tuple(tuple(m.shape) for m in masks.values()))
    bits = ops.pack([m.detach().cpu() for m in masks.values()])
    ones = tuple(int(n) for n in ops.count(bits, layout.numels))
    info = MaskInfo(
        domain, layout, ones, form, method, tuple(str(c) for c in classes), _plain(options or {}), fingerprint
    )
    record = DomainMasks(info, bits, _private(state or {}), _private(values or {}))
    check_values(record)
    return record


def check_tensor(name: str, tensor: Tensor) -> None:
    """InputError unless a file can hold a tensor of that name."""
    if not is_name(f"values.{name}"):
        raise InputError(
            f"{str(name)[:80]!r} cannot name a tensor in a file; use printable text of 1 to 505 characters"
        )
    plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized or tensor.dim() > MAX_DIMENSIONS:
        given = f"{tensor.layout}, {tensor.dtype}, on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor)
        raise InputError(f"'{name}' is no plain tensor of at most {MAX_DIMENSIONS} dimensions: {given}")


def is_text(value: Any) -> bool:
    """Whether a value is text that a description may hold: at most 4096 characters, whole ones."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and not _HALF.search(value)


def check_options(options: Any) -> None:
    """InputError unless options are plain data: at most 32 deep, text as in `is_text`, numbers as floats hold."""
    level: list[Any] = [options]
    for _ in range(MAX_DEPTH):
        texts = [x for x in level if isinstance(x, str)] + [key for x in level if isinstance(x, dict) for key in x]
        wrong: list[Any] = [x for x in texts if not is_text(x)]
        wrong += [x for x in level if type(x) is int and abs(x) >= MAX_NUMBER]
        if wrong:
            raise InputError(
                f"options hold {str(wrong[0])[:40]!r}, no text or number that a file may hold (docs/format.md)"
            )
        level = [y for x in level if isinstance(x, dict | list) for y in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise InputError(f"options are more than {MAX_DEPTH} levels deep; give plain data")


def check_domain_name(domain: Any) -> str:
    """The name itself, if it can be a file's name everywhere; InputError otherwise."""
    if not isinstance(domain, str) or not _DOMAIN.fullmatch(domain):
        raise InputError(
            f"domain {str(domain)[:120]!r} cannot name a file; use 1 to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return domain


def check_values(record: DomainMasks) -> None:
    """InputError when a domain's values do not fit its form, bits and shapes, or clash with its state."""
    info = record.info
    numels = dict(zip(info.layout.names, info.layout.numels, strict=True))
    ones = dict(zip(info.layout.names, info.ones, strict=True))
    both = sorted(set(record.state) & set(numels))
    if both:
        raise InputError(f"'{both[0]}' is given both a mask and a value of its own in state; give one")
    expected = set() if info.form == "binary" else set(numels)
    if set(record.values) != expected:
        wrong = sorted(set(record.values) ^ expected)[0]
        raise InputError(
            f"values: form '{info.form}' needs {'none' if not expected else 'one per mask'}; "
            f"'{wrong}' is {'missing' if wrong in expected else 'too many'}"
        )
    for name, value in record.values.items():
        n = numels[name]
        if info.form == "ternary":
            fits = value.dtype == torch.uint8 and value.shape == ((n + 7) // 8,)
            rule = f"uint8 of shape ({(n + 7) // 8},), sign bits packed LSB first"
        elif info.form == "kept":
            fits = value.dtype in (*VALUE_DTYPES, torch.float64) and value.shape == (ones[name],)
            rule = f"a 1-D float of {ones[name]} elements (one per one bit)"
        else:
            fits = value.dtype in VALUE_DTYPES and value.dim() == 1 and value.numel() in (n, n - ones[name])
            rule = f"a 1-D float of {n} (one per weight) or {n - ones[name]} elements (one per zero bit)"
        if not fits:
            given = f"{value.dtype} of shape {tuple(value.shape)}"
            raise InputError(f"values['{name}'] is {given}; expected {rule}")


def effective_weight(record: DomainMasks, name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """`weight` under the domain's rule for `name`; `mask` is its bool mask, broadcastable to the weight."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    form = record.info.form
    if form == "binary":
        return torch.where(mask, weight, zero)
    value = record.values[name].to(weight.device)
    if form == "kept":
        return torch.zeros_like(weight).masked_scatter_(mask, value.to(weight.dtype))
    if form == "ternary":
        minus = ops.unpack(_padded(value), [mask.numel()])[0].view(mask.shape)
        return torch.where(mask, torch.where(minus, -weight, weight), zero)
    full = _spread(value, mask).to(weight.dtype)
    return torch.where(mask, weight, weight * full) if form == "soft" else weight + full


def network_bits(domain: DomainMasks, name: str, weight: Tensor) -> Tensor:
    """The packed bits of one weight in one domain, spread over the weight's shape; all ones where it has no mask."""
    layout = domain.info.layout
    if name not in layout.places:
        return ops.pack([torch.ones(weight.shape, dtype=torch.bool)])
    index = layout.places[name]
    bits = domain.bits[layout.starts[index] : layout.starts[index + 1]]
    if layout.shapes[index] == tuple(weight.shape):
        return bits
    mask = ops.unpack(bits, [layout.numels[index]])[0].view(layout.shapes[index])
    return ops.pack([mask.expand(weight.shape)])


def _spread(value: Tensor, mask: Tensor) -> Tensor:
    """Values of the mask's shape; those given per zero bit land there and leave the ones at 0."""
    if value.numel() == mask.numel():
        return value.view(mask.shape)
    full = torch.zeros(mask.shape, dtype=value.dtype, device=value.device)
    return full.masked_scatter_(~mask, value)


def _padded(packed: Tensor) -> Tensor:
    buffer = packed.new_zeros(ops.packed_nbytes(8 * packed.numel()))
    buffer[: packed.numel()] = packed
    return buffer


def pack_signs(negative: Tensor) -> Tensor:
    """Bool tensor of any shape -> the uint8 sign bits that form "ternary" stores."""
    return ops.pack([negative.cpu()])[: (negative.numel() + 7) // 8].clone()


def tensor_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor, without copying."""
    array: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array


def bits_digest(record: DomainMasks) -> str:
    """Checksum of a domain's masks: names, shapes and bits, whatever the coding and whatever else it holds."""
    layout = record.info.layout
    data = hashlib.sha256(json.dumps([layout.names, layout.shapes]).encode())
    for part in layout.slices():
        data.update(tensor_bytes(record.bits[part]).data)
    return data.hexdigest()[:32]


def _private(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON reads them back, so that a round trip through a file changes nothing."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"options must be plain data (text, numbers, lists, objects): {error}") from error
    check_options(plain)
    return plain
