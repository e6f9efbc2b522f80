"""Optimiser steps in Triton: frozen_adamw, frozen_sgd, mask_adam, each one launch for a network; all in place."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.kernels import _tables
from dwm_fast.kernels._adam import adam_lanes, adam_scalars, sgd_lanes, sgd_scalars, split
from dwm_fast.kernels._launch import OPTIONS, launch_parameters
from dwm_fast.kernels._masks import flat_uniform, logit_gradient, number_of, tap_uniform, taps_words
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import FLAT, TAPS, TL_DTYPES, groups_of, require_fp32
from dwm_fast.kernels._tiles import (
    address,
    aligned,
    block_entry,
    compact_places,
    flat_offsets,
    load_bits,
    load_taps_bits,
    loose,
    row_of,
    strided_coordinates,
    strided_offsets,
    taps_offsets,
)
from dwm_fast.kernels.philox import seed_and_step
from dwm_fast.ops.draw import Draw


@triton.jit
def frozen_lanes(
    weights, grads, first, second, mask, free, scalars, is_first,
    STATE: tl.constexpr, ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """One step on the lanes of `mask` that are `free`; first and second point to their state."""
    w = tl.load(weights, mask=mask, other=0.0).to(STATE)
    g = tl.load(grads, mask=mask, other=0.0).to(STATE)
    if MAXIMIZE:
        g = -g
    if ADAM:
        adam_lanes(weights, w, g, first, second, mask, free, scalars, DECAY, DECOUPLED)
    else:
        sgd_lanes(weights, w, g, first, mask, free, is_first, scalars, MOMENTUM, NESTEROV, DECAY, DECOUPLED)


@triton.jit
def frozen_kernel(
    ptrs, rows, geometry, blocks, bits, ranks, steps, lr, parts,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, HAS_BITS: tl.constexpr, COMPACT: tl.constexpr,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """AdamW (state: both moments) or SGD (state: momentum buffer, twice) on the lanes whose bit is 0.

    Four neighbouring lanes are read and written together, kept ones among them as they were; four that are all kept
    are left alone. Compact state has no such fours: there pointers are left without their alignment, one lane a
    thread, so that neighbouring threads write neighbouring lanes.
    """
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, word = row_of(rows, tensor)
    weights = address(ptrs, tensor, 0, 4)
    grads = address(ptrs, tensor, 1, 4)
    first = address(ptrs, tensor, 2, 4)
    second = address(ptrs, tensor, 3, 4)
    is_first = tl.load(steps + tensor) == 1.0
    scalars = adam_scalars(steps + tensor, lr, parts, STATE) if ADAM else sgd_scalars(lr, parts, STATE)

    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        if COMPACT:
            mask = mask & (load_bits(bits, word, numel, chunk, BLOCK) == 0)
            place, state = start + offsets, compact_places(bits, ranks, word, numel, chunk, BLOCK)
            frozen_lanes(
                loose(weights, WEIGHT) + place, loose(grads, GRAD) + place,
                loose(first, STATE) + state, loose(second, STATE) + state, mask, None, scalars, is_first,
                STATE, ADAM, MOMENTUM, NESTEROV, DECAY, DECOUPLED, MAXIMIZE,
            )  # fmt: skip
        else:
            free = None
            if HAS_BITS:
                kept = load_bits(bits, word, numel, chunk, BLOCK)
                free = kept == 0
                mask = mask & (tl.sum(kept, axis=1) < 4)[:, None]
            frozen_lanes(
                aligned(weights, WEIGHT) + start + offsets, aligned(grads, GRAD) + start + offsets,
                aligned(first, STATE) + start + offsets, aligned(second, STATE) + start + offsets,
                mask, free, scalars, is_first, STATE, ADAM, MOMENTUM, NESTEROV, DECAY, DECOUPLED, MAXIMIZE,
            )  # fmt: skip

    if HAS_TAPS and kind == TAPS:
        _group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        taps = load_taps_bits(bits, word, numel, chunk, GROUPS) if HAS_BITS else offsets
        for tap in range(9):
            free, wanted = None, mask
            if HAS_BITS:
                kept = (taps >> tap) & 1
                free = kept == 0
                wanted = mask & (tl.sum(kept, axis=1) < 4)[:, None]
            place = tap * stride + offsets
            frozen_lanes(
                aligned(weights, WEIGHT) + place, aligned(grads, GRAD) + place,
                aligned(first, STATE) + place, aligned(second, STATE) + place,
                wanted, free, scalars, is_first, STATE, ADAM, MOMENTUM, NESTEROV, DECAY, DECOUPLED, MAXIMIZE,
            )  # fmt: skip

    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 4)
        if HAS_BITS:
            mask = mask & (load_bits(bits, word, numel, chunk, STRIDED_BLOCK) == 0)
        if COMPACT:
            state = compact_places(bits, ranks, word, numel, chunk, STRIDED_BLOCK)
            first_lanes, second_lanes = loose(first, STATE) + state, loose(second, STATE) + state
        else:
            first_lanes = loose(first, STATE) + strided_offsets(geometry, tensor, places, 2, RANK, 4)
            second_lanes = loose(second, STATE) + strided_offsets(geometry, tensor, places, 3, RANK, 4)
        frozen_lanes(
            loose(weights, WEIGHT) + strided_offsets(geometry, tensor, places, 0, RANK, 4),
            loose(grads, GRAD) + strided_offsets(geometry, tensor, places, 1, RANK, 4), first_lanes, second_lanes,
            mask, None, scalars, is_first, STATE, ADAM, MOMENTUM, NESTEROV, DECAY, DECOUPLED, MAXIMIZE,
        )  # fmt: skip


@triton.jit
def mask_lanes(
    logits, weights, grads, exp_avg, exp_avg_sq, mask, u, threshold, inverse_tau, penalty_scale, scalars,
    MODE: tl.constexpr, DECAY: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """Chain rule, penalty's slope and Adam step of logits."""
    x = tl.load(logits, mask=mask, other=0.0)
    w = tl.load(weights, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grads, mask=mask, other=0.0).to(tl.float32)
    dx = logit_gradient(g, x, w, u, threshold, inverse_tau, penalty_scale, MODE)
    adam_lanes(logits, x, dx, exp_avg, exp_avg_sq, mask, None, scalars, DECAY, DECOUPLED)


