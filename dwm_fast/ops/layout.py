"""Memory orders that the extension's kernels know: contiguous, and channels_last with a small window."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dwm_fast.ops.problem import FLOATS

PACKABLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS, torch.float64)
"""Dtypes that pack reads as they are."""

MAX_SPATIAL = 64
"""Elements of a kernel window up to which the kernels walk channels_last themselves (kMaxSpatial in csrc/core.h)."""


def order_of(t: Tensor) -> torch.memory_format | None:
    """Memory order of `t` as far as the kernels know it, else None."""
    if t.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if channels_last is None or not t.is_contiguous(memory_format=channels_last):
        return None
    return channels_last if math.prod(t.shape[2:]) <= MAX_SPATIAL else None


def in_orders(tensors: Iterable[Tensor], orders: Iterable[torch.memory_format]) -> list[Tensor]:
    """Each tensor itself where it is in its order, else a copy that is."""
    pairs = zip(tensors, orders, strict=True)
    return [t if order_of(t) is order else t.contiguous(memory_format=order) for t, order in pairs]


def known(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[torch.memory_format]]:
    """Tensors in orders that the kernels know, copied if need be, and those orders."""
    given = list(tensors)
    orders = [order_of(t) or torch.contiguous_format for t in given]
    return in_orders(given, orders), orders


def restored(results: Iterable[Tensor], likes: Iterable[Tensor]) -> list[Tensor]:
    """Each result in the strides of torch.empty_like of its like, whatever order it was computed in."""
    return [
        result if order_of(result) is order_of(like) else torch.empty_like(like, dtype=result.dtype).copy_(result)
        for result, like in zip(results, likes, strict=True)
    ]
