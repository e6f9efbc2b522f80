"""KSM's masks in Triton: every tensor's range in one launch, the masked weights in another, the backward in one."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._filters import (
    COUNT,
    FILTER_COLUMNS,
    FIRST,
    KERNEL_START,
    NOISE_LAYER,
    WEIGHT_START,
    WINDOW,
    filter_lanes,
    filter_offsets,
    filter_plan,
    with_one_stride,
)
from dwm_fast.kernels._launch import OPTIONS, Launch, launch_parameters
from dwm_fast.kernels._masks import GUMBEL_HARD, KEEP, flat_uniform
from dwm_fast.kernels._math import bound, narrow, sigmoid_slope
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import TL_DTYPES, groups_of, pick, require_fp32
from dwm_fast.kernels._tiles import address, block_entry, loose
from dwm_fast.kernels.philox import argument_on_side, hard_keep, seed_and_step

SCALE: tl.constexpr = tl.constexpr(1200.0)
TEMPERATURE: tl.constexpr = tl.constexpr(100.0)


@triton.jit
def kept(z, u, NOISY: tl.constexpr):
    """b: z >= 0, with noise u > sigmoid(-z)."""
    if NOISY:
        return hard_keep(z, u)
    else:
        return z >= 0


@triton.jit
def kernel_noise(rows, tensor, chunk, rng_state, step_offset, NOISY: tl.constexpr, BLOCK: tl.constexpr):
    """u of a chunk [BLOCK / 4, 4]; zeros, never read, without noise."""
    seed, step = seed_and_step(rng_state, step_offset)
    layer = tl.load(rows + tensor * FILTER_COLUMNS + NOISE_LAYER).to(tl.uint32)
    if NOISY:
        return flat_uniform(seed, step, layer, chunk, BLOCK, GUMBEL_HARD)
    else:
        return flat_uniform(seed, step, layer, chunk, BLOCK, KEEP)


@triton.jit(do_not_specialize=["threshold", "step_offset"])
def kernel_range_fwd_kernel(
    ptrs, rows, blocks, partials, rng_state, threshold, step_offset, NOISY: tl.constexpr, BLOCK: tl.constexpr
):
    """Minimum and maximum of a over each program's kernels: partials (programs, 2)."""
    tensor, _, chunk = block_entry(blocks)
    number, mask, _, _ = filter_lanes(rows, tensor, chunk, BLOCK)
    r = tl.load(loose(address(ptrs, tensor, 0, 2), tl.float32) + number, mask=mask, other=0.0)  # [BLOCK / 4, 4]
    u = kernel_noise(rows, tensor, chunk, rng_state, step_offset, NOISY, BLOCK)
    a = tl.where(kept((r - threshold) * SCALE, u, NOISY), 0.0, r)
    place = partials + 2 * tl.program_id(0).to(tl.int64)
    tl.store(place, tl.min(tl.where(mask, a, float("inf"))))
    tl.store(place + 1, tl.max(tl.where(mask, a, float("-inf"))))


@triton.jit
def tensor_range(rows, tensor, partials, SPAN: tl.constexpr):
    """Minimum and maximum over all programs of a tensor."""
    first = tl.load(rows + tensor * FILTER_COLUMNS + FIRST)
    count = tl.load(rows + tensor * FILTER_COLUMNS + COUNT).to(tl.int32)
    low = tl.full([SPAN], float("inf"), tl.float32)
    high = tl.full([SPAN], float("-inf"), tl.float32)
    for start in range(0, bound(count), SPAN):
        index = start + tl.arange(0, SPAN)
        place = partials + 2 * (first + index)
        low = tl.minimum(low, tl.load(place, mask=index < count, other=float("inf")))
        high = tl.maximum(high, tl.load(place + 1, mask=index < count, other=float("-inf")))
    return tl.min(low), tl.max(high)


