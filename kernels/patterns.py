"""pattern_mask and its backward in Triton: N:M masks of a whole network, one launch each; a thread takes a group.

Up to FEW patterns, all scores of a group stay in registers: each pattern's is drawn once, then its softmax is formed.
More are walked in fours, with a table of what each keeps: the scores are drawn again, or kept where the gradient goes.
Logits and weights lie in logical order; what does not is left to the reference.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.errors import Unsupported
from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS, launch_parameters
from dwm_fast.kernels._masks import GUMBEL_SOFT, KEEP
from dwm_fast.kernels._math import exp, log, narrow, reciprocal
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import TL_DTYPES, groups_of, pick
from dwm_fast.kernels._tiles import address, aligned, block_entry, loose, output_start, row_of, rows_of_four
from dwm_fast.kernels.philox import block_words4, seed_and_step, uniform

FEW = 20
"""Patterns of a group that are unrolled, at most: the compiler would take two minutes for the 70 of 4:8."""


@triton.jit
def gumbel(u):
    """-log(-log(1 - u)) of a u as `uniform` gives it: by the series of atanh where u is small and the noise large."""
    near = tl.abs(u)
    s = near * reciprocal(2.0 - near)  # -log(1 - u) = 2 atanh(u / (2 - u))
    q = s * s
    small = 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (0.2 + q * (1.0 / 7.0 + q * (1.0 / 9.0)))))
    upper = u < 0
    large = -log(tl.where(upper, near, 1.0 - near))
    return -log(tl.where(upper | (near >= 0.25), large, small))


@triton.jit
def group_scores(logits, mask, kappa, drawn, group, P: tl.constexpr, MODE: tl.constexpr):
    """kappa l + G of each pattern, a tuple of blocks [GROUPS]; l alone under KEEP."""
    seed, step, layer = drawn
    scores = ()
    words = ()
    for p in tl.static_range(P):
        x = (tl.load(logits + p, mask=mask, other=0.0),)
        if MODE != KEEP:
            if p % 4 == 0:
                words = block_words4(seed, step, layer, group * ((P + 3) // 4) + p // 4)
            x = (x[0] * kappa + gumbel(uniform(words[p % 4])),)
        scores = scores + x  # type: ignore[assignment]  # a tuple that grows
    return scores


@triton.jit
def chosen_places(scores, P: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr):
    """Places (int32, bit e for element e) of the pattern of the largest score, the first of equals; of NaN the last."""
    best = scores[0]
    places = tl.full(best.shape, TABLE & ((1 << M) - 1), tl.int32)
    lost = best != best
    for p in tl.static_range(1, P):
        places = tl.where(scores[p] > best, (TABLE >> (M * p)) & ((1 << M) - 1), places)
        best = tl.maximum(best, scores[p])
        lost = lost | (scores[p] != scores[p])
    return tl.where(lost, (TABLE >> (M * (P - 1))) & ((1 << M) - 1), places)


@triton.jit
def softened(scores, inverse_tau, P: tl.constexpr):
    """Softmax of scores / tau: its numerators, a tuple of blocks, and 1 / their sum."""
    best = scores[0]
    for p in tl.static_range(1, P):
        best = tl.maximum(best, scores[p])
    parts = ()
    total = tl.zeros_like(best)
    for p in tl.static_range(P):
        part = (exp((scores[p] - best) * inverse_tau),)
        total += part[0]
        parts = parts + part  # type: ignore[assignment]  # a tuple that grows
    return parts, reciprocal(total)


@triton.jit
def elements(pointer, group, mask, M: tl.constexpr):
    """Each group's M elements, a tuple of blocks [GROUPS], fp32; four neighbours a load where M allows."""
    found = ()
    if M % 4 == 0:
        for q in tl.static_range(M // 4):
            places = (M * group + 4 * q)[:, None] + tl.arange(0, 4)[None, :]
            x = tl.load(pointer + places, mask=mask[:, None], other=0.0).to(tl.float32)
            even, odd = tl.split(x.reshape(x.shape[0], 2, 2))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            four = (x0, x1, x2, x3)
            found = found + four  # type: ignore[assignment]  # a tuple that grows
    else:
        for e in tl.static_range(M):
            x = (tl.load(pointer + M * group + e, mask=mask, other=0.0).to(tl.float32),)
            found = found + x  # type: ignore[assignment]  # a tuple that grows
    return found


@triton.jit
def store_elements(pointer, values, group, mask, M: tl.constexpr, GROUPS: tl.constexpr):
    dtype: tl.constexpr = pointer.dtype.element_ty
    if M % 4 == 0:
        for q in tl.static_range(M // 4):
            places = (M * group + 4 * q)[:, None] + tl.arange(0, 4)[None, :]
            x = rows_of_four(values[4 * q], values[4 * q + 1], values[4 * q + 2], values[4 * q + 3], GROUPS)
            tl.store(pointer + places, narrow(x, dtype), mask=mask[:, None])
    else:
        for e in tl.static_range(M):
            tl.store(pointer + M * group + e, narrow(values[e], dtype), mask=mask)


@triton.jit(do_not_specialize=["step_offset"])
def pattern_fwd_kernel(
    ptrs, rows, blocks, out, rng_state, tau_ptr, step_offset,
    WEIGHT: tl.constexpr, MODE: tl.constexpr, P: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """TABLE: bit M p + e is 1 where pattern p keeps element e."""
    tensor, _kind, chunk = block_entry(blocks)
    count, layer, _threshold, _word = row_of(rows, tensor)
    seed, step = seed_and_step(rng_state, step_offset)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    mask = group < count
    kappa = tl.load(tau_ptr + 1).to(tl.float32)
    logits = loose(address(ptrs, tensor, 0, 2), tl.float32) + P * group
    scores = group_scores(logits, mask, kappa, (seed, step, layer), group, P, MODE)
    weights = elements(aligned(address(ptrs, tensor, 1, 2), WEIGHT), group, mask, M)
    masked = ()
    if MODE == GUMBEL_SOFT:
        parts, scale = softened(scores, 1.0 / tl.load(tau_ptr).to(tl.float32), P)
        for e in tl.static_range(M):
            value = tl.zeros_like(scale)
            for p in tl.static_range(P):
                if (TABLE >> (M * p + e)) & 1:
                    value += parts[p]
            product = (weights[e] * (value * scale),)
            masked = masked + product  # type: ignore[assignment]  # a tuple that grows
    else:
        places = chosen_places(scores, P, M, TABLE)
        for e in tl.static_range(M):
            product = (tl.where((places >> e) & 1 != 0, weights[e], 0.0),)
            masked = masked + product  # type: ignore[assignment]  # a tuple that grows
    store_elements(out + M * output_start(rows, tensor, 0), masked, group, mask, M, GROUPS)


@triton.jit(do_not_specialize=["step_offset"])
def pattern_bwd_kernel(
    ptrs, rows, blocks, dlogits, rng_state, tau_ptr, step_offset,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, P: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """dl_p = kappa / tau y_p (b_p - sum of y_q b_q), b_p the sum of G W over the elements that p keeps."""
    tensor, _kind, chunk = block_entry(blocks)
    count, layer, _threshold, _word = row_of(rows, tensor)
    seed, step = seed_and_step(rng_state, step_offset)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    mask = group < count
    tau, kappa = tl.load(tau_ptr).to(tl.float32), tl.load(tau_ptr + 1).to(tl.float32)
    logits = loose(address(ptrs, tensor, 0, 3), tl.float32) + P * group
    scores = group_scores(logits, mask, kappa, (seed, step, layer), group, P, GUMBEL_SOFT)
    weights = elements(aligned(address(ptrs, tensor, 1, 3), WEIGHT), group, mask, M)
    grads = elements(aligned(address(ptrs, tensor, 2, 3), GRAD), group, mask, M)
    parts, scale = softened(scores, 1.0 / tau, P)
    mean = tl.zeros_like(scale)
    moves = ()
    for e in tl.static_range(M):
        move = (grads[e] * weights[e],)
        moves = moves + move  # type: ignore[assignment]  # a tuple that grows
    gains = ()
    for p in tl.static_range(P):
        gain = tl.zeros_like(scale)
        for e in tl.static_range(M):
            if (TABLE >> (M * p + e)) & 1:
                gain += moves[e]
        mean += parts[p] * gain
        one = (gain,)
        gains = gains + one  # type: ignore[assignment]  # a tuple that grows
    mean = mean * scale
    target = dlogits + P * (output_start(rows, tensor, 0) + group)
    for p in tl.static_range(P):
        tl.store(target + p, parts[p] * scale * (gains[p] - mean) * (kappa / tau), mask=mask)


@triton.jit
def four_scores(logits, mask, kappa, drawn, group, q, P: tl.constexpr, MODE: tl.constexpr):
    """As `group_scores`, of patterns 4 q to 4 q + 3; -inf for those that are not there."""
    seed, step, layer = drawn
    if MODE != KEEP:
        words = block_words4(seed, step, layer, group * ((P + 3) // 4) + q)
    scores = ()
    for r in tl.static_range(4):
        there = mask & (4 * q + r < P)
        x = (tl.load(logits + 4 * q + r, mask=there, other=0.0),)
        if MODE != KEEP:
            x = (x[0] * kappa + gumbel(uniform(words[r])),)
        x = (tl.where(4 * q + r < P, x[0], float("-inf")),)
        scores = scores + x  # type: ignore[assignment]  # a tuple that grows
    return scores


@triton.jit
def kept_of(keeps, pattern, P: tl.constexpr, M: tl.constexpr):
    """Row of the table: 1.0 for each of the M elements that a pattern keeps, beyond the last pattern the last's."""
    return tl.load(keeps + tl.minimum(pattern, P - 1) * M + tl.arange(0, M))[None, :]


@triton.jit(do_not_specialize=["step_offset"])
def many_patterns_fwd_kernel(
    ptrs, rows, blocks, out, keeps, rng_state, tau_ptr, step_offset,
    WEIGHT: tl.constexpr, MODE: tl.constexpr, P: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """keeps: fp32 (P, M), 1.0 where a pattern keeps an element; M a power of two."""
    tensor, _kind, chunk = block_entry(blocks)
    count, layer, _threshold, _word = row_of(rows, tensor)
    seed, step = seed_and_step(rng_state, step_offset)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    mask = group < count
    kappa = tl.load(tau_ptr + 1).to(tl.float32)
    logits = loose(address(ptrs, tensor, 0, 2), tl.float32) + P * group
    drawn = (seed, step, layer)
    places = (M * group)[:, None] + tl.arange(0, M)[None, :]
    w = tl.load(aligned(address(ptrs, tensor, 1, 2), WEIGHT) + places, mask=mask[:, None], other=0.0).to(tl.float32)
    best = tl.full([GROUPS], float("-inf"), tl.float32)
    first = tl.zeros([GROUPS], tl.int32)
    for q in tl.range(0, (P + 3) // 4):
        scores = four_scores(logits, mask, kappa, drawn, group, q, P, MODE)
        for r in tl.static_range(4):
            # A NaN has no larger one: from the first on, the last pattern is chosen.
            lost = (scores[r] != scores[r]) | (first == P)
            first = tl.where(lost, P, tl.where(scores[r] > best, 4 * q + r, first))
            best = tl.maximum(best, scores[r])
    if MODE == GUMBEL_SOFT:
        inverse_tau = 1.0 / tl.load(tau_ptr).to(tl.float32)
        total = tl.zeros([GROUPS], tl.float32)
        value = tl.zeros([GROUPS, M], tl.float32)
        for q in tl.range(0, (P + 3) // 4):
            scores = four_scores(logits, mask, kappa, drawn, group, q, P, MODE)
            for r in tl.static_range(4):
                part = exp((scores[r] - best) * inverse_tau)
                total += part
                value += part[:, None] * kept_of(keeps, 4 * q + r, P, M)
        masked = w * (value * reciprocal(total)[:, None])
    else:
        chosen = tl.minimum(first, P - 1)[:, None] * M + tl.arange(0, M)[None, :]
        masked = tl.where(tl.load(keeps + chosen) != 0, w, 0.0)
    target = out + M * output_start(rows, tensor, 0) + places
    tl.store(target, narrow(masked, out.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["step_offset"])
def many_patterns_bwd_kernel(
    ptrs, rows, blocks, dlogits, keeps, rng_state, tau_ptr, step_offset,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, P: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """As `pattern_bwd_kernel`; scores wait where their gradients go."""
    tensor, _kind, chunk = block_entry(blocks)
    count, layer, _threshold, _word = row_of(rows, tensor)
    seed, step = seed_and_step(rng_state, step_offset)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    mask = group < count
    tau, kappa = tl.load(tau_ptr).to(tl.float32), tl.load(tau_ptr + 1).to(tl.float32)
    logits = loose(address(ptrs, tensor, 0, 3), tl.float32) + P * group
    target = dlogits + P * (output_start(rows, tensor, 0) + group)
    best = tl.full([GROUPS], float("-inf"), tl.float32)
    for q in tl.range(0, (P + 3) // 4):
        scores = four_scores(logits, mask, kappa, (seed, step, layer), group, q, P, GUMBEL_SOFT)
        for r in tl.static_range(4):
            best = tl.maximum(best, scores[r])
            tl.store(target + 4 * q + r, scores[r], mask=mask & (4 * q + r < P))
    tl.debug_barrier()  # the compiler may let other threads of the block read them
    places = (M * group)[:, None] + tl.arange(0, M)[None, :]
    w = tl.load(aligned(address(ptrs, tensor, 1, 3), WEIGHT) + places, mask=mask[:, None], other=0.0).to(tl.float32)
    g = tl.load(aligned(address(ptrs, tensor, 2, 3), GRAD) + places, mask=mask[:, None], other=0.0).to(tl.float32)
    moves = g * w
    total, mean = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
    for p in tl.range(0, P):
        part = exp((tl.load(target + p, mask=mask, other=0.0) - best) * (1.0 / tau))
        total += part
        mean += part * tl.sum(moves * kept_of(keeps, p, P, M), axis=1)
    scale = reciprocal(total)
    mean = mean * scale
    for p in tl.range(0, P):
        part = exp((tl.load(target + p, mask=mask, other=0.0) - best) * (1.0 / tau))
        gain = tl.sum(moves * kept_of(keeps, p, P, M), axis=1)
        tl.store(target + p, part * scale * (gain - mean) * (kappa / tau), mask=mask)


@functools.cache
def table(n: int, m: int) -> int:
    """The patterns in the order of their numbers, m bits each."""
    return sum(sum(1 << e for e in kept) << m * p for p, kept in enumerate(itertools.combinations(range(m), n)))


@functools.cache
def _keeps(n: int, m: int, device: torch.device) -> Tensor:
    """`table` as fp32 (patterns, m) on a device; made once, so that a step waits for no copy from the host."""
    kept = [[float(e in places) for e in range(m)] for places in itertools.combinations(range(m), n)]
    with torch.inference_mode(False):
        return torch.tensor(kept, dtype=torch.float32, device=device)


def _kernel(
    few: Any, many: Any, n: int, m: int, device: torch.device
) -> tuple[Any, tuple[Tensor, ...], dict[str, int]]:
    """The kernel for so many patterns, its table in memory where it reads one, and its constants."""
    rule = {"P": math.comb(m, n), "M": m}
    if rule["P"] <= FEW:
        return few, (), {**rule, "TABLE": table(n, m)}
    return many, (_keeps(n, m, device),), rule


def _plan(logits: Sequence[Tensor], layers: Sequence[int]) -> _tables.Plan:
    """A plan over groups; the element of an output is a group."""
    groups = [x.select(-1, 0) for x in logits]
    return _tables.plan([groups], launch_parameters("patterns"), outputs=(0,), layers=layers, allow_taps=False)


def _flat(plan: _tables.Plan, like: Sequence[Tensor], each: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A fresh buffer of `each` elements a group, and its contiguous views of the shapes of `like`."""
    flat = _tables.empty(plan.output_numels[0] * each, dtype=dtype, device=plan.rows.device)
    places = zip(plan.output_places[0], like, strict=True)
    return flat, [flat[each * first : each * first + t.numel()].view(t.shape) for (_, _, first), t in places]


def _require_known(n: int, m: int, *lists: Sequence[Tensor]) -> None:
    """Unsupported for what the reference computes; logits come first of the lists."""
    if (math.comb(m, n) > FEW and m & (m - 1)) or any(x.dtype != torch.float32 for x in lists[0]):
        raise Unsupported
    if any(not t.is_contiguous() or t.dtype == torch.float64 or t.data_ptr() % 16 for own in lists for t in own):
        raise Unsupported


def pattern_mask(
    logits: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, tau: Tensor, layers: Sequence[int], n: int,
    m: int, mode: int, step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Masked weights; arguments: dwm_fast.ops.patterns."""
    _require_known(n, m, logits, weights)
    launch, masked = launch_parameters("patterns"), list(weights)
    with _tables.device_guard(rng_state.device):
        for indices in groups_of(weights):
            roles = [pick(logits, indices), pick(weights, indices)]
            plan = _plan(roles[0], pick(layers, indices))
            flat, views = _flat(plan, roles[1], m, dtype or roles[1][0].dtype)
            for i, view in zip(indices, views, strict=True):
                masked[i] = view
            if plan.num_blocks:
                kernel, keeps, rule = _kernel(pattern_fwd_kernel, many_patterns_fwd_kernel, n, m, rng_state.device)
                kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.blocks, flat, *keeps, rng_state, tau, step_offset,
                    WEIGHT=TL_DTYPES[roles[1][0].dtype], MODE=mode, **rule, GROUPS=launch.strided,
                    num_warps=launch.num_warps, **OPTIONS,
                )  # fmt: skip
    return masked


def pattern_mask_backward(
    grads: Sequence[Tensor], logits: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, tau: Tensor,
    layers: Sequence[int], n: int, m: int, mode: int, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the logits; arguments: dwm_fast.ops.patterns."""
    if mode == KEEP.value:
        return [torch.zeros_like(x) for x in logits]
    grads = [g.contiguous() for g in grads]
    _require_known(n, m, logits, weights, grads)
    launch, found = launch_parameters("patterns"), list(logits)
    with _tables.device_guard(rng_state.device):
        for indices in groups_of(weights, grads):
            roles = [pick(logits, indices), pick(weights, indices), pick(grads, indices)]
            plan = _plan(roles[0], pick(layers, indices))
            flat, views = _flat(plan, roles[0], math.comb(m, n), torch.float32)
            for i, view in zip(indices, views, strict=True):
                found[i] = view
            if plan.num_blocks:
                kernel, keeps, rule = _kernel(pattern_bwd_kernel, many_patterns_bwd_kernel, n, m, rng_state.device)
                kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.blocks, flat, *keeps, rng_state, tau, step_offset,
                    WEIGHT=TL_DTYPES[roles[1][0].dtype], GRAD=TL_DTYPES[roles[2][0].dtype], **rule,
                    GROUPS=launch.strided, num_warps=launch.num_warps, **OPTIONS,
                )  # fmt: skip
    return found
