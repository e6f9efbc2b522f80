"""The C++ backend on CPU tensors: every function has the signature of the operation it computes.

Importing this module builds the extension at first need and loads it; where that is not possible the import raises
BackendUnavailable with one line that says what to do. The kernels know dense tensors in contiguous or channels_last
order of float32, bfloat16 or float16; anything else takes a copy in such an order, or the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import Unsupported
from dwm_fast.ops import _build

_build.load("cpu")

from dwm_fast.ops.bank import segments  # noqa: E402
from dwm_fast.ops.blocks import multiply_by_blocks  # noqa: E402
from dwm_fast.ops.coding import LOGITS  # noqa: E402
from dwm_fast.ops.draw import Draw  # noqa: E402
from dwm_fast.ops.kept import expand_values, weight_like  # noqa: E402
from dwm_fast.ops.layout import PACKABLE, in_orders, known, order_of, restored  # noqa: E402
from dwm_fast.ops.linear import activated  # noqa: E402
from dwm_fast.ops.packing import packed_nbytes  # noqa: E402 - only where the extension loads
from dwm_fast.ops.problem import FLOATS, Problem, cpu_problem, rows_of  # noqa: E402
from dwm_fast.ops.union import joined  # noqa: E402
from dwm_fast.ops.ways import one_pass  # noqa: E402

TensorList = Sequence[Tensor]

_OPS = torch.ops.dwm_fast_cpu
_LOGITS = tuple(LOGITS.values())


def _uniform(tensors: TensorList, dtypes: tuple[torch.dtype, ...]) -> bool:
    return not tensors or (tensors[0].dtype in dtypes and all(t.dtype == tensors[0].dtype for t in tensors))


def sample(
    logits: TensorList, weights: TensorList, draw: Draw, dtype: torch.dtype | None, pack: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    simple = (dtype is None or dtype in FLOATS) and _uniform(weights, FLOATS) and _uniform(logits, _LOGITS)
    if not (simple and weights):
        raise Unsupported
    plain = all(t.is_contiguous() for t in (*logits, *weights))
    dense, orders = (weights, []) if plain else known(weights)
    scores = logits if plain else in_orders(logits, orders)
    masked = [torch.empty_like(w, dtype=dtype) for w in dense]
    bits = torch.zeros(sum(packed_nbytes(w.numel()) for w in weights) if pack else 0, dtype=torch.uint8)
    penalty = torch.empty((), dtype=torch.float32)
    _OPS.sample.default(masked, bits, penalty, scores, dense, *_fp32(draw))
    return masked if plain else restored(masked, weights), bits, penalty


def sample_backward(
    grads: TensorList, grad_penalty: Tensor, logits: TensorList, weights: TensorList, draw: Draw, need_logits: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    simple = _uniform(weights, FLOATS) and _uniform(logits, _LOGITS) and _uniform(grads, FLOATS)
    if not (simple and weights):
        raise Unsupported
    scores, orders = known(logits)
    dense, incoming = in_orders(weights, orders), in_orders(grads, orders)
    dlogits = [torch.empty_like(x, dtype=torch.float32) for x in scores] if need_logits else []
    dweights = [torch.empty_like(w) for w in dense] if need_weights else []
    _OPS.sample_backward.default(dlogits, dweights, incoming, grad_penalty.float(), scores, dense, *_fp32(draw))
    return restored(dlogits, logits if need_logits else []), restored(dweights, weights if need_weights else [])


def _fp32(draw: Draw) -> tuple[Any, ...]:
    """The draw as the C++ operations take it."""
    return draw.rng_state, draw.tau.float(), draw.layers, draw.thresholds, draw.mode, draw.step_offset


def pack(masks: TensorList) -> Tensor:
    dense, _ = known(m if m.dtype in PACKABLE else m != 0 for m in masks)
    bits = torch.zeros(sum(packed_nbytes(m.numel()) for m in masks), dtype=torch.uint8)
    _OPS.pack.default(dense, bits)
    return bits


def unpack(bits: Tensor, numels: Sequence[int]) -> list[Tensor]:
    masks = [torch.empty(numel, dtype=torch.bool) for numel in numels]
    _OPS.unpack.default(bits.contiguous(), masks)
    return masks


def apply(bits: Tensor, weights: TensorList) -> list[Tensor]:
    if any(w.is_complex() for w in weights):
        raise Unsupported
    contiguous = all(w.is_contiguous() for w in weights)
    dense = weights if contiguous else known(weights)[0]
    masked = [torch.empty_like(w) for w in dense]
    _OPS.apply.default(bits.contiguous(), dense, masked)
    return masked if contiguous else restored(masked, weights)


def count(bits: Tensor, numels: Sequence[int]) -> Tensor:
    ones = torch.empty(len(numels), dtype=torch.int64)
    _OPS.count.default(bits.contiguous(), numels, ones)
    return ones


def overlap(a: Tensor, b: Tensor, numels: Sequence[int]) -> Tensor:
    sizes = torch.empty((len(numels), 2), dtype=torch.int64)
    _OPS.overlap.default(a.contiguous(), b.contiguous(), numels, sizes)
    return sizes


def _alike(weights: TensorList, grads: TensorList, *states: TensorList, compact: bool = False) -> list[Tensor] | None:
    """Gradients in the weights' memory order, or None where the kernels cannot work in place on these tensors."""
    if not (_uniform(weights, FLOATS) and _uniform(grads, FLOATS)):
        return None
    orders = [order_of(w) for w in weights]
    for state in states:
        if not _uniform(state, (torch.float32,)):
            return None
        if not compact and any(order_of(s) is not order for s, order in zip(state, orders, strict=True)):
            return None
    known_orders = [order for order in orders if order is not None]
    return in_orders(grads, known_orders) if len(known_orders) == len(orders) else None