@triton.jit(do_not_specialize=["threshold", "step_offset"])
def kernel_soft_fwd_kernel(
    ptrs, rows, blocks, partials, out, rng_state, threshold, step_offset,
    WEIGHT: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """M * W, with M = b + a / 2 and a's non-zero entries scaled by the tensor's range."""
    tensor, _, chunk = block_entry(blocks)
    low, high = tensor_range(rows, tensor, partials, SPAN)
    number, mask, output, input = filter_lanes(rows, tensor, chunk, BLOCK)
    r = tl.load(loose(address(ptrs, tensor, 0, 2), tl.float32) + number, mask=mask, other=0.0)  # [BLOCK / 4, 4]
    u = kernel_noise(rows, tensor, chunk, rng_state, step_offset, NOISY, BLOCK)
    keep = kept((r - threshold) * SCALE, u, NOISY)
    spread = high - low
    scaled = tl.div_rn(r - low, tl.where(spread > 0, spread, 1.0) + tl.zeros_like(r))
    soft = tl.where(r != 0, tl.where(spread > 0, 0.5 * scaled, 0.0), 0.0)
    value = tl.where(keep, 1.0, soft)
    weights = loose(address(ptrs, tensor, 1, 2), WEIGHT)
    out += tl.load(rows + tensor * FILTER_COLUMNS + WEIGHT_START)
    source, source_tap = filter_offsets(rows, tensor, output, input, 0)
    target, target_tap = filter_offsets(rows, tensor, output, input, 1)
    for tap in range(bound(tl.load(rows + tensor * FILTER_COLUMNS + WINDOW).to(tl.int32))):
        w = tl.load(weights + source + tap * source_tap, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + target + tap * target_tap, narrow(w * value, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold", "step_offset"])
def kernel_soft_bwd_kernel(
    ptrs, rows, blocks, dreals, rng_state, threshold, step_offset,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dr = 12 s (1 - s) * sum over the kernel of dL/d(M W) * W."""
    tensor, _, chunk = block_entry(blocks)
    number, mask, output, input = filter_lanes(rows, tensor, chunk, BLOCK)
    r = tl.load(loose(address(ptrs, tensor, 0, 3), tl.float32) + number, mask=mask, other=0.0)  # [BLOCK / 4, 4]
    z = (r - threshold) * SCALE
    if NOISY:
        u = kernel_noise(rows, tensor, chunk, rng_state, step_offset, NOISY, BLOCK)
        argument = argument_on_side(z, u, 1.0 / TEMPERATURE)  # its slope is even
    else:
        argument = z * (1.0 / TEMPERATURE)
    weights = loose(address(ptrs, tensor, 1, 3), WEIGHT)
    grads = loose(address(ptrs, tensor, 2, 3), GRAD)
    source, source_tap = filter_offsets(rows, tensor, output, input, 0)
    slope, slope_tap = filter_offsets(rows, tensor, output, input, 1)
    total = tl.zeros([BLOCK // 4, 4], tl.float32)
    for tap in range(bound(tl.load(rows + tensor * FILTER_COLUMNS + WINDOW).to(tl.int32))):
        w = tl.load(weights + source + tap * source_tap, mask=mask, other=0.0).to(tl.float32)
        total += w * tl.load(grads + slope + tap * slope_tap, mask=mask, other=0.0).to(tl.float32)
    dreals += tl.load(rows + tensor * FILTER_COLUMNS + KERNEL_START)
    tl.store(dreals + number, total * ((SCALE / TEMPERATURE) * sigmoid_slope(argument)), mask=mask)


def _constants(launch: Launch, noisy: bool) -> dict[str, int | bool | dict[str, bool]]:
    return {"NOISY": noisy, "BLOCK": launch.block, "num_warps": launch.num_warps, **OPTIONS}


def kernel_soft(
    reals: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, layers: Sequence[int], threshold: float,
    noisy: bool, step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Masked weights with their weights' strides; arguments: dwm_fast.ops.kernel_soft."""
    require_fp32(reals)
    launch = launch_parameters("kernel_soft")
    masked: list[Tensor] = list(weights)
    with _tables.device_guard(rng_state.device):
        for indices in groups_of(weights):
            mine = with_one_stride(pick(weights, indices))
            dense = [r.contiguous() for r in pick(reals, indices)]
            plan = filter_plan([mine], pick(layers, indices), launch)
            flat, views = plan.weights(dtype or mine[0].dtype)
            if plan.num_blocks:
                table, constants = pointers([dense, mine]), _constants(launch, noisy)
                partials = _tables.empty(2 * plan.num_blocks, dtype=torch.float32, device=rng_state.device)
                kernel_range_fwd_kernel[(plan.num_blocks,)](
                    table, plan.rows, plan.blocks, partials, rng_state, threshold, step_offset, **constants
                )
                kernel_soft_fwd_kernel[(plan.num_blocks,)](
                    table, plan.rows, plan.blocks, partials, flat, rng_state, threshold, step_offset,
                    WEIGHT=TL_DTYPES[mine[0].dtype], SPAN=512, **constants,
                )  # fmt: skip
            for i, view, copied in zip(indices, views, mine, strict=True):
                given = weights[i]
                masked[i] = view if copied is given else torch.empty_like(given, dtype=view.dtype).copy_(view)
    return masked


def kernel_soft_backward(
    grads: Sequence[Tensor], reals: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor,
    layers: Sequence[int], threshold: float, noisy: bool, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the reals, fp32; arguments: dwm_fast.ops.kernel_soft."""
    require_fp32(reals)
    launch = launch_parameters("kernel_soft")
    found: list[Tensor] = list(reals)
    with _tables.device_guard(rng_state.device):
        for indices in groups_of(weights, grads):
            roles = [with_one_stride(pick(weights, indices)), with_one_stride(pick(grads, indices))]
            dense = [r.contiguous() for r in pick(reals, indices)]
            plan = filter_plan(roles, pick(layers, indices), launch)
            flat, views = plan.kernels(dense)
            for i, view in zip(indices, views, strict=True):
                found[i] = view
            if plan.num_blocks:
                kernel_soft_bwd_kernel[(plan.num_blocks,)](
                    pointers([dense, *roles]), plan.rows, plan.blocks, flat, rng_state, threshold, step_offset,
                    WEIGHT=TL_DTYPES[roles[0][0].dtype], GRAD=TL_DTYPES[roles[1][0].dtype], **_constants(launch, noisy),
                )  # fmt: skip
    return found
