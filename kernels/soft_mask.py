"""SPG in Triton: the soft-masked SGD step in one launch for a network, importance in two; all in place."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS, launch_parameters
from dwm_fast.kernels._math import bound, exp, narrow
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import COLUMNS, FLAT, PROGRAM, PROGRAMS, TAPS, TL_DTYPES, groups_of, pick, require_fp32
from dwm_fast.kernels._tiles import (
    address,
    aligned,
    block_entry,
    flat_offsets,
    loose,
    row_of,
    strided_coordinates,
    strided_offsets,
    taps_offsets,
)


@triton.jit
def soft_lanes(weights, grads, gammas, mask, lr, WIDE: tl.constexpr):
    """w - lr ((1 - gamma) g) on the lanes of `mask`."""
    w = tl.load(weights, mask=mask, other=0.0).to(WIDE)
    g = tl.load(grads, mask=mask, other=0.0).to(WIDE)
    free = 1.0 - tl.load(gammas, mask=mask, other=0.0)
    tl.store(weights, narrow(w - lr * (free.to(WIDE) * g), weights.dtype.element_ty), mask=mask)


@triton.jit
def soft_masked_sgd_kernel(
    ptrs, rows, geometry, blocks, lr_ptr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, _word = row_of(rows, tensor)
    weights = address(ptrs, tensor, 0, 3)
    grads = address(ptrs, tensor, 1, 3)
    gammas = address(ptrs, tensor, 2, 3)
    lr = tl.load(lr_ptr).to(WIDE)

    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        soft_lanes(
            aligned(weights, WEIGHT) + start + offsets, aligned(grads, GRAD) + start + offsets,
            aligned(gammas, tl.float32) + start + offsets, mask, lr, WIDE,
        )  # fmt: skip

    if HAS_TAPS and kind == TAPS:
        _group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        for tap in tl.static_range(9):
            place = tap * stride + offsets
            soft_lanes(
                aligned(weights, WEIGHT) + place, aligned(grads, GRAD) + place,
                aligned(gammas, tl.float32) + place, mask, lr, WIDE,
            )  # fmt: skip

    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 3)
        soft_lanes(
            loose(weights, WEIGHT) + strided_offsets(geometry, tensor, places, 0, RANK, 3),
            loose(grads, GRAD) + strided_offsets(geometry, tensor, places, 1, RANK, 3),
            loose(gammas, tl.float32) + strided_offsets(geometry, tensor, places, 2, RANK, 3),
            mask,
            lr,
            WIDE,
        )


@triton.jit
def store_moments(partials, count, total, deviations):
    """Lanes, mean and sum of squared deviations of this program."""
    place = partials + 3 * tl.program_id(0).to(tl.int64)
    tl.store(place, count)
    tl.store(place + 1, total)
    tl.store(place + 2, deviations)


@triton.jit
def lane_moments(values, mask):
    """Lanes, their mean and their squared deviations' sum, fp64; lanes outside `mask` hold zeros."""
    count = tl.sum(mask.to(tl.float64))
    mean = tl.sum(values) / count
    apart = tl.where(mask, values - mean, 0.0)
    return count, mean, tl.sum(apart * apart)