@triton.jit(do_not_specialize=["step_offset"])
def mask_adam_kernel(
    ptrs, rows, geometry, blocks, rng_state, tau_ptr, scale_ptr, steps, lr, parts, step_offset,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr, DECAY: tl.constexpr, DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr, HAS_TAPS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, layer, threshold, _word = row_of(rows, tensor)
    logits = address(ptrs, tensor, 0, 5)
    weights = address(ptrs, tensor, 1, 5)
    grads = address(ptrs, tensor, 2, 5)
    exp_avg = address(ptrs, tensor, 3, 5)
    exp_avg_sq = address(ptrs, tensor, 4, 5)
    seed, step = seed_and_step(rng_state, step_offset)
    inverse_tau = 1.0 / tl.load(tau_ptr)
    threshold = number_of(threshold, tau_ptr, MODE)
    scale = tl.load(scale_ptr).to(tl.float32)
    scalars = adam_scalars(steps + tensor, lr, parts, tl.float32)

    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        u = flat_uniform(seed, step, layer, chunk, BLOCK, MODE)
        mask_lanes(
            aligned(logits, tl.float32) + start + offsets, aligned(weights, WEIGHT) + start + offsets,
            aligned(grads, GRAD) + start + offsets, aligned(exp_avg, tl.float32) + start + offsets,
            aligned(exp_avg_sq, tl.float32) + start + offsets, mask, u, threshold, inverse_tau, scale, scalars,
            MODE, DECAY, DECOUPLED,
        )  # fmt: skip

    if HAS_TAPS and kind == TAPS:
        group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        words = taps_words(seed, step, layer, group, MODE)
        for tap in tl.static_range(9):
            place = tap * stride + offsets
            u = tap_uniform(words, tap, GROUPS, MODE)
            mask_lanes(
                aligned(logits, tl.float32) + place, aligned(weights, WEIGHT) + place,
                aligned(grads, GRAD) + place, aligned(exp_avg, tl.float32) + place,
                aligned(exp_avg_sq, tl.float32) + place, mask, u, threshold, inverse_tau, scale, scalars,
                MODE, DECAY, DECOUPLED,
            )  # fmt: skip

    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 5)
        u = flat_uniform(seed, step, layer, chunk, STRIDED_BLOCK, MODE)
        mask_lanes(
            loose(logits, tl.float32) + strided_offsets(geometry, tensor, places, 0, RANK, 5),
            loose(weights, WEIGHT) + strided_offsets(geometry, tensor, places, 1, RANK, 5),
            loose(grads, GRAD) + strided_offsets(geometry, tensor, places, 2, RANK, 5),
            loose(exp_avg, tl.float32) + strided_offsets(geometry, tensor, places, 3, RANK, 5),
            loose(exp_avg_sq, tl.float32) + strided_offsets(geometry, tensor, places, 4, RANK, 5),
            mask, u, threshold, inverse_tau, scale, scalars, MODE, DECAY, DECOUPLED,
        )  # fmt: skip


