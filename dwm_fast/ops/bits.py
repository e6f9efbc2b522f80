"""bits: masks at one bit per weight: pack, unpack, apply, count, combine, overlap.

Bit order: LSB first, logical contiguous order, each tensor of a network on a fresh 16-byte boundary, padding
zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.packing import COMBINATIONS, check_length, packed_nbytes, packed_offsets
from dwm_fast.ops.registration import define


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def pack_reference(masks: Sequence[Tensor]) -> Tensor:
    parts = []
    for mask in masks:
        flat = (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)
        padded = F.pad(flat, (0, 8 * packed_nbytes(flat.numel()) - flat.numel()))
        parts.append((padded.view(-1, 8).to(torch.uint8) * _powers(flat.device)).sum(1, dtype=torch.uint8))
    if not parts:
        return torch.empty(0, dtype=torch.uint8)
    return torch.cat(parts)


def unpack_reference(bits: Tensor, numels: Sequence[int]) -> list[Tensor]:
    offsets = packed_offsets(numels)
    flat = (bits.unsqueeze(1) & _powers(bits.device)) != 0
    return [flat[offsets[i] : offsets[i + 1]].reshape(-1)[:numel].clone() for i, numel in enumerate(numels)]


def apply_reference(bits: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    masks = unpack_reference(bits, [w.numel() for w in weights])
    return [
        torch.empty_like(w).copy_(torch.where(m.view(w.shape), w, torch.zeros((), dtype=w.dtype, device=w.device)))
        for w, m in zip(weights, masks, strict=True)
    ]


def count_reference(bits: Tensor, numels: Sequence[int]) -> Tensor:
    parts = [mask.sum(dtype=torch.int64) for mask in unpack_reference(bits, numels)]
    return torch.stack(parts) if parts else torch.zeros(0, dtype=torch.int64, device=bits.device)


def combine_reference(a: Tensor, b: Tensor, op: str) -> Tensor:
    if op == "and":
        return a & b
    if op == "or":
        return a | b
    return a ^ b if op == "xor" else a & ~b


def overlap_reference(a: Tensor, b: Tensor, numels: Sequence[int]) -> Tensor:
    return torch.stack([count_reference(a & b, numels), count_reference(a | b, numels)], dim=1)


def _pack_fake(masks: Sequence[Tensor]) -> Tensor:
    nbytes = sum(packed_nbytes(m.numel()) for m in masks)
    device = masks[0].device if masks else torch.device("cpu")
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


define(
    "pack(Tensor[] masks) -> Tensor",
    reference=pack_reference,
    fake=_pack_fake,
)
define(
    "unpack(Tensor bits, SymInt[] numels) -> Tensor[]",
    reference=unpack_reference,
    fake=lambda bits, numels: [bits.new_empty(n, dtype=torch.bool) for n in numels],
)
define(
    "apply(Tensor bits, Tensor[] weights) -> Tensor[]",
    reference=apply_reference,
    fake=lambda bits, weights: [torch.empty_like(w) for w in weights],
)
define(
    "count(Tensor bits, SymInt[] numels) -> Tensor",
    reference=count_reference,
    fake=lambda bits, numels: bits.new_empty(len(numels), dtype=torch.int64),
)
define(
    "combine(Tensor a, Tensor b, str op) -> Tensor",
    reference=combine_reference,
    fake=lambda a, b, op: torch.empty_like(a),
)
define(
    "overlap(Tensor a, Tensor b, SymInt[] numels) -> Tensor",
    reference=overlap_reference,
    fake=lambda a, b, numels: a.new_empty((len(numels), 2), dtype=torch.int64),
)


def _apply_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    bits, weights = inputs
    ctx.save_for_backward(bits, *weights)


def _apply_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    bits, *weights = ctx.saved_tensors
    filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    return None, torch.ops.dwm_fast.apply(bits, filled)


torch.library.register_autograd("dwm_fast::apply", _apply_backward, setup_context=_apply_setup_context)


def pack(masks: Sequence[Tensor]) -> Tensor:
    """Masks (any shapes and dtypes; nonzero = keep) -> one network buffer, uint8 (nbytes,)."""
    result: Tensor = torch.ops.dwm_fast.pack(list(masks))
    return result


def unpack(bits: Tensor, numels: Sequence[int]) -> list[Tensor]:
    """Network buffer -> one flat bool tensor of numels[i] elements per tensor. Wrong length: InputError."""
    check_length(bits, numels)
    result: list[Tensor] = torch.ops.dwm_fast.unpack(bits, list(numels))
    return result


def apply(bits: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """weights[i] where its bit is 1, else +0; strides and dtype kept; differentiable in the weights.

    Wrong length: InputError.
    """
    check_length(bits, [w.numel() for w in weights])
    result: list[Tensor] = torch.ops.dwm_fast.apply(bits, list(weights))
    return result


def count(bits: Tensor, numels: Sequence[int]) -> Tensor:
    """Ones of each tensor, int64 (len(numels),). Wrong length: InputError."""
    check_length(bits, numels)
    result: Tensor = torch.ops.dwm_fast.count(bits, list(numels))
    return result


def combine(a: Tensor, b: Tensor, op: str) -> Tensor:
    """Set operation on packed buffers of equal length; `op`: "and", "or", "xor" or "andnot" (a and not b)."""
    if op not in COMBINATIONS:
        raise InputError(f"combine got op '{op}'; expected one of {', '.join(COMBINATIONS)}")
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise InputError(
            f"combine got {a.dtype} of shape {tuple(a.shape)} and {b.dtype} of shape {tuple(b.shape)}; "
            "expected two packed buffers: uint8, of equal length"
        )
    if a.device.type == "cpu":  # torch's own run at the memory's speed; a custom operation's call takes as long again
        return combine_reference(a, b, op)
    result: Tensor = torch.ops.dwm_fast.combine(a, b, op)
    return result


def overlap(a: Tensor, b: Tensor, numels: Sequence[int]) -> Tensor:
    """Sizes of intersection and union of each tensor's bits, int64 (len(numels), 2)."""
    check_length(a, numels)
    check_length(b, numels)
    result: Tensor = torch.ops.dwm_fast.overlap(a, b, list(numels))
    return result


def jaccard(a: Tensor, b: Tensor, numels: Sequence[int]) -> float:
    """Jaccard index of two networks' masks: all intersections over all unions; 1.0 when both are empty."""
    both, either = overlap(a, b, numels).sum(0).tolist()
    return both / either if either else 1.0
