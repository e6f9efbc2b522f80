"""coded_adam in Triton: decode, Adam, encode; one launch for every tensor of a call, in place."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._adam import adam_scalars, adam_values, double, split
from dwm_fast.kernels._coding import (
    decoded,
    decoded_moment,
    encoded,
    encoded_moment,
    rounding_words,
)
from dwm_fast.kernels._launch import OPTIONS, launch_parameters
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import FLAT, TL_DTYPES
from dwm_fast.kernels._tiles import address, aligned, block_entry, flat_offsets, loose, row_of
from dwm_fast.ops import draw

_LOGIT_ROUNDING: tl.constexpr = tl.constexpr(draw.LOGIT_ROUNDING)
_MOMENT_ROUNDING: tl.constexpr = tl.constexpr(draw.MOMENT_ROUNDING)


@triton.jit
def coded_lanes(
    logits, grads, exp_avg, exp_avg_sq, scale, scale_sq, mask, numel, drawn, scalars, near,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of a chunk, whole blocks of 128.

    The first four point to its lanes [BLOCK / 4, 4], those of `mask`, the next two to their tensor's scales. `drawn`:
    seed, step, layer and chunk of rounding's noise.
    """
    ROWS: tl.constexpr = BLOCK // 4
    logit: tl.constexpr = logits.dtype.element_ty
    first: tl.constexpr = exp_avg.dtype.element_ty
    second: tl.constexpr = exp_avg_sq.dtype.element_ty
    seed, step, layer, chunk = drawn
    row = chunk * ROWS + tl.arange(0, ROWS)
    old, old_sq = mask, mask  # never read but of 8 bits
    scale += row // 32
    scale_sq += row // 32
    if first == tl.int8:
        old = tl.load(scale, mask=4 * row < numel, other=0.0)[:, None]
        old_sq = tl.load(scale_sq, mask=4 * row < numel, other=0.0)[:, None]
    w = decoded(tl.load(logits, mask=mask, other=0))
    g = tl.load(grads, mask=mask, other=0.0)
    m = decoded_moment(tl.load(exp_avg, mask=mask, other=0), old, False)
    v = decoded_moment(tl.load(exp_avg_sq, mask=mask, other=0), old_sq, True)
    w, m, v = adam_values(w, g, m, v, scalars, near, DECAY, DECOUPLED)
    words = tl.zeros([ROWS, 4], tl.uint32)
    if first != tl.float32:
        words = rounding_words(seed, step, layer, chunk, _MOMENT_ROUNDING, BLOCK)
    codes, scales = encoded_moment(m, words, first, False)
    codes_sq, scales_sq = encoded_moment(v, words >> 16, second, True)
    tl.store(exp_avg, codes, mask=mask)
    tl.store(exp_avg_sq, codes_sq, mask=mask)
    if first == tl.int8:
        tl.debug_barrier()  # threads of other warps may have yet to read what is written here
        one = (row % 32 == 0) & (4 * row < numel)
        tl.store(scale, scales, mask=one)
        tl.store(scale_sq, scales_sq, mask=one)
    if logit != tl.float32:
        words = rounding_words(seed, step, layer, chunk, _LOGIT_ROUNDING, BLOCK)
    tl.store(logits, encoded(w, words, logit), mask=mask)


@triton.jit
def coded_adam_kernel(
    ptrs, rows, blocks, rng_state, steps, lr, parts,
    LOGIT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROLES: tl.constexpr,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
    STRIDED: tl.constexpr,
):  # fmt: skip
    """All tensors lie in logical order; STRIDED programs take those of any alignment, and ragged ends."""
    tensor, kind, chunk = block_entry(blocks)
    numel, layer, _threshold, _word = row_of(rows, tensor)
    logits = address(ptrs, tensor, 0, ROLES)
    grads = address(ptrs, tensor, 1, ROLES)
    exp_avg = address(ptrs, tensor, 2, ROLES)
    exp_avg_sq = address(ptrs, tensor, 3, ROLES)
    scale = loose(address(ptrs, tensor, ROLES - 2, ROLES), tl.float32)  # not read but of 8 bits
    scale_sq = loose(address(ptrs, tensor, ROLES - 1, ROLES), tl.float32)
    scalars = adam_scalars(steps + tensor, lr, parts, tl.float32)
    near = 1.0 - double(parts, 0) < 0.5
    step = (tl.load(steps + tensor).to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)
    drawn = (tl.load(rng_state), step, layer, chunk)

    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        coded_lanes(
            aligned(logits, LOGIT) + start + offsets, aligned(grads, tl.float32) + start + offsets,
            aligned(exp_avg, FIRST) + start + offsets, aligned(exp_avg_sq, SECOND) + start + offsets,
            scale, scale_sq, mask, numel, drawn, scalars, near, DECAY, DECOUPLED, BLOCK,
        )  # fmt: skip

    if STRIDED and kind > FLAT:
        start = chunk * STRIDED_BLOCK
        lane = 4 * tl.arange(0, STRIDED_BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :]
        mask = lane < tl.minimum(numel - start, STRIDED_BLOCK).to(tl.int32)
        coded_lanes(
            loose(logits, LOGIT) + start + lane, loose(grads, tl.float32) + start + lane,
            loose(exp_avg, FIRST) + start + lane, loose(exp_avg_sq, SECOND) + start + lane,
            scale, scale_sq, mask, numel, drawn, scalars, near, DECAY, DECOUPLED,
            STRIDED_BLOCK,
        )  # fmt: skip


def coded_adam(
    logits: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    exp_avg_scale: Sequence[Tensor], exp_avg_sq_scale: Sequence[Tensor], rng_state: Tensor, layers: Sequence[int],
    steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    """One Adam(W) step on numbers in few bits; arguments: dwm_fast.ops.coded_adam."""
    if not logits:
        return
    launch, roles = launch_parameters("update"), [logits, grads, exp_avg, exp_avg_sq]
    scales = [exp_avg_scale, exp_avg_sq_scale] if exp_avg_scale else []
    with _tables.device_guard(rng_state.device):
        plan = _tables.plan(roles, launch, layers=layers, allow_taps=False)
        if plan.num_blocks:
            coded_adam_kernel[(plan.num_blocks,)](
                pointers([*roles, *scales]), plan.rows, plan.blocks, rng_state, steps.contiguous(), lr,
                split(beta1, beta2, eps, weight_decay), LOGIT=TL_DTYPES[logits[0].dtype],
                FIRST=TL_DTYPES[exp_avg[0].dtype], SECOND=TL_DTYPES[exp_avg_sq[0].dtype],
                ROLES=len(roles) + len(scales), DECAY=weight_decay != 0, DECOUPLED=decoupled,
                BLOCK=launch.block, STRIDED_BLOCK=launch.strided, STRIDED=plan.rank > 0, num_warps=launch.num_warps,
                **OPTIONS,
            )  # fmt: skip
