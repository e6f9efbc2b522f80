"""Launch parameters of the masked products: one deterministic function a kernel.

Large tiles that compile without spills, but where a table measured on the GPU (`benchmarks.tune`) knows better ones.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels._launch import Tiles, forced_tiles, wide_offsets
from dwm_fast.ops.measured import nearest
from dwm_fast.ops.problem import PACKED_ROWS, Problem

_PROGRAMS = 528
"""Programs to aim at, whatever the GPU: four for each of the 132 multiprocessors of an H200."""
_MAX_SPLITS = 32
_RUN = 16
"""Elements that are loaded together where a dimension is a multiple of it."""


def product_tiles(problem: Problem, back: bool) -> Tiles:
    """Tiles of `masked_product_kernel`; `back`: the sum is over N and the outputs are K."""
    given = forced_tiles() or _measured(problem)
    if given is not None:
        return given
    chosen = _product_by_size(problem, back)
    if problem.m > PACKED_ROWS:
        return chosen
    outputs, summed = (problem.k, problem.n) if back else (problem.n, problem.k)
    block_r, block_c = (chosen.block_k, chosen.block_n) if back else (chosen.block_n, chosen.block_k)
    programs = triton.cdiv(outputs, block_r) * triton.cdiv(problem.m, chosen.block_m)
    splits = min(_PROGRAMS // max(programs, 1), summed // block_c // 4, _MAX_SPLITS)
    return dataclasses.replace(chosen, splits=max(splits, 1))


def _product_by_size(problem: Problem, back: bool) -> Tiles:
    rows, whole = problem.m, problem.k % (32 if problem.packed else 4) == 0
    if rows == 1:
        return Tiles(16, 128 if whole or not problem.packed else 64, 1, stages=4 if problem.packed and whole else 3)
    if problem.dtype == torch.float32 and not problem.tf32:
        return Tiles(32, 32, 16, stages=2)
    block_m = min(max(16, triton.next_power_of_2(rows)), 64)
    if not problem.packed:
        # Forward with 64 columns spills on sm_100 with Triton 3.6; 32 take fewer registers than 64 on every target. A
        # call of Philox for each weight, where rows end inside one, fills the registers of four warps.
        return Tiles(64, 64 if whole and back else 32, block_m, num_warps=4 if whole else 8, stages=2)
    if not whole:  # two words for 32 columns, and no wide loads: four warps spill, on one target or another
        return Tiles(64, 64 if back else 32, block_m, num_warps=8)
    if problem.dtype == torch.float32 or back:
        return Tiles(64, 64, block_m, num_warps=8 if back and block_m == 64 else 4)
    return Tiles(128, 64, 128, num_warps=8) if rows > PACKED_ROWS else Tiles(64, 128, block_m)


def gradient_tiles(problem: Problem) -> Tiles:
    """Tiles of `mask_gradient_kernel`."""
    given = forced_tiles() or _measured(problem)
    if given is not None:
        return given
    if problem.dtype == torch.float32 and not problem.tf32:
        return Tiles(32, 32, 16, stages=2)
    block_m = min(max(16, triton.next_power_of_2(problem.m)), 64)
    # Drawn, four warps would fill their registers, and spill them where rows end inside a call of Philox.
    return Tiles(64, 64, block_m, num_warps=4 if problem.packed else 8)


def convolution_tiles(problem: Problem, back: bool = False) -> Tiles:
    """Tiles of the kernels of `conv`: block_n outputs, block_k inputs, block_m pixels; at most four warps."""
    given = forced_tiles() or _measured(problem) or _convolution_by_op(problem, back)
    return dataclasses.replace(given, block_m=max(given.block_m, 16), num_warps=min(given.num_warps, 4))


def _convolution_by_op(problem: Problem, back: bool) -> Tiles:
    """The largest tiles that spill nowhere: sm_80, 90 and 100 with Triton 3.6 to 3.9."""
    if problem.dtype == torch.float32 and not problem.tf32:
        return Tiles(32, 32, 16, stages=2)
    if problem.op.endswith(("mask_grad", "weight_grad")):
        return Tiles(64, 32, 32, stages=2)
    return Tiles(32, 64, 32, stages=1) if back else Tiles(64, 32, 16, stages=2)


def _measured(problem: Problem) -> Tiles | None:
    """The tiles that `benchmarks.tune` found best for the nearest shape, if it measured one."""
    row = nearest(problem)
    return Tiles(**row["tiles"]) if row is not None and "tiles" in row else None


def index_dtype(*tiles: tuple[int, ...]) -> tl.dtype:
    """int32 where offsets inside every tile (rows, columns, row stride, column stride) fit it, else int64."""
    most = max(abs(r * rs) + abs(c * cs) for r, c, rs, cs in tiles)
    return tl.int64 if wide_offsets() or most >= 2**31 else tl.int32


def whole_index_dtype(*tensors: Tensor) -> tl.dtype:
    """int32 where the offset and the number of every element of each tensor fit it, else int64."""
    ends = [sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return tl.int64 if wide_offsets() or max(*ends, *(t.numel() for t in tensors)) >= 2**31 else tl.int32


def run_of(size: int) -> int:
    """How many neighbours of a dimension stay together where its edge is clamped."""
    return _RUN if size % _RUN == 0 else 1


def words_of(bits: Tensor) -> Tensor:
    """Packed bits, one buffer or rows of them that may lie apart, as int32 words; copied only where not aligned."""
    whole = bits.stride(-1) == 1 and all(s % 4 == 0 for s in (*bits.stride()[:-1], bits.storage_offset()))
    return (bits if whole else bits.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def precision(problem: Problem) -> str:
    """How fp32 operands are multiplied, in Triton's words."""
    return "tf32" if problem.tf32 else "ieee"
