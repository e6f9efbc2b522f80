"""linear: y = x (W * m)^T + b with the mask sampled (`linear`) or read from packed bits (`linear_packed`).

The references are the staged way: the masked weight by `sample` or `apply`, the product by torch. Backends compute in
one pass; `ways` says which. The backward passes are operations of their own, so that each direction has its own way;
they are differentiable no further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.autocast import autocast_operands
from dwm_fast.ops.bits import apply as apply_bits
from dwm_fast.ops.blocks import product_by_blocks
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.packing import check_length
from dwm_fast.ops.problem import ACTIVATIONS, rows_of
from dwm_fast.ops.registration import call, define, refuse_double_backward
from dwm_fast.ops.sample import check_noise
from dwm_fast.ops.transforms import plainly_masked, transformed

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def activated(y: Tensor, activation: str) -> Tensor:
    """An activation by its name in ACTIVATIONS."""
    return _ACTIVATIONS[activation](y)


def masked_weight(weight: Tensor, logits: Tensor, draw: Draw, dtype: torch.dtype) -> Tensor:
    """The masked weight of one layer in `dtype`, by `sample`."""
    masked, _, _ = torch.ops.dwm_fast.sample([logits], [weight], *draw.flat(), dtype, False)
    result: Tensor = masked[0]
    return result


def kept_weight(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight under packed bits in `dtype`, by `apply`."""
    return apply_bits(bits, [weight])[0].to(dtype)


def linear_reference(x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, draw: Draw) -> Tensor:
    return F.linear(x, masked_weight(weight, logits, draw, x.dtype), bias)


