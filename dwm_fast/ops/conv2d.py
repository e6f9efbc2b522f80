"""conv2d: convolution under a mask that is sampled (`conv2d`) or read from packed bits (`conv2d_packed`).

As in `linear`, the backward passes are operations of their own and differentiable no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.autocast import autocast_operands
from dwm_fast.ops.bits import apply as apply_bits
from dwm_fast.ops.bits import check_length
from dwm_fast.ops.linear import chain_rule, mask_grad_fake, masked_weight
from dwm_fast.ops.registration import define, refuse_double_backward
from dwm_fast.ops.sample import check_noise


def conv2d_reference(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, rng_state: Tensor, tau: Tensor,
    layer: int, threshold: float, mode: int, step_offset: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    masked = masked_weight(weight, logits, rng_state, tau, layer, threshold, mode, step_offset, x.dtype)
    return F.conv2d(x, masked, bias, list(stride), list(padding), list(dilation), groups)


def conv2d_packed_reference(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    masked = apply_bits(bits, [weight])[0].to(x.dtype)
    return F.conv2d(x, masked, bias, list(stride), list(padding), list(dilation), groups)


def conv2d_input_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, rng_state: Tensor, tau: Tensor, layer: int,
    threshold: float, mode: int, step_offset: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    masked = masked_weight(weight, logits, rng_state, tau, layer, threshold, mode, step_offset, x.dtype)
    return _input_gradient(grad, x, masked, stride, padding, dilation, groups)


def conv2d_mask_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, rng_state: Tensor, tau: Tensor, layer: int,
    threshold: float, mode: int, step_offset: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, need_logits: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dense = _weight_gradient(grad, x, weight, stride, padding, dilation, groups)
    rule = (rng_state, tau, layer, threshold, mode, step_offset)
    return chain_rule(dense, weight, logits, *rule, need_logits, need_weight)


def conv2d_packed_input_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    masked = apply_bits(bits, [weight])[0].to(x.dtype)
    return _input_gradient(grad, x, masked, stride, padding, dilation, groups)


def conv2d_packed_weight_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    dense = _weight_gradient(grad, x, weight, stride, padding, dilation, groups)
    return apply_bits(bits, [torch.empty_like(weight).copy_(dense)])[0]


def _input_gradient(grad: Tensor, x: Tensor, masked: Tensor, *geometry: Any) -> Tensor:
    """With the strides of torch.empty_like(x)."""
    stride, padding, dilation, groups = geometry
    dx, _, _ = torch.ops.aten.convolution_backward(
        grad, x, masked, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )
    like = torch.empty_like(x)
    result: Tensor = dx if dx.stride() == like.stride() else like.copy_(dx)
    return result


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """Gradient of the masked weight; `weight` gives its shape and memory format."""
    stride, padding, dilation, groups = geometry
    _, dense, _ = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    result: Tensor = dense
    return result


_NAMES = ("conv2d", "conv2d_input_grad", "conv2d_mask_grad")
_PACKED_NAMES = ("conv2d_packed", "conv2d_packed_input_grad", "conv2d_packed_weight_grad")


def _shape_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight.to(x.dtype), bias, list(stride), list(padding), list(dilation), groups)


_RULE = "Tensor rng_state, Tensor tau, int layer, float threshold, int mode, int step_offset"
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"

define(
    f"conv2d(Tensor x, Tensor weight, Tensor logits, Tensor? bias, {_RULE}, {_GEOMETRY}) -> Tensor",
    reference=conv2d_reference,
    fake=lambda x, weight, logits, bias, rng_state, tau, layer, threshold, mode, step_offset, *geometry: _shape_fake(
        x, weight, bias, *geometry
    ),
)
define(
    f"conv2d_input_grad(Tensor grad, Tensor x, Tensor weight, Tensor logits, {_RULE}, {_GEOMETRY}) -> Tensor",
    reference=conv2d_input_grad_reference,
    fake=lambda grad, x, *_: torch.empty_like(x),
)
define(
    f"conv2d_mask_grad(Tensor grad, Tensor x, Tensor weight, Tensor logits, {_RULE}, {_GEOMETRY}, bool need_logits, "
    "bool need_weight) -> (Tensor, Tensor)",
    reference=conv2d_mask_grad_reference,
    fake=mask_grad_fake,
)
define(
    f"conv2d_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias, {_GEOMETRY}) -> Tensor",
    reference=conv2d_packed_reference,
    fake=lambda x, weight, bits, bias, *geometry: _shape_fake(x, weight, bias, *geometry),
)
define(
    f"conv2d_packed_input_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, {_GEOMETRY}) -> Tensor",
    reference=conv2d_packed_input_grad_reference,
    fake=lambda grad, x, *_: torch.empty_like(x),
)
define(
    f"conv2d_packed_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, {_GEOMETRY}) -> Tensor",
    reference=conv2d_packed_weight_grad_reference,
    fake=lambda grad, x, weight, *_: torch.empty_like(weight),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, logits, bias, rng_state, tau, layer, threshold, mode, step_offset, *ctx.geometry = inputs
    ctx.arguments = (layer, threshold, mode, step_offset)
    ctx.save_for_backward(x, weight, logits, rng_state, tau)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, logits, rng_state, tau = ctx.saved_tensors
    need_x, need_weight, need_logits, need_bias, *_ = ctx.needs_input_grad
    arguments = (grad, x, weight, logits, rng_state, tau, *ctx.arguments, *ctx.geometry)
    dx = torch.ops.dwm_fast.conv2d_input_grad(*arguments) if need_x else None
    dw = dl = None
    if need_weight or need_logits:
        dl, dw = torch.ops.dwm_fast.conv2d_mask_grad(*arguments, need_logits, need_weight)
    db = grad.sum((0, 2, 3)) if ctx.has_bias and need_bias else None
    return dx, dw if need_weight else None, dl if need_logits else None, db, *([None] * 10)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, bits)
    ctx.has_bias = bias is not None


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bits = ctx.saved_tensors
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    arguments = (grad, x, weight, bits, *ctx.geometry)
    dx = torch.ops.dwm_fast.conv2d_packed_input_grad(*arguments) if need_x else None
    dw = torch.ops.dwm_fast.conv2d_packed_weight_grad(*arguments) if need_weight else None
    db = grad.sum((0, 2, 3)) if ctx.has_bias and need_bias else None
    return dx, dw, None, db, *([None] * 4)


torch.library.register_autograd("dwm_fast::conv2d", _backward, setup_context=_setup_context)
torch.library.register_autograd("dwm_fast::conv2d_packed", _packed_backward, setup_context=_packed_setup_context)
for _name in (*_NAMES[1:], *_PACKED_NAMES[1:]):
    refuse_double_backward(_name)


class Padding(Protocol):
    """What nn.Conv2d knows about its padding."""

    _reversed_padding_repeated_twice: list[int]

    @property
    def padding_mode(self) -> str: ...


def padded(x: Tensor, layer: Padding) -> tuple[Tensor, tuple[int, int]]:
    """The input of a Conv2d, padded where zeros alike on both sides are not enough, and the padding left to do."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    zeros = layer.padding_mode == "zeros"
    if zeros and left == right and top == bottom:
        return x, (top, left)
    mode = "constant" if zeros else layer.padding_mode
    return F.pad(x, [left, right, top, bottom], mode=mode), (0, 0)


