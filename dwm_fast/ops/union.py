"""bank_linear_union: a batch sorted by domain, by one store of the weights that at least one domain keeps.

The store is kept storage (see `kept`) of the union of the masks: values, and row starts. The bits of each domain say
which of them are its own. A weight that one domain keeps and another drops is in the store; none of it reaches the
other's rows, NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.bank import bank_linear_reference, check_bank
from dwm_fast.ops.bits import combine
from dwm_fast.ops.kept import KEPT_SHARE, PADDING, expand_values, keep_values, weight_like
from dwm_fast.ops.registration import define
from dwm_fast.ops.transforms import refuse_forward_mode

MOST_DOMAINS = 4
"""More masks together keep nearly all weights."""
UNION_SHARE = 0.75
"""Of the bytes of separate kept values, the most that a union may take: it is slower, since each of its values goes
through the cache and is masked once more for each domain."""


@dataclass(frozen=True)
class Bytes:
    """What a product of few rows under several domains reads of a weight, by how the weights are stored."""

    dense: int
    separate: int
    union: int


def bytes_of(numel: int, size: int, kept: Sequence[int], union: int) -> Bytes:
    """Bytes of a weight of `numel` elements of `size` bytes: `kept` by each domain, `union` by at least one.

    The bits of the domains come to each.
    """
    bits = len(kept) * -(-numel // 8)
    return Bytes(numel * size + bits, sum(kept) * size + bits, union * size + bits)


def smallest(numel: int, kept: Sequence[int], union: int) -> str:
    """ "dense", "separate" or "union": how a CPU stores a large weight for few rows of several domains.

    Kept values where they are fewer than all weights and each domain keeps at most half. Their union where it is
    smaller by a quarter at least, of two to four domains, and at most half of the weights.
    """
    few = max(kept, default=numel) <= KEPT_SHARE * numel
    if 2 <= len(kept) <= MOST_DOMAINS and union <= KEPT_SHARE * numel and union <= UNION_SHARE * sum(kept):
        return "union"
    return "separate" if few and sum(kept) < numel else "dense"


def joined(bits: Tensor) -> Tensor:
    """The bits that at least one row of `bits` (D, nbytes) has."""
    union = bits[0]
    for row in bits[1:]:
        union = combine(union, row, "or")
    return union.contiguous()


def keep_union(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Values (kept + 32,) and row starts, int64 (N + 1,), of what at least one domain keeps of a weight (N, K).

    bits: uint8 (D, packed_nbytes(N * K)), one packed mask per domain.
    """
    return keep_values(weight, joined(bits))


def bank_linear_union_reference(
    x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int
) -> Tensor:
    weight = expand_values(values, joined(bits), (row_starts.shape[0] - 1, x.shape[-1]))
    return bank_linear_reference(x, weight, bits, bias, offsets, samples)


def _fake(x: Tensor, values: Tensor, row_starts: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_starts.shape[0] - 1))


define(
    "bank_linear_union(Tensor x, Tensor values, Tensor row_starts, Tensor bits, Tensor? bias, Tensor offsets, "
    "SymInt samples) -> Tensor",
    reference=bank_linear_union_reference,
    fake=_fake,
)


def bank_linear_union(
    x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int
) -> Tensor:
    """Linear map of a batch whose samples have masks of different domains, by the union of what these keep.

    Args:
        x, bits, bias, offsets, samples: as in `bank_linear`, of a weight (N, K).
        values, row_starts: kept storage of the union, from `keep_union(weight, bits)`.

    Returns:
        (..., N) in x's dtype. On the CPU in fp32 it is bit for bit what `bank_linear` gives. No gradient goes through
        it: for that there is `bank_linear`.

    Raises:
        InputError: tensors of another form or length, or a gradient is wanted.
    """
    if row_starts.dtype != torch.int64 or row_starts.dim() != 1 or not row_starts.shape[0]:
        raise InputError(
            f"row_starts: given {row_starts.dtype} of shape {tuple(row_starts.shape)}; expected int64 (N + 1,); make "
            "them with dwm_fast.ops.keep_union"
        )
    if not values.is_floating_point() or values.dim() != 1 or values.shape[0] < PADDING:
        raise InputError(
            f"values: given {values.dtype} of shape {tuple(values.shape)}; expected a floating dtype of shape (kept + "
            f"{PADDING},); make them with dwm_fast.ops.keep_union"
        )
    like = weight_like(values, row_starts, x.shape[-1])
    check_bank(x.numel() // max(x.shape[-1], 1), like, bits, bias, offsets, samples)
    refuse_forward_mode("bank_linear_union")
    wanted = any(t is not None and t.requires_grad for t in (x, values, bias))
    if wanted and torch.is_grad_enabled():
        raise InputError("bank_linear_union has no gradient; use bank_linear, or torch.no_grad()")
    result: Tensor = torch.ops.dwm_fast.bank_linear_union(x, values, row_starts, bits, bias, offsets, samples)
    return result
