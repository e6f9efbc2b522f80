"""How bits lie in a network buffer: LSB first, logical contiguous order, each tensor on a fresh 16-byte boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwm_fast.errors import InputError

ALIGNMENT = 16
"""Bytes: every tensor's bits start at a multiple of this in a network buffer."""

COMBINATIONS = {"and": 0, "or": 1, "xor": 2, "andnot": 3}
"""Set operations by number, in every backend (csrc/core.h)."""


def packed_nbytes(numel: int) -> int:
    """Bytes that `numel` bits take in a network buffer: ceil(numel / 128) * 16."""
    return (numel + 8 * ALIGNMENT - 1) // (8 * ALIGNMENT) * ALIGNMENT


def packed_offsets(numels: Sequence[int]) -> list[int]:
    """First byte of each tensor in a network buffer, and the buffer's length as the last entry."""
    offsets = [0]
    for numel in numels:
        offsets.append(offsets[-1] + packed_nbytes(numel))
    return offsets


def check_length(bits: Tensor, numels: Sequence[int]) -> None:
    """InputError unless `bits` is a network buffer for tensors of `numels` elements."""
    expected = packed_offsets(numels)[-1]
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != expected:
        raise InputError(
            f"packed bits: given {bits.dtype} of shape {tuple(bits.shape)}, expected uint8 of shape "
            f"({expected},) for {len(numels)} tensors of {sum(numels)} weights; pack the masks with "
            "dwm_fast.ops.pack"
        )
