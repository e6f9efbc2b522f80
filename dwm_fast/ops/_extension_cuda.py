"""The CUDA backend of packed bits and kept weights: every function has the signature of the operation it computes.

Importing this module builds the CUDA library at first need and loads it; where that is not possible the import raises
BackendUnavailable with one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwm_fast.errors import Unsupported
from dwm_fast.ops import _build

_build.load("cuda")

from dwm_fast.ops.layout import PACKABLE, known, restored  # noqa: E402 - only where the library loads
from dwm_fast.ops.packing import COMBINATIONS, packed_nbytes  # noqa: E402
from dwm_fast.ops.problem import Problem, rows_of  # noqa: E402

TensorList = Sequence[Tensor]

_OPS = torch.ops.dwm_fast_cuda


def pack(masks: TensorList) -> Tensor:
    plain = [(m if m.dtype in PACKABLE else m != 0).contiguous() for m in masks]
    bits = torch.zeros(sum(packed_nbytes(m.numel()) for m in masks), dtype=torch.uint8, device=masks[0].device)
    _OPS.pack.default(plain, bits)
    return bits


def unpack(bits: Tensor, numels: Sequence[int]) -> list[Tensor]:
    masks = [torch.empty(numel, dtype=torch.bool, device=bits.device) for numel in numels]
    _OPS.unpack.default(aligned(bits), masks)
    return masks


def apply(bits: Tensor, weights: TensorList) -> list[Tensor]:
    if any(w.is_complex() for w in weights):
        raise Unsupported
    dense, _ = known(weights)
    masked = [torch.empty_like(w) for w in dense]
    _OPS.apply.default(aligned(bits), dense, masked)
    return restored(masked, weights)


def count(bits: Tensor, numels: Sequence[int]) -> Tensor:
    ones = torch.zeros(len(numels), dtype=torch.int64, device=bits.device)
    _OPS.count.default(aligned(bits), numels, ones)
    return ones


def combine(a: Tensor, b: Tensor, op: str) -> Tensor:
    out = torch.empty(a.shape, dtype=torch.uint8, device=a.device)
    _OPS.combine.default(a.contiguous(), b.contiguous(), COMBINATIONS[op], out)
    return out


def overlap(a: Tensor, b: Tensor, numels: Sequence[int]) -> Tensor:
    sizes = torch.zeros((len(numels), 2), dtype=torch.int64, device=a.device)
    _OPS.overlap.default(aligned(a), aligned(b), numels, sizes)
    return sizes


def linear_kept(
    problem: Problem, x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    y = x.new_empty((problem.m, problem.n))
    shift = None if bias is None else bias.float().contiguous()
    _OPS.linear_kept.default(aligned(rows_of(x)), aligned(values), row_starts.contiguous(), aligned(bits), shift, y)
    return y.view(*x.shape[:-1], problem.n)


def aligned(given: Tensor) -> Tensor:
    """`given` contiguous and on a 16-byte boundary, as the kernels' loads need: a view may start anywhere."""
    given = given.contiguous()
    return given if given.data_ptr() % 16 == 0 else given.clone()
