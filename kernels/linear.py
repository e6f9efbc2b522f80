"""linear and its input gradient in Triton, one pass: a weight is masked where it is multiplied.

The masked weight is the LEFT operand (y^T = W x^T): it stays in registers, and sixteen rows of x or fewer are enough
for a matrix instruction. A single row takes no matrix instruction at all. Where few rows leave multiprocessors idle
the sum is split over programs, whose parts a second launch adds in a fixed order: the same result at every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS, Tiles
from dwm_fast.kernels._math import bound, narrow
from dwm_fast.kernels._product_launch import (
    index_dtype,
    precision,
    product_tiles,
    run_of,
    words_of,
)
from dwm_fast.kernels._products import CLAMP, FULL, PACKED, ZERO, activated, load_tile, masked_tile, product
from dwm_fast.kernels.philox import seed_and_step
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.problem import ACTIVATIONS, Problem, rows_of


@triton.jit(do_not_specialize=["layer", "step_offset"])
def masked_product_kernel(
    x, weight, source, bias, y, rng_state, tau, M, N, K, words, x_m, x_c, w_n, w_k, s_n, s_k, y_split, y_m, y_r,
    layer, threshold, step_offset,
    MODE: tl.constexpr, BACK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE: tl.constexpr,
    EDGE: tl.constexpr, TAIL: tl.constexpr, RUN: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of Wm[n, k] x[m, k]; BACK: y[m, k] = sum over n of Wm[n, k] x[m, n].

    r counts outputs, c what is summed over. Grid (tiles of r and, fastest, of m; parts of c). With SPLIT, y holds fp32
    parts and the bias and activation are left to `parts_kernel`.
    """
    if MODE == PACKED:
        seed, step, inverse_tau = 0, 0, 1.0
    else:
        seed, step = seed_and_step(rng_state, step_offset)
        inverse_tau = 1.0 / tl.load(tau)
    layer = layer.to(tl.uint32)
    R, C = N, K
    BLOCK_N: tl.constexpr = BLOCK_C if BACK else BLOCK_R
    BLOCK_K: tl.constexpr = BLOCK_R if BACK else BLOCK_C
    if BACK:
        R, C = K, N
    tiles = tl.cdiv(M, BLOCK_M)
    m0 = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    r0 = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R
    full = C // BLOCK_C
    each = tl.cdiv(full, tl.num_programs(1))
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, full)
    zero = tl.zeros([], tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32) if BLOCK_M == 1 else tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    if first < last:  # asked outside the loop, so that zeros meet the sums after the wait for wgmma and not before it
        for block in tl.range(bound(first), bound(last), num_stages=STAGES):
            acc = product_step(
                acc, x, weight, source, words, seed, step, layer, threshold, inverse_tau, m0, r0,
                zero + block * BLOCK_C, M, N, K, x_m, x_c, w_n, w_k, s_n, s_k, MODE, BACK, WHOLE, EDGE, FULL, RUN,
                INDEX, PRECISION, BLOCK_N, BLOCK_K, BLOCK_M,
            )  # fmt: skip
    if TAIL and tl.program_id(1) == tl.num_programs(1) - 1:
        acc = product_step(
            acc, x, weight, source, words, seed, step, layer, threshold, inverse_tau, m0, r0, zero + full * BLOCK_C,
            M, N, K, x_m, x_c, w_n, w_k, s_n, s_k, MODE, BACK, WHOLE, EDGE, ZERO, RUN, INDEX, PRECISION,
            BLOCK_N, BLOCK_K, BLOCK_M,
        )  # fmt: skip
    sums = tl.sum(acc, axis=0 if BACK else 1)[:, None] if BLOCK_M == 1 else acc
    r, m = r0 + tl.arange(0, BLOCK_R), m0 + tl.arange(0, BLOCK_M)
    if not SPLIT:
        if HAS_BIAS:
            sums += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
        sums = activated(sums, ACTIVATION)
    target = y + tl.program_id(1).to(tl.int64) * y_split + r[:, None] * y_r + m[None, :] * y_m
    tl.store(target, narrow(sums, y.dtype.element_ty), mask=(r < R)[:, None] & (m < M)[None, :])