def linear_input_grad_reference(grad: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
    return grad @ masked_weight(weight, logits, draw, grad.dtype)


def linear_mask_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, need_logits: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return chain_rule(rows_of(grad).t() @ rows_of(x), weight, logits, draw, need_logits, need_weight)


def chain_rule(
    dense: Tensor, weight: Tensor, logits: Tensor, draw: Draw, need_logits: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of one layer's logits and weight from that of its masked weight; empty where not needed."""
    zero = torch.zeros((), device=dense.device)
    dlogits, dweights = torch.ops.dwm_fast.sample_backward(
        [dense], zero, [logits], [weight], *draw.flat(), need_logits, need_weight
    )
    return (
        dlogits[0] if need_logits else logits.new_empty(0),
        dweights[0] if need_weight else weight.new_empty(0),
    )


def linear_packed_reference(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activated(product_by_blocks(x, weight, bits.contiguous().unsqueeze(0), bias), activation)


def linear_packed_input_grad_reference(grad: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    return grad @ kept_weight(weight, bits, grad.dtype)


def linear_packed_weight_grad_reference(grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    dense = torch.empty_like(weight).copy_(rows_of(grad).t() @ rows_of(x))
    return apply_bits(bits, [dense])[0]


_NAMES = ("linear", "linear_input_grad", "linear_mask_grad")
_PACKED_NAMES = ("linear_packed", "linear_packed_input_grad", "linear_packed_weight_grad")


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _input_grad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def mask_grad_fake(grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Shapes of a gradient of logits and weight, of linear maps and convolutions alike."""
    need_logits, need_weight = (flag for flag in rest if isinstance(flag, bool))
    return (
        torch.empty_like(logits) if need_logits else logits.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


define(
    f"linear(Tensor x, Tensor weight, Tensor logits, Tensor? bias, {Draw.SCHEMA_OF_ONE}) -> Tensor",
    reference=linear_reference,
    operands=lambda x, weight, logits, *_: (x, weight, logits),
    fake=_linear_fake,
)
define(
    f"linear_input_grad(Tensor grad, Tensor weight, Tensor logits, {Draw.SCHEMA_OF_ONE}) -> Tensor",
    reference=linear_input_grad_reference,
    operands=lambda grad, weight, logits, *_: (grad, weight, logits),
    fake=_input_grad_fake,
)
define(
    f"linear_mask_grad(Tensor grad, Tensor x, Tensor weight, Tensor logits, {Draw.SCHEMA_OF_ONE}, bool need_logits, "
    "bool need_weight) -> (Tensor, Tensor)",
    reference=linear_mask_grad_reference,
    operands=lambda grad, x, weight, logits, *_: (x, weight, logits),
    fake=mask_grad_fake,
)
define(
    "linear_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias, str activation) -> Tensor",
    reference=linear_packed_reference,
    operands=lambda x, weight, *_: (x, weight),
    fake=_linear_fake,
)
define(
    "linear_packed_input_grad(Tensor grad, Tensor weight, Tensor bits) -> Tensor",
    reference=linear_packed_input_grad_reference,
    operands=lambda grad, weight, *_: (grad, weight),
    fake=_input_grad_fake,
)
define(
    "linear_packed_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits) -> Tensor",
    reference=linear_packed_weight_grad_reference,
    operands=lambda grad, x, weight, *_: (x, weight),
    fake=lambda grad, x, weight, bits: torch.empty_like(weight),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, logits, bias, rng_state, tau, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight, logits, rng_state, tau)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, logits, rng_state, tau = ctx.saved_tensors
    need_x, need_weight, need_logits, need_bias, *_ = ctx.needs_input_grad
    rule = (rng_state, tau, *ctx.arguments)
    dx = dw = dl = None
    if need_x:
        dx = torch.ops.dwm_fast.linear_input_grad(grad, weight, logits, *rule)
    if need_weight or need_logits:
        dl, dw = torch.ops.dwm_fast.linear_mask_grad(grad, x, weight, logits, *rule, need_logits, need_weight)
    db = rows_of(grad).sum(0) if ctx.has_bias and need_bias else None
    return dx, dw if need_weight else None, dl if need_logits else None, db, *([None] * 6)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias, ctx.activation = inputs
    ctx.save_for_backward(weight, bits, *([x] if weight.requires_grad else []))
    ctx.has_bias = bias is not None


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.activation != "none":
        raise InputError(
            f"torch.ops.dwm_fast.linear_packed has no gradient with activation='{ctx.activation}'; call "
            "dwm_fast.ops.linear_packed, which applies it apart where a gradient is wanted"
        )
    weight, bits, *saved = ctx.saved_tensors
    need_x, need_weight, _, need_bias, _ = ctx.needs_input_grad
    dx = torch.ops.dwm_fast.linear_packed_input_grad(grad, weight, bits) if need_x else None
    dw = torch.ops.dwm_fast.linear_packed_weight_grad(grad, saved[0], weight, bits) if need_weight else None
    return dx, dw, None, rows_of(grad).sum(0) if ctx.has_bias and need_bias else None, None


torch.library.register_autograd("dwm_fast::linear", _backward, setup_context=_setup_context)
torch.library.register_autograd("dwm_fast::linear_packed", _packed_backward, setup_context=_packed_setup_context)
for _name in (*_NAMES[1:], *_PACKED_NAMES[1:]):
    refuse_double_backward(_name)


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


def linear_packed(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Linear map under a packed mask, and an activation behind it.

    Args:
        x: (..., K); its dtype is the compute dtype (autocast's, where that is on).
        weight: (N, K); bias: (N,) or None.
        bits: uint8 (packed_nbytes(N * K),), LSB first, in the weight's logical order.
        activation: "none", "relu", "gelu" (by the error function) or "silu".

    Returns:
        (..., N) in the compute dtype; differentiable once in x, weight and bias.

    Raises:
        InputError: bits of another length or dtype, or an unknown activation.
    """
    check_length(bits, [weight.numel()])
    if activation not in ACTIVATIONS:
        raise InputError(f"linear_packed got activation='{activation}'; expected one of {', '.join(ACTIVATIONS)}")
    x, bias = autocast_operands(x, bias)
    if transformed():
        return activated(F.linear(x, plainly_masked(weight, bits, x.dtype), bias), activation)
    needed = (x, weight) if bias is None else (x, weight, bias)
    if activation != "none" and torch.is_grad_enabled() and any(t.requires_grad for t in needed):
        return activated(torch.ops.dwm_fast.linear_packed(x, weight, bits, bias, "none"), activation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in needed):
        result: Tensor = torch.ops.dwm_fast.linear_packed(x, weight, bits, bias, activation)
    else:
        result = call("linear_packed", x, weight, bits, bias, activation)
    return result