@triton.jit
def moments_kernel(
    ptrs, rows, geometry, blocks, partials,
    GRAD: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Moments of the gradients by program: partials fp64 (programs, 3)."""
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, _word = row_of(rows, tensor)
    grads = address(ptrs, tensor, 1, 2)
    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        g = tl.load(aligned(grads, GRAD) + start + offsets, mask=mask, other=0.0).to(tl.float64)
        lanes = mask & (offsets >= 0)
        count, mean, deviations = lane_moments(g, lanes)
        store_moments(partials, count, mean, deviations)
    if HAS_TAPS and kind == TAPS:
        _group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        total = tl.zeros([GROUPS, 4], tl.float64)
        values = ()
        for tap in tl.static_range(9):
            value = (tl.load(aligned(grads, GRAD) + tap * stride + offsets, mask=mask, other=0.0).to(tl.float64),)
            total += value[0]
            values = values + value  # type: ignore[assignment]  # a tuple that grows
        lanes = tl.sum((mask & (offsets >= 0)).to(tl.float64))
        mean = tl.sum(total) / (9.0 * lanes)
        squares = tl.zeros([GROUPS, 4], tl.float64)
        for tap in tl.static_range(9):
            apart = tl.where(mask, values[tap] - mean, 0.0)
            squares += apart * apart
        store_moments(partials, 9.0 * lanes, mean, tl.sum(squares))
    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 2)
        g = tl.load(loose(grads, GRAD) + strided_offsets(geometry, tensor, places, 1, RANK, 2), mask=mask, other=0.0)
        count, mean, deviations = lane_moments(g.to(tl.float64), mask)
        store_moments(partials, count, mean, deviations)


@triton.jit
def tensor_moments(rows, tensor, partials, SPAN: tl.constexpr):
    """Mean and unbiased standard deviation (0 for one element) of a tensor, fp64, merged in a fixed order."""
    first = tl.load(rows + tensor * COLUMNS + PROGRAM)
    programs = tl.load(rows + tensor * COLUMNS + PROGRAMS).to(tl.int32)
    counts = tl.zeros([SPAN], tl.float64)
    sums = tl.zeros([SPAN], tl.float64)
    for start in range(0, bound(programs), SPAN):
        index = start + tl.arange(0, SPAN)
        place = partials + 3 * (first + index)
        count = tl.load(place, mask=index < programs, other=0.0)
        counts += count
        sums += count * tl.load(place + 1, mask=index < programs, other=0.0)
    number = tl.sum(counts)
    mean = tl.sum(sums) / number
    squares = tl.zeros([SPAN], tl.float64)
    for start in range(0, bound(programs), SPAN):
        index = start + tl.arange(0, SPAN)
        place = partials + 3 * (first + index)
        count = tl.load(place, mask=index < programs, other=0.0)
        apart = tl.where(index < programs, tl.load(place + 1, mask=index < programs, other=0.0) - mean, 0.0)
        squares += tl.load(place + 2, mask=index < programs, other=0.0) + count * apart * apart
    return mean, tl.sqrt(tl.sum(squares) / tl.where(number > 1, number - 1, 1.0))


@triton.jit
def importance_lanes(gammas, grads, mask, mean, deviation, inverse):
    """gamma <- max(gamma, abs(tanh((g - mean) / deviation))), 0 where the deviation is 0."""
    g = tl.load(grads, mask=mask, other=0.0).to(tl.float64)
    gamma = tl.load(gammas, mask=mask, other=0.0)
    apart = tl.abs((g - mean) * inverse).to(tl.float32)
    tail = exp(-2.0 * apart)
    value = tl.where(deviation > 0, tl.div_rn(1.0 - tail, 1.0 + tail), 0.0)
    tl.store(gammas, tl.maximum(gamma, value), mask=mask)


@triton.jit
def importance_kernel(
    ptrs, rows, geometry, blocks, partials,
    GRAD: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, _word = row_of(rows, tensor)
    gammas = address(ptrs, tensor, 0, 2)
    grads = address(ptrs, tensor, 1, 2)
    mean, deviation = tensor_moments(rows, tensor, partials, SPAN)
    inverse = 1.0 / tl.where(deviation > 0, deviation, 1.0)
    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        importance_lanes(
            aligned(gammas, tl.float32) + start + offsets, aligned(grads, GRAD) + start + offsets, mask, mean,
            deviation, inverse,
        )  # fmt: skip
    if HAS_TAPS and kind == TAPS:
        _group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        for tap in range(9):
            place = tap * stride + offsets
            importance_lanes(
                aligned(gammas, tl.float32) + place, aligned(grads, GRAD) + place, mask, mean, deviation, inverse,
            )  # fmt: skip
    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 2)
        importance_lanes(
            loose(gammas, tl.float32) + strided_offsets(geometry, tensor, places, 0, RANK, 2),
            loose(grads, GRAD) + strided_offsets(geometry, tensor, places, 1, RANK, 2), mask, mean, deviation, inverse,
        )  # fmt: skip


def soft_masked_sgd(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], gammas: Sequence[Tensor], lr: Tensor
) -> None:
    """w <- w - lr ((1 - gamma) g); arguments: dwm_fast.ops.soft_masked_sgd."""
    require_fp32(gammas)
    spread = [g if g.dim() else g.expand(w.shape) for g, w in zip(gammas, weights, strict=True)]
    launch = launch_parameters("update")
    with _tables.device_guard(lr.device):
        for indices in groups_of(weights, gradients):
            roles = [pick(weights, indices), pick(gradients, indices), pick(spread, indices)]
            plan = _tables.plan(roles, launch)
            dtype = roles[0][0].dtype
            if plan.num_blocks:
                soft_masked_sgd_kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.geometry, plan.blocks, lr, WEIGHT=TL_DTYPES[dtype],
                    GRAD=TL_DTYPES[roles[1][0].dtype], WIDE=TL_DTYPES[torch.promote_types(dtype, torch.float32)],
                    **plan.constants(launch), **OPTIONS,
                )  # fmt: skip


def raise_importance(gammas: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """gamma <- max(gamma, abs(tanh((g - mean) / std))); arguments: dwm_fast.ops.raise_importance."""
    require_fp32(gammas)
    launch = launch_parameters("importance")
    with _tables.device_guard(gammas[0].device):
        for indices in groups_of(gradients):
            roles = [pick(gammas, indices), pick(gradients, indices)]
            plan = _tables.plan(roles, launch)
            if plan.num_blocks:
                partials = _tables.empty(3 * plan.num_blocks, dtype=torch.float64, device=gammas[0].device)
                tables = (pointers(roles), plan.rows, plan.geometry, plan.blocks, partials)
                grad, constants = TL_DTYPES[roles[1][0].dtype], {**plan.constants(launch), **OPTIONS}
                moments_kernel[(plan.num_blocks,)](*tables, GRAD=grad, **constants)
                importance_kernel[(plan.num_blocks,)](*tables, GRAD=grad, SPAN=256, **constants)
