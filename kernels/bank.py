"""bank_linear and bank_conv2d in Triton: samples sorted by domain, one base weight, one packed mask per domain.

The offsets stay on the device and the grid follows sizes alone, so nothing waits and a graph may be replayed with
other offsets in place. The masked weight is the left operand (y^T = W x^T): it stays in registers, and sixteen rows
of x are enough for a matrix instruction. A word of bits is loaded once for 32 weights.

Two ways, chosen by rows per sample (`tiles_for`): with few, a program keeps a tile of the weight for GROUP domains,
so that the weight is read once for all of them; with many, a program has a tile of rows of one domain.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.errors import Unsupported
from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS, Tiles, forced_tiles
from dwm_fast.kernels._math import bound
from dwm_fast.kernels._product_launch import words_of
from dwm_fast.kernels._products import product, under_words
from dwm_fast.kernels._tables import TL_DTYPES
from dwm_fast.ops.geometry import Geometry
from dwm_fast.ops.measured import nearest
from dwm_fast.ops.problem import FLOATS, Problem, device_name, matmul_tf32


@triton.jit
def weight_tile(weight, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """W from row n0 (int64) and column k0, [BLOCK_N, BLOCK_K], zero outside."""
    n, k = tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    inside = (n < (N - n0).to(tl.int32))[:, None] & (k < K)[None, :]
    return tl.load(weight + n0 * K + (n[:, None] * K + k[None, :]), mask=inside, other=0.0)


@triton.jit
def masked_tile(w, bits, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr):
    """That tile under its bits; `bits` is the domain's first word. ALIGNED: K is a multiple of 32."""
    n = tl.arange(0, BLOCK_N)
    rest = (N - n0).to(tl.int32)
    if ALIGNED:
        column = k0 // 32 + tl.arange(0, BLOCK_K // 32)
        inside = (n < rest)[:, None] & (column < K // 32)[None, :]
        words = tl.load(bits + n0 * (K // 32) + (n[:, None] * (K // 32) + column[None, :]), mask=inside, other=0)
        return under_words(w, words, BLOCK_N, BLOCK_K)
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (n < rest)[:, None] & (k < K)[None, :]
        element = (n0 * K % 32).to(tl.int32) + n[:, None] * K + k[None, :]
        words = tl.load(bits + n0 * K // 32 + element // 32, mask=inside, other=0)
        return tl.where(((words >> (element % 32)) & 1) != 0, w, 0.0)


@triton.jit
def row_tile(x, start, stop, k0, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows start .. stop (int64) of x (M, K), transposed: [BLOCK_K, BLOCK_M], zero outside."""
    row, k = tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_K)
    rest = tl.minimum(stop - start, BLOCK_M).to(tl.int32)
    inside = (k < K)[:, None] & (row < rest)[None, :]
    return tl.load(x + start * K + (row[None, :] * K + k[:, None]), mask=inside, other=0.0)


@triton.jit
def append(values, value):
    """The tuple `values` with `value` behind it."""
    return values + (value,)  # noqa: RUF005 - Triton knows no unpacking


@triton.jit
def store_rows(y, bias, acc, n0, start, stop, N, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write acc [BLOCK_N, BLOCK_M] to rows start .. stop of y (M, N); `bias` is the domain's first."""
    n, row = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    inside = (n < (N - n0).to(tl.int32))[:, None] & (row < tl.minimum(stop - start, BLOCK_M).to(tl.int32))[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n0 + n, mask=n < (N - n0).to(tl.int32), other=0.0).to(tl.float32)[:, None]
    tl.store(y + start * N + n0 + (row[None, :] * N + n[:, None]), acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def bank_linear_few_fwd_kernel(
    x, weight, bits, bias, offsets, y, N, K, domains, scale, bits_stride, bias_stride,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N and, slower, groups of GROUP domains,); a pass takes up to BLOCK_M rows of each of a group."""
    n0 = (tl.program_id(0) % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N
    group = tl.program_id(0) // tl.cdiv(N, BLOCK_N) * GROUP
    members, starts, stops, most = (), (), (), tl.zeros([], tl.int64)
    for g in tl.static_range(GROUP):
        member = tl.minimum(group + g, domains - 1).to(tl.int64)
        low, high = tl.load(offsets + member) * scale, tl.load(offsets + member + 1) * scale
        high = tl.where(group + g < domains, high, low)
        members, starts, stops = append(members, member), append(starts, low), append(stops, high)
        most = tl.maximum(most, high - low)
    for done in range(0, bound(most), BLOCK_M):
        sums = ()
        for _ in tl.static_range(GROUP):
            sums = append(sums, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        for k0 in range(0, bound(K), BLOCK_K):
            w = weight_tile(weight, n0, k0, N, K, BLOCK_N, BLOCK_K)
            added = ()
            for g in tl.static_range(GROUP):
                own = bits + members[g] * bits_stride
                masked = masked_tile(w, own, n0, k0, N, K, BLOCK_N, BLOCK_K, ALIGNED).to(x.dtype.element_ty)
                columns = row_tile(x, starts[g] + done, stops[g], k0, K, BLOCK_M, BLOCK_K)
                added = append(added, product(masked, columns, sums[g], PRECISION))
            sums = added
        for g in tl.static_range(GROUP):
            shift = bias + members[g] * bias_stride
            store_rows(y, shift, sums[g], n0, starts[g] + done, stops[g], N, HAS_BIAS, BLOCK_N, BLOCK_M)


@triton.jit
def bank_linear_many_fwd_kernel(
    x, weight, bits, bias, offsets, y, N, K, domains, scale, bits_stride, bias_stride,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N and, slower, of rows,). Every domain has its own tiles of rows; those beyond do nothing.

    One axis for both: a grid's second axis ends at 65,535, its first at 2**31 - 1.
    """
    n0 = (tl.program_id(0) % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N
    tile = (tl.program_id(0) // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    domain = tl.zeros([], tl.int64)
    start = tl.load(offsets) * scale
    stop = start
    before = tl.zeros([], tl.int64)
    for d in range(bound(domains)):
        low, high = tl.load(offsets + d) * scale, tl.load(offsets + d + 1) * scale
        tiles = (high - low + BLOCK_M - 1) // BLOCK_M
        here = (tile >= before) & (tile < before + tiles)
        domain = tl.where(here, d, domain)
        start = tl.where(here, low + (tile - before) * BLOCK_M, start)
        stop = tl.where(here, high, stop)
        before += tiles
    if tile < before:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k0 in range(0, bound(K), BLOCK_K):
            w = weight_tile(weight, n0, k0, N, K, BLOCK_N, BLOCK_K)
            own = bits + domain * bits_stride
            masked = masked_tile(w, own, n0, k0, N, K, BLOCK_N, BLOCK_K, ALIGNED).to(x.dtype.element_ty)
            columns = row_tile(x, start, stop, k0, K, BLOCK_M, BLOCK_K)
            acc = product(masked, columns, acc, PRECISION)
        store_rows(y, bias + domain * bias_stride, acc, n0, start, stop, N, HAS_BIAS, BLOCK_N, BLOCK_M)


FEW = Tiles(group=4, block_n=64, block_k=32, block_m=16, num_warps=8)
"""Few rows, two-byte values, whole words of bits; with 64 columns a tile, Triton 3.6 spills."""
FEW_WIDE = Tiles(group=1, block_n=32, block_k=32, block_m=16, num_warps=4)
"""Few rows otherwise; larger tiles or groups spill."""
MANY = Tiles(group=0, block_n=64, block_k=64, block_m=64, num_warps=4)
MANY_WIDE = Tiles(group=0, block_n=64, block_k=32, block_m=64, num_warps=4)
"""Many rows of four-byte values that begin inside words; with 64 columns a tile, Triton 3.6 spills on sm_80."""
_MAX_K = 1 << 23
"""Offsets inside a tile are int32: at most 128 rows of this many columns."""

_SMALL = 32
"""Rows of a domain, on average, up to which reading the weight once for several domains wins."""


def tiles_for(rows: int, domains: int, n: int, k: int, dtype: torch.dtype, name: str = "") -> Tiles:
    """The launch parameters for `rows` rows of `domains` domains, n outputs and k columns on the GPU called `name`.

    Those that a table of that GPU (`benchmarks.tune`) found fastest for a like number of rows a domain, if it has any.
    """
    few = k % 32 == 0 and dtype.itemsize == 2
    row = nearest(Problem("bank_linear", "cuda", dtype, max(rows // domains, 1), n, k, name=name)) if few else None
    measured = Tiles(**row["tiles"]) if row is not None else None
    if rows <= _SMALL * domains:
        default = FEW if few else FEW_WIDE
    else:
        default = MANY_WIDE if k % 32 and dtype.itemsize > 2 else MANY
    return forced_tiles() or measured or default


def bank_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int) -> Tensor:
    """The operation of the same name; fp64 and very wide weights are left to the reference."""
    n, k = weight.shape
    if x.dtype not in FLOATS or weight.dtype not in TL_DTYPES or k > _MAX_K:
        raise Unsupported
    rows = x.reshape(-1, k).contiguous()
    y = _tables.empty((rows.shape[0], n), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y.view(*x.shape[:-1], n)
    words = words_of(bits)
    dtype, name = torch.promote_types(x.dtype, weight.dtype), device_name(weight.device) if weight.is_cuda else ""
    tiles = tiles_for(rows.shape[0], bits.shape[0], n, k, dtype, name)
    constants = {
        "HAS_BIAS": bias is not None, "ALIGNED": k % 32 == 0, "PRECISION": _precision(x),
        "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "BLOCK_M": tiles.block_m, "num_warps": tiles.num_warps,
        "num_stages": tiles.stages,
    }  # fmt: skip
    shift = (y if bias is None else bias).contiguous()
    arguments = (
        rows, weight.contiguous(), words, shift, offsets.contiguous(), y, n, k, bits.shape[0],
        rows.shape[0] // samples, words.stride(0), n if bias is not None and bias.dim() == 2 else 0,
    )  # fmt: skip
    with _tables.device_guard(x.device):
        if tiles.group:
            grid = (triton.cdiv(n, tiles.block_n) * triton.cdiv(bits.shape[0], tiles.group),)
            bank_linear_few_fwd_kernel[grid](*arguments, GROUP=tiles.group, **constants, **OPTIONS)
        else:
            row_tiles = triton.cdiv(rows.shape[0], tiles.block_m) + min(bits.shape[0], samples) - 1
            grid = (triton.cdiv(n, tiles.block_n) * row_tiles,)
            bank_linear_many_fwd_kernel[grid](*arguments, **constants, **OPTIONS)
    return y.view(*x.shape[:-1], n)


def bank_conv2d(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int, geometry: Geometry
) -> Tensor:
    """The operation of the same name, as a linear map of unfolded windows; grouped ones are left to the reference."""
    if geometry.groups != 1 or not x.numel():
        raise Unsupported
    stride, padding, dilation = (tuple(pair) for pair in geometry.flat()[:3])
    windows = F.unfold(x, tuple(weight.shape[2:]), dilation, padding, stride).transpose(1, 2)
    y = bank_linear(windows, weight.reshape(weight.shape[0], -1), bits, bias, offsets, samples)
    y = y.view(x.shape[0], *geometry.output(x.shape, weight.shape), weight.shape[0]).permute(0, 3, 1, 2)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y if last else y.contiguous()


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and matmul_tf32() else "ieee"