def _check(x: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    if x.dim() != 4:
        raise InputError(f"x has shape {tuple(x.shape)}; expected (batch, channels, rows, columns)")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise InputError(f"{name} is {tuple(values)}; expected two numbers (rows, columns) of at least {least}")


def conv2d(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, rng_state: Tensor, tau: Tensor, *,
    layer: int = 0, threshold: float = 0.0, mode: int = 0, step_offset: int = 0,
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Masked convolution with the mask drawn by the operation itself.

    Args:
        x: (B, C, H, W), NCHW or channels_last; its dtype is the compute dtype (autocast's, where that is on).
        weight: (O, C / groups, KH, KW); logits: the same shape, fp32; bias: (O,) or None.
        rng_state, tau, layer, threshold, mode, step_offset: see `dwm_fast.ops.sample`.
        stride, padding, dilation: two numbers each (rows, columns).

    Returns:
        (B, O, H', W') in the compute dtype; differentiable once in x, weight, logits and bias.
    """
    check_noise(rng_state, tau)
    _check(x, stride, padding, dilation)
    x, bias = autocast_operands(x, bias)
    result: Tensor = torch.ops.dwm_fast.conv2d(
        x, weight, logits, bias, rng_state, tau, layer, threshold, int(mode), step_offset,
        list(stride), list(padding), list(dilation), groups,
    )  # fmt: skip
    return result


def conv2d_packed(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, *, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution under a packed mask: bits (packed_nbytes(weight.numel()),); the rest as in `conv2d`."""
    check_length(bits, [weight.numel()])
    _check(x, stride, padding, dilation)
    x, bias = autocast_operands(x, bias)
    result: Tensor = torch.ops.dwm_fast.conv2d_packed(
        x, weight, bits, bias, list(stride), list(padding), list(dilation), groups
    )
    return result
