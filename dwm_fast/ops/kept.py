"""linear_kept: y = x (W * m)^T + b from the kept weights alone, in logical order beside the bits.

Kept storage of a weight (N, K) is three tensors: `bits`, as everywhere; `values`, the kept weights in logical order,
in any floating dtype, then PADDING zeros that loads may reach into; `row_starts`, int64 (N + 1,), the number of kept
weights before each row. What lies under a dropped bit is not there: no NaN can come from it.

The reference is the staged way: the masked weight is put together, then torch's product. The weights are frozen: no
gradient reaches `values`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.autocast import autocast_operands
from dwm_fast.ops.bits import unpack
from dwm_fast.ops.packing import check_length
from dwm_fast.ops.problem import rows_of
from dwm_fast.ops.registration import call, define, refuse_double_backward
from dwm_fast.ops.transforms import transformed
from dwm_fast.ops.ways import LARGE_WEIGHT

PADDING = 32
"""Zeros behind the values: 64 bytes in a 16-bit dtype, so that a change of dtype never leaves fewer."""


KEPT_SHARE = 0.5
"""Share of kept weights up to which a CPU is faster by them than by the dense weight."""


def is_faster_kept(weight: Tensor, kept: int) -> bool:
    """Whether a linear layer on few rows is faster by the `kept` weights of `weight` than by all of them.

    On a CPU, in fp32 or bf16, where the weight is too large for a cache: there reading it is what few rows cost.
    """
    large = weight.device.type == "cpu" and weight.dim() == 2 and weight.numel() >= LARGE_WEIGHT
    return large and weight.dtype in (torch.float32, torch.bfloat16) and kept <= KEPT_SHARE * weight.numel()


def keep_values(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Values and row starts of a weight under packed bits.

    Args:
        weight: (N, ...), any floating dtype; a row is all that belongs to one index of the first dimension.
        bits: uint8 (packed_nbytes(weight.numel()),), LSB first, in the weight's logical order.

    Returns:
        values (kept + 32,), the last 32 of them zero, and row_starts, int64 (N + 1,).

    Raises:
        InputError: bits of another length or dtype.
    """
    check_length(bits, [weight.numel()])
    mask = unpack(bits, [weight.numel()])[0].view(weight.shape)
    values = F.pad(weight.detach()[mask], (0, PADDING))
    counts = mask.reshape(weight.shape[0], math.prod(weight.shape[1:])).sum(1)
    return values, F.pad(counts.cumsum(0), (1, 0))


def expand_values(values: Tensor, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The masked weight of `shape` from kept storage: exactly W under the bits, +0 elsewhere."""
    return _expanded(values, bits, math.prod(shape)).view(shape)


def _expanded(values: Tensor, bits: Tensor, numel: int) -> Tensor:
    mask: Tensor = torch.ops.dwm_fast.unpack(bits, [numel])[0]
    return values.new_zeros(numel).masked_scatter(mask, values)


def linear_kept_reference(x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    n, k = row_starts.shape[0] - 1, x.shape[-1]
    return F.linear(x, _expanded(values, bits, n * k).view(n, k).to(x.dtype), bias)


def linear_kept_input_grad_reference(grad: Tensor, values: Tensor, bits: Tensor, k: int) -> Tensor:
    n = grad.shape[-1]
    return grad @ _expanded(values, bits, n * k).view(n, k).to(grad.dtype)


def weight_like(values: Tensor, row_starts: Tensor, k: int) -> Tensor:
    """A tensor of the weight's shape, dtype and device, as the rule of ways looks at it; one element in memory."""
    return values[:1].expand(row_starts.shape[0] - 1, k)


define(
    "linear_kept(Tensor x, Tensor values, Tensor row_starts, Tensor bits, Tensor? bias) -> Tensor",
    reference=linear_kept_reference,
    operands=lambda x, values, row_starts, *_: (x, weight_like(values, row_starts, x.shape[-1])),
    fake=lambda x, values, row_starts, bits, bias: x.new_empty((*x.shape[:-1], row_starts.shape[0] - 1)),
)
define(
    "linear_kept_input_grad(Tensor grad, Tensor values, Tensor bits, SymInt k) -> Tensor",
    reference=linear_kept_input_grad_reference,
    fake=lambda grad, values, bits, k: grad.new_empty((*grad.shape[:-1], k)),
    one_backend=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, bits, bias = inputs
    ctx.save_for_backward(values, bits)
    ctx.width, ctx.has_bias = x.shape[-1], bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, bits = ctx.saved_tensors
    need_x, need_values, _, _, need_bias = ctx.needs_input_grad
    if need_values:
        raise InputError("linear_kept has no gradient for its values: kept weights are frozen; merge the layer first")
    dx = torch.ops.dwm_fast.linear_kept_input_grad(grad, values, bits, ctx.width) if need_x else None
    return dx, None, None, None, rows_of(grad).sum(0) if ctx.has_bias and need_bias else None


torch.library.register_autograd("dwm_fast::linear_kept", _backward, setup_context=_setup_context)
refuse_double_backward("linear_kept_input_grad")


def linear_kept(
    x: Tensor, values: Tensor, row_starts: Tensor, bits: Tensor, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Linear map by the kept weights of a masked matrix.

    Args:
        x: (..., K); its dtype is that of the result (autocast's, where that is on).
        values, row_starts: kept storage of a weight (N, K), from `keep_values`.
        bits: uint8 (packed_nbytes(N * K),), LSB first, in the weight's logical order.
        bias: (N,) or None.

    Returns:
        (..., N); differentiable once in x and bias.

    Raises:
        InputError: tensors of another form or length.
    """
    if row_starts.dtype != torch.int64 or row_starts.dim() != 1 or not row_starts.shape[0]:
        raise InputError(f"row_starts: given {row_starts.dtype} of shape {tuple(row_starts.shape)}, expected int64 "
                         "(N + 1,); make it with dwm_fast.ops.keep_values")  # fmt: skip
    if not values.is_floating_point() or values.dim() != 1 or values.shape[0] < PADDING:
        raise InputError(f"values: given {values.dtype} of shape {tuple(values.shape)}, expected a floating dtype of "
                         f"shape (kept + {PADDING},); make it with dwm_fast.ops.keep_values")  # fmt: skip
    check_length(bits, [(row_starts.shape[0] - 1) * x.shape[-1]])
    x, bias = autocast_operands(x, bias)
    if transformed():
        return linear_kept_reference(x, values, row_starts, bits, bias)
    needed = (x, values) if bias is None else (x, values, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in needed):
        result: Tensor = torch.ops.dwm_fast.linear_kept(x, values, row_starts, bits, bias)
    else:
        result = call("linear_kept", x, values, row_starts, bits, bias)
    return result
