"""Gradients of logits and weight of a masked linear map in Triton: the chain rule in the epilogue of the product.

The dense gradient G = grad^T x of a tile stays in registers, where the mask is drawn or read again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS, Tiles
from dwm_fast.kernels._masks import logit_gradient, weight_gradient
from dwm_fast.kernels._math import bound, narrow
from dwm_fast.kernels._product_launch import gradient_tiles, index_dtype, precision, run_of, words_of
from dwm_fast.kernels._products import CLAMP, FULL, PACKED, ZERO, kept_tile, load_tile, noise_tile, product
from dwm_fast.kernels.philox import seed_and_step
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.problem import Problem, rows_of


@triton.jit(do_not_specialize=["layer", "step_offset"])
def mask_gradient_kernel(
    grad, x, weight, source, dsource, dweight, rng_state, tau, M, N, K, words, g_m, g_n, x_m, x_k, w_n, w_k, s_n, s_k,
    ds_n, ds_k, dw_n, dw_k, layer, threshold, step_offset,
    MODE: tl.constexpr, NEED_LOGITS: tl.constexpr, NEED_WEIGHT: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr,
    RUN_N: tl.constexpr, RUN_K: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G = grad^T x (N, K) in registers, and from it the gradients of logits and weight; G is never stored.

    Grid (tiles of K, fastest, and of N).
    """
    tiles = tl.cdiv(K, BLOCK_K)
    n0 = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N
    k0 = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_K
    zero = tl.zeros([], tl.int64)
    full = M // BLOCK_M
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if full > 0:  # asked outside the loop, as in `masked_product_kernel`
        for block in tl.range(0, bound(full), num_stages=STAGES):
            m0 = zero + block * BLOCK_M
            g = load_tile(grad, n0, m0, N, M, g_n, g_m, BLOCK_N, BLOCK_M, CLAMP, FULL, RUN_N, 1, INDEX)
            rows = load_tile(x, m0, k0, M, K, x_m, x_k, BLOCK_M, BLOCK_K, FULL, CLAMP, 1, RUN_K, INDEX)
            acc = product(g, rows, acc, PRECISION)
    if TAIL:
        m0 = zero + full * BLOCK_M
        g = load_tile(grad, n0, m0, N, M, g_n, g_m, BLOCK_N, BLOCK_M, CLAMP, ZERO, RUN_N, 1, INDEX)
        rows = load_tile(x, m0, k0, M, K, x_m, x_k, BLOCK_M, BLOCK_K, ZERO, CLAMP, 1, RUN_K, INDEX)
        acc = product(g, rows, acc, PRECISION)
    n, k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    to_weight = dweight + n[:, None] * dw_n + k[None, :] * dw_k
    if MODE == PACKED:
        keep = kept_tile(source, words, n0, k0, N, K, BLOCK_N, BLOCK_K, WHOLE, CLAMP, CLAMP, INDEX)
        tl.store(to_weight, narrow(tl.where(keep, acc, 0.0), dweight.dtype.element_ty), mask=inside)
    else:
        seed, step = seed_and_step(rng_state, step_offset)
        layer = layer.to(tl.uint32)
        inverse_tau = 1.0 / tl.load(tau)
        logit = load_tile(source, n0, k0, N, K, s_n, s_k, BLOCK_N, BLOCK_K, CLAMP, CLAMP, 1, RUN_K, INDEX)
        u = noise_tile(seed, step, layer, n0, k0, K, BLOCK_N, BLOCK_K, MODE, WHOLE)
        if NEED_LOGITS:
            w = load_tile(weight, n0, k0, N, K, w_n, w_k, BLOCK_N, BLOCK_K, CLAMP, CLAMP, 1, RUN_K, INDEX)
            change = logit_gradient(acc, logit, w.to(tl.float32), u, threshold, inverse_tau, 0.0, MODE)
            tl.store(dsource + n[:, None] * ds_n + k[None, :] * ds_k, change, mask=inside)
        if NEED_WEIGHT:
            change = weight_gradient(acc, logit, u, threshold, inverse_tau, MODE)
            tl.store(to_weight, narrow(change, dweight.dtype.element_ty), mask=inside)


def empty_like(t: Tensor, needed: bool) -> Tensor:
    """A fresh buffer with the strides of torch.empty_like(t), or one without elements."""
    strides = torch.empty_like(t, device="meta").stride()
    fresh = _tables.empty(t.numel() if needed else 0, dtype=t.dtype, device=t.device)
    return fresh.as_strided(t.shape, strides) if needed else fresh


def gradient_constants(
    problem: Problem, tiles: Tiles, mode: int, need_logits: bool, need_weight: bool, index: tl.dtype
) -> dict[str, Any]:
    """Compile-time arguments of `mask_gradient_kernel`."""
    block_m = max(tiles.block_m, 16)
    return {
        "MODE": mode, "NEED_LOGITS": need_logits, "NEED_WEIGHT": need_weight,
        "WHOLE": problem.k % (32 if mode == PACKED.value else 4) == 0, "TAIL": problem.m % block_m != 0,
        "RUN_N": run_of(problem.n), "RUN_K": run_of(problem.k), "INDEX": index, "PRECISION": precision(problem),
        "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "BLOCK_M": block_m, "STAGES": tiles.stages,
    }  # fmt: skip


def gradients(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, source: Tensor, draw: Draw, need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of logits and weight; `source` is the logits, or the words of packed bits."""
    (n, k), m = weight.shape, problem.m
    dsource, dweight = empty_like(source, need_logits), empty_like(weight, need_weight)
    if not weight.numel() or not (need_logits or need_weight):
        return dsource, dweight
    tiles = gradient_tiles(problem)
    block_n, block_k, block_m = tiles.block_n, tiles.block_k, max(tiles.block_m, 16)
    strides = [t.stride() if t.dim() == 2 else (0, 0) for t in (weight, source, dsource, dweight)]
    index = index_dtype(
        (block_m, block_n, *grad.stride()),
        (block_m, block_k, *x.stride()),
        (block_n, block_k, k, 1),
        *((block_n, block_k, *pair) for pair in strides),
    )
    with _tables.device_guard(x.device):
        mask_gradient_kernel[(triton.cdiv(n, block_n) * triton.cdiv(k, block_k),)](
            grad, x, weight, source, dsource, dweight, draw.rng_state, draw.tau, m, n, k,
            source.numel() if draw.mode == PACKED.value else 0, *grad.stride(), *x.stride(),
            *(s for pair in strides for s in pair), draw.layers[0], draw.thresholds[0], draw.step_offset,
            **gradient_constants(problem, tiles, draw.mode, need_logits, need_weight, index),
            num_warps=tiles.num_warps, **OPTIONS,
        )  # fmt: skip
    return dsource, dweight


def linear_mask_grad(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of the same name."""
    return gradients(problem, rows_of(grad), rows_of(x), weight, logits, draw, need_logits, need_weight)


def linear_packed_weight_grad(problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """The operation of the same name."""
    words, draw = words_of(bits), Draw.from_bits(grad)
    return gradients(problem, rows_of(grad), rows_of(x), weight, words, draw, False, True)[1]