@triton.jit
def product_step(
    acc, x, weight, source, words, seed, step, layer, threshold, inverse_tau, m0, r0, c0, M, N, K,
    x_m, x_c, w_n, w_k, s_n, s_k, MODE: tl.constexpr, BACK: tl.constexpr, WHOLE: tl.constexpr, EDGE_R: tl.constexpr,
    EDGE_C: tl.constexpr, RUN: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """acc and one block of the sum, from c0."""
    if BACK:
        n0, k0, C = c0, r0, N
    else:
        n0, k0, C = r0, c0, K
    EDGE_N: tl.constexpr = EDGE_C if BACK else EDGE_R
    EDGE_K: tl.constexpr = EDGE_R if BACK else EDGE_C
    BLOCK_C: tl.constexpr = BLOCK_N if BACK else BLOCK_K
    masked = masked_tile(
        weight, source, words, seed, step, layer, threshold, inverse_tau, n0, k0, N, K, w_n, w_k, s_n, s_k,
        x.dtype.element_ty, BLOCK_N, BLOCK_K, MODE, WHOLE, EDGE_N, EDGE_K, RUN, INDEX,
    )  # fmt: skip
    columns = load_tile(x, c0, m0, C, M, x_c, x_m, BLOCK_C, BLOCK_M, EDGE_C, CLAMP, 1, 1, INDEX)
    if BLOCK_M > 1:
        left = tl.trans(masked) if BACK else masked
        return product(left, columns, acc, PRECISION)
    else:
        row = columns if BACK else tl.trans(columns)
        return tl.fma(masked.to(tl.float32), row.to(tl.float32), acc)


@triton.jit(do_not_specialize=["splits"])
def parts_kernel(
    parts, bias, y, splits, M, R, y_m, y_r, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """y (M, R) from fp32 parts (splits, M, R), added in order; then bias and activation."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = M * R + tl.zeros([], tl.int64)
    inside = index < total
    sums = tl.zeros([BLOCK], tl.float32)
    for split in range(bound(splits)):
        sums += tl.load(parts + split * total + index, mask=inside, other=0.0)
    m, r = index // R, index % R
    if HAS_BIAS:
        sums += tl.load(bias + r, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * y_m + r * y_r, narrow(activated(sums, ACTIVATION), y.dtype.element_ty), mask=inside)


PARTS_BLOCK = 1024


def product_constants(
    problem: Problem, tiles: Tiles, mode: int, back: bool, has_bias: bool, activation: int, index: tl.dtype
) -> dict[str, Any]:
    """Compile-time arguments of `masked_product_kernel`."""
    outputs, summed = (problem.k, problem.n) if back else (problem.n, problem.k)
    block_r, block_c = (tiles.block_k, tiles.block_n) if back else (tiles.block_n, tiles.block_k)
    return {
        "MODE": mode, "BACK": back, "HAS_BIAS": has_bias, "ACTIVATION": activation,
        "WHOLE": problem.k % (32 if mode == PACKED.value else 4) == 0,
        "EDGE": FULL.value if outputs % block_r == 0 else CLAMP.value, "TAIL": summed % block_c != 0,
        "RUN": run_of(problem.k) if back else 1, "INDEX": index, "PRECISION": precision(problem), "BLOCK_R": block_r,
        "BLOCK_C": block_c, "BLOCK_M": tiles.block_m, "SPLIT": tiles.splits > 1, "STAGES": tiles.stages,
    }  # fmt: skip


def multiply(
    problem: Problem, x: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, draw: Draw, back: bool,
    activation: int = 0,
) -> Tensor:  # fmt: skip
    """x (M, C) times the masked weight -> (M, R); `source` is the logits, or the words of packed bits."""
    (n, k), m = weight.shape, problem.m
    outputs = k if back else n
    y = _tables.empty((m, outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tiles = product_tiles(problem, back)
    block_r, block_c = (tiles.block_k, tiles.block_n) if back else (tiles.block_n, tiles.block_k)
    strides = (*weight.stride(), *(source.stride() if source.dim() == 2 else (0, 0)))
    index = index_dtype(
        (block_c, tiles.block_m, x.stride(1), x.stride(0)),
        (tiles.block_n, tiles.block_k, *strides[:2]),
        (tiles.block_n, tiles.block_k, *strides[2:]),
        (tiles.block_n, tiles.block_k, k, 1),
    )
    words = source.numel() if draw.mode == PACKED.value else 0
    parts, start = y, y if bias is None else bias.contiguous()
    if tiles.splits > 1:
        parts = _tables.empty((tiles.splits, m, outputs), dtype=torch.float32, device=x.device)
    constants = product_constants(problem, tiles, draw.mode, back, bias is not None, activation, index)
    grid = (triton.cdiv(outputs, block_r) * triton.cdiv(m, tiles.block_m), tiles.splits)
    with _tables.device_guard(x.device):
        masked_product_kernel[grid](
            x, weight, source, start, parts, draw.rng_state, draw.tau, m, n, k, words, *x.stride(), *strides,
            m * outputs, *parts.stride()[-2:], draw.layers[0], draw.thresholds[0], draw.step_offset, **constants,
            num_warps=tiles.num_warps, **OPTIONS,
        )  # fmt: skip
        if tiles.splits > 1:
            parts_kernel[(triton.cdiv(y.numel(), PARTS_BLOCK),)](
                parts, start, y, tiles.splits, m, outputs, *y.stride(), HAS_BIAS=bias is not None,
                ACTIVATION=activation, BLOCK=PARTS_BLOCK, **OPTIONS,
            )  # fmt: skip
    return y


def linear(problem: Problem, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, draw: Draw) -> Tensor:
    """The operation of the same name."""
    y = multiply(problem, rows_of(x), weight, logits, bias, draw, False)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_packed(
    problem: Problem, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The operation of the same name."""
    which, words = ACTIVATIONS.index(activation), words_of(bits)
    y = multiply(problem, rows_of(x), weight, words, bias, Draw.from_bits(x), False, which)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_input_grad(problem: Problem, grad: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    """The operation of the same name."""
    dx = multiply(problem, rows_of(grad), weight, logits, None, draw, True)
    return dx.view(*grad.shape[:-1], weight.shape[1])


def linear_packed_input_grad(problem: Problem, grad: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """The operation of the same name."""
    dx = multiply(problem, rows_of(grad), weight, words_of(bits), None, Draw.from_bits(grad), True)
    return dx.view(*grad.shape[:-1], weight.shape[1])