def _lane_bits(bits: Tensor, weights: TensorList) -> Tensor:
    """The network buffer; where it is empty, one that keeps no lane."""
    if bits.numel():
        return bits.contiguous()
    return torch.zeros(sum(packed_nbytes(w.numel()) for w in weights), dtype=torch.uint8)


def frozen_adamw(
    weights: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList, bits: Tensor,
    ranks: Tensor, steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    aligned = _alike(weights, grads, exp_avg, exp_avg_sq, compact=ranks.numel() > 0)
    if aligned is None:
        raise Unsupported
    _OPS.frozen_adamw.default(
        weights, aligned, exp_avg, exp_avg_sq, _lane_bits(bits, weights), ranks.contiguous(), steps.contiguous(), lr,
        beta1, beta2, eps, weight_decay, decoupled, maximize,
    )  # fmt: skip


def frozen_sgd(
    weights: TensorList, grads: TensorList, momentum_buffers: TensorList, bits: Tensor, ranks: Tensor,
    steps: Tensor, lr: Tensor, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    states = [momentum_buffers] if momentum != 0 else []
    aligned = _alike(weights, grads, *states, compact=ranks.numel() > 0)
    if aligned is None:
        raise Unsupported
    _OPS.frozen_sgd.default(
        weights, aligned, momentum_buffers, _lane_bits(bits, weights), ranks.contiguous(), steps.contiguous(), lr,
        momentum, dampening, weight_decay, nesterov, decoupled, maximize,
    )  # fmt: skip


def mask_adam(
    logits: TensorList, weights: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList,
    draw: Draw, penalty_scale: Tensor, steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    aligned = _alike(logits, grads, logits, exp_avg, exp_avg_sq)
    if aligned is None or not _uniform(weights, FLOATS):
        raise Unsupported
    dense = in_orders(weights, known(logits)[1])
    _OPS.mask_adam.default(
        logits, dense, aligned, exp_avg, exp_avg_sq, *_fp32(draw), penalty_scale.float(), steps.contiguous(), lr,
        beta1, beta2, eps, weight_decay, decoupled,
    )  # fmt: skip


def coded_adam(
    logits: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList, exp_avg_scale: TensorList,
    exp_avg_sq_scale: TensorList, rng_state: Tensor, layers: Sequence[int], steps: Tensor, lr: Tensor, beta1: float,
    beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    _OPS.coded_adam.default(
        logits, grads, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, rng_state, layers, steps.contiguous(), lr,
        beta1, beta2, eps, weight_decay, decoupled,
    )  # fmt: skip


def _straight(rows: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, parts: Sequence[int], y: Tensor) -> None:
    """y[begin:end] = rows[begin:end] (W * bits[domain])^T + bias for every (domain, begin, end) of the flat `parts`."""
    shift = None if bias is None else bias.float().contiguous()
    _OPS.linear_packed.default(rows.contiguous(), weight.contiguous(), bits, shift, parts, y)


def linear_packed(
    problem: Problem, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    y = torch.empty((problem.m, weight.shape[0]), dtype=torch.float32)
    if problem.m:
        _straight(rows_of(x), weight, bits.contiguous().unsqueeze(0), bias, [0, 0, problem.m], y)
    return activated(y.view(*x.shape[:-1], weight.shape[0]), activation)


def linear_kept(
    problem: Problem, x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    n, k = problem.n, problem.k
    pairs = x.dtype == values.dtype == torch.bfloat16
    rows, step = (rows_of(x), 32) if pairs else (rows_of(x).float(), 16)
    if k % step:
        rows = F.pad(rows, (0, -k % step))
    y = torch.empty((problem.m, n), dtype=torch.float32)
    shift = None if bias is None else bias.float().contiguous()
    _OPS.linear_kept.default(
        rows.contiguous(), values.contiguous(), row_starts.contiguous(), bits.contiguous(), shift, k, y
    )
    return y.to(x.dtype).view(*x.shape[:-1], n)


def bank_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int) -> Tensor:
    rows = rows_of(x)
    y = x.new_empty((rows.shape[0], weight.shape[0]))
    few, many = _few_and_many(rows, weight, offsets, samples)
    if few:
        _straight(rows, weight, bits, bias, few, y)
    if many:
        multiply_by_blocks(y, rows, weight, bits, bias, many)
    return y.view(*x.shape[:-1], weight.shape[0])


def _few_and_many(
    rows: Tensor, weight: Tensor, offsets: Tensor, samples: int
) -> tuple[list[int], list[tuple[int, slice]]]:
    """Domains with so few rows that bits are read for them, as (domain, begin, end), flat; and the others."""
    few: list[int] = []
    many = []
    reads = functools.cache(lambda count: one_pass(cpu_problem("linear_packed", rows, weight, count)))
    for domain, part in segments(offsets, rows.shape[0], samples):
        if reads(part.stop - part.start):
            few += [domain, part.start, part.stop]
        else:
            many.append((domain, part))
    return few, many


def bank_linear_union(
    x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None, offsets: Tensor, samples: int
) -> Tensor:
    rows, n = rows_of(x), row_starts.shape[0] - 1
    if values.dtype != torch.float32:
        raise Unsupported
    y = x.new_empty((rows.shape[0], n))
    few, many = _few_and_many(rows, weight_like(values, row_starts, x.shape[-1]), offsets, samples)
    if few:
        shift = None if bias is None else bias.float().contiguous()
        _OPS.linear_union.default(rows.contiguous(), values.contiguous(), row_starts.contiguous(), bits, shift, few, y)
    if many:
        weight = expand_values(values, joined(bits), (n, x.shape[-1]))
        multiply_by_blocks(y, rows, weight, bits, bias, many)
    return y.view(*x.shape[:-1], n)


def random_words(numel: int, rng_state: Tensor, layer: int, step_offset: int = 0, first: int = 0) -> Tensor:
    """Words of elements [first, first + numel) by the noise contract, int64 (numel,); for tests and `doctor`."""
    words = torch.empty(numel, dtype=torch.int32)
    _OPS.random_words.default(words, first, layer, rng_state, step_offset)
    return words.to(torch.int64) & 0xFFFFFFFF
