"""sample and its backward in Triton: one launch for the masked weights, bits and penalty of a whole network."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._coding import decoded
from dwm_fast.kernels._launch import OPTIONS, launch_parameters
from dwm_fast.kernels._masks import (
    EDIT,
    GUMBEL_SOFT,
    flat_uniform,
    logit_gradient,
    masked_value,
    number_of,
    tap_uniform,
    taps_words,
    weight_gradient,
)
from dwm_fast.kernels._math import bound, narrow
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import FLAT, TAPS, TL_DTYPES, groups_of, pick, require_logits
from dwm_fast.kernels._tiles import (
    address,
    aligned,
    block_entry,
    flat_offsets,
    loose,
    output_start,
    row_of,
    store_bits,
    store_taps_bits,
    strided_coordinates,
    strided_offsets,
    taps_offsets,
)
from dwm_fast.kernels.philox import seed_and_step
from dwm_fast.ops.draw import Draw


@triton.jit(do_not_specialize=["step_offset"])
def sample_fwd_kernel(
    ptrs, rows, geometry, blocks, out, bits, partials, rng_state, tau_ptr, step_offset,
    LOGIT: tl.constexpr, WEIGHT: tl.constexpr, MODE: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
    STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr, HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, layer, threshold, word = row_of(rows, tensor)
    logits = address(ptrs, tensor, 0, 2)
    weights = address(ptrs, tensor, 1, 2)
    out += output_start(rows, tensor, 0)
    seed, step = seed_and_step(rng_state, step_offset)
    inverse_tau = 1.0 / tl.load(tau_ptr)
    threshold = number_of(threshold, tau_ptr, MODE)
    PENALTY: tl.constexpr = (MODE <= GUMBEL_SOFT) | (MODE == EDIT)

    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        x = decoded(tl.load(aligned(logits, LOGIT) + start + offsets, mask=mask, other=0))  # [BLOCK / 4, 4]
        w = tl.load(aligned(weights, WEIGHT) + start + offsets, mask=mask, other=0.0).to(tl.float32)
        u = flat_uniform(seed, step, layer, chunk, BLOCK, MODE)
        keep, value, term = masked_value(x, w, u, threshold, inverse_tau, MODE, PENALTY)
        tl.store(out + start + offsets, narrow(value, out.dtype.element_ty), mask=mask)
        if PACK:
            store_bits(bits, word, numel, chunk, keep & mask, BLOCK)
        if PENALTY:
            tl.store(partials + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0)))

    if HAS_TAPS and kind == TAPS:
        group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        words = taps_words(seed, step, layer, group, MODE)
        taps = tl.zeros([GROUPS, 4], tl.int32)
        total = tl.zeros([GROUPS], tl.float32)
        for tap in tl.static_range(9):
            x = decoded(tl.load(aligned(logits, LOGIT) + tap * stride + offsets, mask=mask, other=0))
            w = tl.load(aligned(weights, WEIGHT) + tap * stride + offsets, mask=mask, other=0.0)
            u = tap_uniform(words, tap, GROUPS, MODE)
            keep, value, term = masked_value(x, w.to(tl.float32), u, threshold, inverse_tau, MODE, PENALTY)
            tl.store(out + tap * stride + offsets, narrow(value, out.dtype.element_ty), mask=mask)
            taps |= (keep & mask).to(tl.int32) << tap
            if PENALTY:
                total += tl.sum(tl.where(mask, term, 0.0), axis=1)
        if PACK:
            store_taps_bits(bits, word, numel, chunk, taps, GROUPS)
        if PENALTY:
            tl.store(partials + tl.program_id(0), tl.sum(total))

    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 3)
        source = loose(logits, LOGIT) + strided_offsets(geometry, tensor, places, 0, RANK, 3)
        x = decoded(tl.load(source, mask=mask, other=0))
        w = tl.load(
            loose(weights, WEIGHT) + strided_offsets(geometry, tensor, places, 1, RANK, 3), mask=mask, other=0.0
        )
        u = flat_uniform(seed, step, layer, chunk, STRIDED_BLOCK, MODE)
        keep, value, term = masked_value(x, w.to(tl.float32), u, threshold, inverse_tau, MODE, PENALTY)
        target = out + strided_offsets(geometry, tensor, places, 2, RANK, 3)
        tl.store(target, narrow(value, out.dtype.element_ty), mask=mask)
        if PACK:
            store_bits(bits, word, numel, chunk, keep & mask, STRIDED_BLOCK)
        if PENALTY:
            tl.store(partials + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0)))


@triton.jit(do_not_specialize=["count", "total"])
def penalty_fwd_kernel(partials, penalty, count, total, BLOCK: tl.constexpr):
    """Mean over `total` elements from the programs' partial sums, added in a fixed order, in fp64."""
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, bound(count), BLOCK):
        index = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + index, mask=index < count, other=0.0).to(tl.float64)
    tl.store(penalty, (tl.sum(sums) / total.to(tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=["step_offset", "total"])
def sample_bwd_kernel(
    ptrs, rows, geometry, blocks, dlogits, dweights, grad_penalty, rng_state, tau_ptr, step_offset, total,
    LOGIT: tl.constexpr, WEIGHT: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr, NEED_LOGITS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, layer, threshold, _word = row_of(rows, tensor)
    logits = address(ptrs, tensor, 0, 3)
    weights = address(ptrs, tensor, 1, 3)
    grads = address(ptrs, tensor, 2, 3)
    dlogits += output_start(rows, tensor, 0)
    dweights += output_start(rows, tensor, 1)
    seed, step = seed_and_step(rng_state, step_offset)
    inverse_tau = 1.0 / tl.load(tau_ptr)
    threshold = number_of(threshold, tau_ptr, MODE)
    scale = tl.load(grad_penalty).to(tl.float32) / total.to(tl.float32)

    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        x = decoded(tl.load(aligned(logits, LOGIT) + start + offsets, mask=mask, other=0))  # [BLOCK / 4, 4]
        g = tl.load(aligned(grads, GRAD) + start + offsets, mask=mask, other=0.0).to(tl.float32)
        u = flat_uniform(seed, step, layer, chunk, BLOCK, MODE)
        if NEED_LOGITS:
            w = tl.load(aligned(weights, WEIGHT) + start + offsets, mask=mask, other=0.0).to(tl.float32)
            dl = logit_gradient(g, x, w, u, threshold, inverse_tau, scale, MODE)
            tl.store(dlogits + start + offsets, dl, mask=mask)
        if NEED_WEIGHTS:
            dw = narrow(weight_gradient(g, x, u, threshold, inverse_tau, MODE), WEIGHT)
            tl.store(dweights + start + offsets, dw, mask=mask)

    if HAS_TAPS and kind == TAPS:
        group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        words = taps_words(seed, step, layer, group, MODE)
        for tap in tl.static_range(9):
            x = decoded(tl.load(aligned(logits, LOGIT) + tap * stride + offsets, mask=mask, other=0))
            g = tl.load(aligned(grads, GRAD) + tap * stride + offsets, mask=mask, other=0.0)
            g = g.to(tl.float32)
            u = tap_uniform(words, tap, GROUPS, MODE)
            if NEED_LOGITS:
                w = tl.load(aligned(weights, WEIGHT) + tap * stride + offsets, mask=mask, other=0.0)
                dl = logit_gradient(g, x, w.to(tl.float32), u, threshold, inverse_tau, scale, MODE)
                tl.store(dlogits + tap * stride + offsets, dl, mask=mask)
            if NEED_WEIGHTS:
                dw = narrow(weight_gradient(g, x, u, threshold, inverse_tau, MODE), WEIGHT)
                tl.store(dweights + tap * stride + offsets, dw, mask=mask)

    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 5)
        source = loose(logits, LOGIT) + strided_offsets(geometry, tensor, places, 0, RANK, 5)
        x = decoded(tl.load(source, mask=mask, other=0))
        g = tl.load(loose(grads, GRAD) + strided_offsets(geometry, tensor, places, 2, RANK, 5), mask=mask, other=0.0)
        g = g.to(tl.float32)
        u = flat_uniform(seed, step, layer, chunk, STRIDED_BLOCK, MODE)
        if NEED_LOGITS:
            w = tl.load(
                loose(weights, WEIGHT) + strided_offsets(geometry, tensor, places, 1, RANK, 5), mask=mask, other=0.0
            )
            dl = logit_gradient(g, x, w.to(tl.float32), u, threshold, inverse_tau, scale, MODE)
            tl.store(dlogits + strided_offsets(geometry, tensor, places, 3, RANK, 5), dl, mask=mask)
        if NEED_WEIGHTS:
            dw = narrow(weight_gradient(g, x, u, threshold, inverse_tau, MODE), WEIGHT)
            tl.store(dweights + strided_offsets(geometry, tensor, places, 4, RANK, 5), dw, mask=mask)


def has_penalty(mode: int) -> bool:
    return bool(mode <= GUMBEL_SOFT.value or mode == EDIT.value)


def sample(
    logits: Sequence[Tensor], weights: Sequence[Tensor], draw: Draw, dtype: torch.dtype | None, pack: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masked weights, packed bits (empty unless `pack`) and penalty; arguments: dwm_fast.ops.sample."""
    require_logits(logits)
    device, launch = draw.rng_state.device, launch_parameters("sample")
    words = _tables.first_words([w.numel() for w in weights]) if pack else [0] * (len(weights) + 1)
    bits = _tables.empty(4 * words[-1] if pack else 0, dtype=torch.uint8, device=device)
    masked: list[Tensor] = [draw.rng_state] * len(weights)
    with _tables.device_guard(device):
        calls = []
        for indices in groups_of(weights, logits):
            roles = [pick(logits, indices), pick(weights, indices)]
            plan = _tables.plan(
                roles,
                launch,
                outputs=(1,),
                layers=pick(draw.layers, indices),
                thresholds=pick(draw.thresholds, indices),
                words=pick(words, indices),
            )
            calls.append((indices, roles, plan))
        count = sum(plan.num_blocks for _, _, plan in calls)
        partials = _tables.empty(count, dtype=torch.float32, device=device)
        first = 0
        for indices, roles, plan in calls:
            flat, views = plan.outputs(0, dtype or roles[1][0].dtype)
            for i, view in zip(indices, views, strict=True):
                masked[i] = view
            if plan.num_blocks:
                sample_fwd_kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.geometry, plan.blocks, flat,
                    bits.view(torch.int32) if pack else plan.blocks, partials[first:] if first else partials,
                    draw.rng_state, draw.tau, draw.step_offset, LOGIT=TL_DTYPES[roles[0][0].dtype],
                    WEIGHT=TL_DTYPES[roles[1][0].dtype], MODE=draw.mode, PACK=pack, **plan.constants(launch), **OPTIONS,
                )  # fmt: skip
            first += plan.num_blocks
        penalty = _mean(partials, sum(w.numel() for w in weights)) if has_penalty(draw.mode) else None
        if penalty is None:
            penalty = torch.zeros((), dtype=torch.float32, device=device)
    return masked, bits, penalty


def _mean(partials: Tensor, total: int) -> Tensor | None:
    if total == 0:
        return None
    penalty = _tables.empty((), dtype=torch.float32, device=partials.device)
    penalty_fwd_kernel[(1,)](partials, penalty, partials.numel(), total, BLOCK=1024, num_warps=4, **OPTIONS)
    return penalty


def sample_backward(
    grads: Sequence[Tensor], grad_penalty: Tensor, logits: Sequence[Tensor], weights: Sequence[Tensor], draw: Draw,
    need_logits: bool, need_weights: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients of logits (fp32) and of weights (their dtype), each with its tensor's strides; [] where not needed."""
    require_logits(logits)
    launch, total = launch_parameters("sample_backward"), sum(x.numel() for x in logits)
    results: list[list[Tensor]] = [
        [draw.rng_state] * len(x) if need else [] for x, need in ((logits, need_logits), (weights, need_weights))
    ]
    if not (need_logits or need_weights):
        return results[0], results[1]
    with _tables.device_guard(draw.rng_state.device):
        for indices in groups_of(weights, grads, logits):
            roles = [pick(logits, indices), pick(weights, indices), pick(grads, indices)]
            plan = _tables.plan(
                roles,
                launch,
                outputs=(0, 1),
                layers=pick(draw.layers, indices),
                thresholds=pick(draw.thresholds, indices),
            )
            flats = []
            for which, needed in enumerate((need_logits, need_weights)):
                dtype = roles[1][0].dtype if which else torch.float32
                flat, views = plan.outputs(which, dtype) if needed else (draw.rng_state, [])
                flats.append(flat)
                for i, view in zip(indices, views, strict=False):
                    results[which][i] = view
            if plan.num_blocks:
                sample_bwd_kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.geometry, plan.blocks, *flats, grad_penalty, draw.rng_state,
                    draw.tau, draw.step_offset, total, LOGIT=TL_DTYPES[roles[0][0].dtype],
                    WEIGHT=TL_DTYPES[roles[1][0].dtype], GRAD=TL_DTYPES[roles[2][0].dtype], MODE=draw.mode,
                    NEED_LOGITS=need_logits, NEED_WEIGHTS=need_weights, **plan.constants(launch), **OPTIONS,
                )  # fmt: skip
    return results[0], results[1]