def _one_dtype(name: str, *lists: Sequence[Tensor]) -> None:
    if len(groups_of(*lists)) != 1:
        found = sorted({str(t.dtype) for tensors in lists for t in tensors})
        raise InputError(
            f"{name} got tensors of {', '.join(found)}; expected one dtype of weights and one of gradients a call: "
            f"call it once per dtype"
        )


def _frozen(
    name: str, weights: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Sequence[Tensor]], bits: Tensor,
    ranks: Tensor, steps: Tensor, lr: Tensor, parts: tuple[float, ...], **constants: bool,
) -> None:  # fmt: skip
    if not weights:
        return
    _one_dtype(name, weights, grads)
    compact = ranks.numel() > 0 and len(state) > 0
    state = [*state, *[weights] * 2][:2] if len(state) != 1 else [state[0], state[0]]
    launch, words = launch_parameters("update"), _tables.first_words([w.numel() for w in weights])
    roles = [weights, grads, *([weights, weights] if compact else state)]
    with _tables.device_guard(lr.device):
        plan = _tables.plan(roles, launch, words=words[:-1], allow_taps=not compact)
        if plan.num_blocks:
            frozen_kernel[(plan.num_blocks,)](
                pointers([weights, grads, *state]), plan.rows, plan.geometry, plan.blocks,
                bits.contiguous().view(torch.int32), ranks, steps, lr, parts,
                WEIGHT=TL_DTYPES[weights[0].dtype], GRAD=TL_DTYPES[grads[0].dtype],
                STATE=TL_DTYPES[torch.promote_types(weights[0].dtype, torch.float32)], HAS_BITS=bits.numel() > 0,
                COMPACT=compact, **constants, **plan.constants(launch), **OPTIONS,
            )  # fmt: skip


def frozen_adamw(
    weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    bits: Tensor, ranks: Tensor, steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    """One Adam(W) step on the free lanes; arguments: dwm_fast.ops.update."""
    _frozen(
        "frozen_adamw", weights, grads, [exp_avg, exp_avg_sq], bits, ranks, steps, lr,
        split(beta1, beta2, eps, weight_decay), ADAM=True, MOMENTUM=False, NESTEROV=False,
        DECAY=weight_decay != 0, DECOUPLED=decoupled, MAXIMIZE=maximize,
    )  # fmt: skip


def frozen_sgd(
    weights: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], bits: Tensor,
    ranks: Tensor, steps: Tensor, lr: Tensor, momentum: float, dampening: float, weight_decay: float,
    nesterov: bool, decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    """One SGD step on the free lanes; arguments: dwm_fast.ops.update."""
    _frozen(
        "frozen_sgd", weights, grads, [momentum_buffers] if momentum != 0 else [], bits, ranks, steps, lr,
        split(momentum, dampening, weight_decay), ADAM=False, MOMENTUM=momentum != 0, NESTEROV=nesterov,
        DECAY=weight_decay != 0, DECOUPLED=decoupled, MAXIMIZE=maximize,
    )  # fmt: skip


def mask_adam(
    logits: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor], draw: Draw, penalty_scale: Tensor, steps: Tensor, lr: Tensor, beta1: float,
    beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    """Chain rule, penalty and one Adam(W) step on logits; arguments: dwm_fast.ops.update."""
    if not logits:
        return
    require_fp32(logits)
    _one_dtype("mask_adam", weights, grads)
    launch, roles = launch_parameters("update"), [logits, weights, grads, exp_avg, exp_avg_sq]
    with _tables.device_guard(draw.rng_state.device):
        plan = _tables.plan(roles, launch, layers=draw.layers, thresholds=draw.thresholds)
        if plan.num_blocks:
            mask_adam_kernel[(plan.num_blocks,)](
                pointers(roles), plan.rows, plan.geometry, plan.blocks, draw.rng_state, draw.tau, penalty_scale, steps,
                lr, split(beta1, beta2, eps, weight_decay), draw.step_offset, WEIGHT=TL_DTYPES[weights[0].dtype],
                GRAD=TL_DTYPES[grads[0].dtype], MODE=draw.mode, DECAY=weight_decay != 0, DECOUPLED=decoupled,
                **plan.constants(launch), **OPTIONS,
            )  # fmt: skip
