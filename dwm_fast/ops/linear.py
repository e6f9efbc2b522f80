"""linear: y = x (W * m)^T + b with the mask sampled (`linear`) or read from packed bits (`linear_packed`)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.ops import _backends
from dwm_fast.ops._library import autocast_operands, define
from dwm_fast.ops.bits import apply as apply_bits
from dwm_fast.ops.bits import check_length
from dwm_fast.ops.sample import check_noise


def linear_reference(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, rng_state: Tensor, tau: Tensor,
    layer: int, threshold: float, mode: int, step_offset: int,
) -> Tensor:  # fmt: skip
    masked, _, _ = torch.ops.dwm_fast.sample(
        [logits], [weight], rng_state, tau, [layer], [threshold], mode, step_offset, x.dtype, False
    )
    return F.linear(x, masked[0], bias)


def linear_packed_reference(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, apply_bits(bits, [weight])[0].to(x.dtype), bias)


_backends.register("linear", "reference", f"{__name__}:linear_reference")
_backends.register("linear_packed", "reference", f"{__name__}:linear_packed_reference")


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "linear(Tensor x, Tensor weight, Tensor logits, Tensor? bias, Tensor rng_state, Tensor tau, int layer, "
    "float threshold, int mode, int step_offset) -> Tensor",
    fake=_linear_fake,
    device_of=lambda a: a[0],
)
define(
    "linear_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias) -> Tensor",
    fake=_linear_fake,
    device_of=lambda a: a[0],
)


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as a matrix (rows, K), whatever is empty."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, logits, bias, rng_state, tau, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight, logits, rng_state, tau)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, logits, rng_state, tau = ctx.saved_tensors
    layer, threshold, mode, step_offset = ctx.arguments
    need_x, need_weight, need_logits, need_bias, *_ = ctx.needs_input_grad
    rows = _rows(grad)
    dx = dw = dl = None
    if need_x:
        masked, _, _ = torch.ops.dwm_fast.sample(
            [logits], [weight], rng_state, tau, [layer], [threshold], mode, step_offset, grad.dtype, False
        )
        dx = grad @ masked[0]
    if need_weight or need_logits:
        dense = rows.t() @ _rows(x)
        zero = torch.zeros((), device=grad.device)
        dlogits, dweights = torch.ops.dwm_fast.sample_backward(
            [dense], zero, [logits], [weight], rng_state, tau, [layer], [threshold], mode, step_offset,
            need_logits, need_weight,
        )  # fmt: skip
        dl = dlogits[0] if need_logits else None
        dw = dweights[0] if need_weight else None
    db = rows.sum(0) if ctx.has_bias and need_bias else None
    return dx, dw, dl, db, *([None] * 6)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias = inputs
    ctx.save_for_backward(weight, bits, *([x] if weight.requires_grad else []))
    ctx.has_bias = bias is not None


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, bits, *saved = ctx.saved_tensors
    need_x, need_weight, _, need_bias = ctx.needs_input_grad
    rows = _rows(grad)
    dx = grad @ apply_bits(bits, [weight])[0].to(grad.dtype) if need_x else None
    dw = None
    if need_weight:
        dense = rows.t() @ _rows(saved[0])
        dw = apply_bits(bits, [dense.to(weight.dtype)])[0]
    return dx, dw, None, rows.sum(0) if ctx.has_bias and need_bias else None


torch.library.register_autograd("dwm_fast::linear", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "dwm_fast::linear_packed", _packed_backward, setup_context=_packed_setup_context
)


def linear(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, rng_state: Tensor, tau: Tensor, *,
    layer: int = 0, threshold: float = 0.0, mode: int = 0, step_offset: int = 0,
) -> Tensor:  # fmt: skip
    """Masked linear map with the mask drawn by the operation itself.

    Args:
        x: (..., K); its dtype is the compute dtype (autocast's, where that is on).
        weight: (N, K); logits: (N, K) fp32; bias: (N,) or None.
        rng_state, tau, layer, threshold, mode, step_offset: see `dwm_fast.ops.sample`.

    Returns:
        (..., N) in the compute dtype; differentiable once in x, weight, logits and bias.
    """
    check_noise(rng_state, tau)
    x, bias = autocast_operands(x, bias)
    result: Tensor = torch.ops.dwm_fast.linear(
        x, weight, logits, bias, rng_state, tau, layer, threshold, int(mode), step_offset
    )
    return result


def linear_packed(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear map under a packed mask: x (..., K), weight (N, K), bits (packed_nbytes(N * K),) -> (..., N)."""
    check_length(bits, [weight.numel()])
    x, bias = autocast_operands(x, bias)
    result: Tensor = torch.ops.dwm_fast.linear_packed(x, weight, bits, bias)
    return result
