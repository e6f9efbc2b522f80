"""Launch parameters of the masked products: one dataclass, one deterministic function a kernel, and an override.

No figure here is measured on hardware yet: tiles are the largest that compile for sm_90 without spills.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.ops.measured import nearest
from dwm_fast.ops.problem import PACKED_ROWS, Problem

_PROGRAMS = 528
"""Programs to aim at, whatever the GPU: four for each of the 132 multiprocessors of an H200."""
_MAX_SPLITS = 32
_RUN = 16
"""Elements that are loaded together where a dimension is a multiple of it."""


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """Tile of one program: block_n x block_k of the weight, block_m rows; all powers of two.

    block_n: at least 16. block_k: at least 32, a whole word of bits. block_m: 1 takes no matrix instruction.
    splits: programs that share a sum. stages: tiles in flight. num_warps: warps a program.
    """

    block_n: int
    block_k: int
    block_m: int
    splits: int = 1
    num_warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (("block_n", 16), ("block_k", 32), ("block_m", 1), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} is {value}; expected a power of two of at least {least}")
        if self.splits < 1 or self.stages < 1:
            raise ValueError(f"splits is {self.splits} and stages {self.stages}; expected at least 1")


_tiles: ProductTiles | None = None
_wide = False


@contextlib.contextmanager
def override_product(tiles: ProductTiles | None = None, *, wide: bool = False) -> Iterator[None]:
    """Inside the block every product uses `tiles`, and int64 offsets inside tiles where `wide`.

    Masks must not change, and values by rounding of their sums only.
    """
    global _tiles, _wide
    before = _tiles, _wide
    _tiles, _wide = tiles, wide
    try:
        yield
    finally:
        _tiles, _wide = before


def product_tiles(problem: Problem, back: bool) -> ProductTiles:
    """Tiles of `masked_product_kernel`; `back`: the sum is over N and the outputs are K."""
    given = _tiles or _measured(problem)
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


def _product_by_size(problem: Problem, back: bool) -> ProductTiles:
    rows, whole = problem.m, problem.k % (32 if problem.packed else 4) == 0
    if rows == 1:
        return ProductTiles(16, 128, 1, stages=4 if problem.packed and whole else 3)
    if problem.dtype == torch.float32 and not problem.tf32:
        return ProductTiles(32, 32, 16, stages=2)
    block_m = min(max(16, triton.next_power_of_2(rows)), 64)
    if not problem.packed:
        return ProductTiles(64, 64 if whole else 32, block_m, stages=2)
    if problem.dtype == torch.float32 or back:
        return ProductTiles(64, 64, block_m)
    if rows > PACKED_ROWS:
        return ProductTiles(128, 64, 128, num_warps=8)
    return ProductTiles(64, 128 if whole else 64, block_m)


def gradient_tiles(problem: Problem) -> ProductTiles:
    """Tiles of `mask_gradient_kernel`."""
    given = _tiles or _measured(problem)
    if given is not None:
        return given
    if problem.dtype == torch.float32 and not problem.tf32:
        return ProductTiles(32, 32, 16, stages=2)
    block_m = min(max(16, triton.next_power_of_2(problem.m)), 64)
    return ProductTiles(64, 64, block_m)


def convolution_tiles(problem: Problem, back: bool = False) -> ProductTiles:
    """Tiles of the kernels of `conv`: block_n outputs, block_k inputs, block_m pixels; at most four warps."""
    given = _tiles or _measured(problem) or _convolution_by_op(problem, back)
    return dataclasses.replace(given, block_m=max(given.block_m, 16), num_warps=min(given.num_warps, 4))


def _convolution_by_op(problem: Problem, back: bool) -> ProductTiles:
    """The largest tiles that spill nowhere: sm_80, 90 and 100 with Triton 3.6 to 3.9."""
    if problem.dtype == torch.float32 and not problem.tf32:
        return ProductTiles(32, 32, 16, stages=2)
    if problem.op.endswith(("mask_grad", "weight_grad")):
        return ProductTiles(64, 32, 32, stages=2)
    return ProductTiles(32, 64, 32, stages=1) if back else ProductTiles(64, 32, 16, stages=2)


def _measured(problem: Problem) -> ProductTiles | None:
    """The tiles that `benchmarks.tune` found best for the nearest shape, if it measured one."""
    row = nearest(problem)
    return ProductTiles(**row["tiles"]) if row is not None and "tiles" in row else None


def index_dtype(*tiles: tuple[int, ...]) -> tl.dtype:
    """int32 where offsets inside every tile (rows, columns, row stride, column stride) fit it, else int64."""
    most = max(abs(r * rs) + abs(c * cs) for r, c, rs, cs in tiles)
    return tl.int64 if _wide or most >= 2**31 else tl.int32


def whole_index_dtype(*tensors: Tensor) -> tl.dtype:
    """int32 where the offset and the number of every element of each tensor fit it, else int64."""
    ends = [sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return tl.int64 if _wide or max(*ends, *(t.numel() for t in tensors)) >= 2**31 else tl.int32


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
