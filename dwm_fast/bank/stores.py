"""Kept weights in mixed batches: what few rows of several domains are multiplied with, not all of a large weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.bank.layers import Batch, by_part
from dwm_fast.ops.bank import multiplies_bits, reads_bits
from dwm_fast.ops.blocks import bias_of
from dwm_fast.ops.union import Bytes, bytes_of, joined, smallest


@dataclass(frozen=True, eq=False)
class Store:
    """Kept storage of one weight (N, K): of each domain, or one of their union.

    Attributes:
        form: "separate" or "union".
        kept: values and row starts, one pair a domain or one of the union.
        read: bytes that few rows read of it, in this form and in the others.
    """

    form: str
    kept: tuple[tuple[Tensor, Tensor], ...]
    read: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of values and row starts."""
        return sum(t.numel() * t.element_size() for pair in self.kept for t in pair)

    def product(self, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, batch: Batch) -> Tensor | None:
        """x (B, ..., K) under the bits (D, nbytes) of each sample's domain; None where it is not for this store."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        if not all(reads_bits(x[part], weight) for _, part in batch.parts(x.shape[0])):
            return None
        if self.form == "union":
            return ops.bank_linear_union(x, *self.kept[0], bits, bias, batch.offsets, batch.samples)
        return by_part(x, lambda d, part: ops.linear_kept(part, *self.kept[d], bits[d], bias_of(bias, d)))


def store(weight: Tensor, bits: Tensor, room: int) -> Store | None:
    """The smallest store of a weight (N, K) under the masks of `bits` (D, nbytes); None where that is the weight.

    That is so where it is not large, where no kernel reads kept weights, and where the store takes more than `room`.
    """
    if not multiplies_bits(weight):
        return None
    numel = weight.numel()
    kept = [int(ops.count(row, [numel])[0]) for row in bits]
    both = int(ops.count(joined(bits), [numel])[0])
    form = smallest(numel, kept, both)
    if form == "dense" or _nbytes(weight, [both] if form == "union" else kept) > room:
        return None
    read = bytes_of(numel, weight.element_size(), kept, both)
    if form == "union":
        return Store(form, (ops.keep_union(weight, bits),), read)
    return Store(form, tuple(ops.keep_values(weight, row) for row in bits), read)


def _nbytes(weight: Tensor, counts: Sequence[int]) -> int:
    """Bytes of as many pairs of values and row starts."""
    return sum((count + ops.PADDING) * weight.element_size() + (weight.shape[0] + 1) * 8 for count in counts)
