"""conv2d: convolution under a mask that is sampled (`conv2d`) or read from packed bits (`conv2d_packed`).

As in `linear`: the references are the staged way, backends compute in one pass, and the backward passes are operations
of their own, differentiable no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.ops.autocast import autocast_operands
from dwm_fast.ops.bits import apply as apply_bits
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.geometry import Geometry
from dwm_fast.ops.linear import chain_rule, kept_weight, mask_grad_fake, masked_weight
from dwm_fast.ops.packing import check_length
from dwm_fast.ops.registration import define, refuse_double_backward
from dwm_fast.ops.sample import check_noise
from dwm_fast.ops.transforms import plainly_masked, transformed


def conv2d_reference(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, draw: Draw, geometry: Geometry
) -> Tensor:
    return F.conv2d(x, masked_weight(weight, logits, draw, x.dtype), bias, *geometry.flat())


def conv2d_packed_reference(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return F.conv2d(x, kept_weight(weight, bits, x.dtype), bias, *geometry.flat())


def conv2d_input_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, geometry: Geometry
) -> Tensor:
    return _input_gradient(grad, x, masked_weight(weight, logits, draw, x.dtype), geometry)


def conv2d_mask_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, geometry: Geometry, need_logits: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return chain_rule(_weight_gradient(grad, x, weight, geometry), weight, logits, draw, need_logits, need_weight)


def conv2d_packed_input_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, geometry: Geometry
) -> Tensor:
    return _input_gradient(grad, x, kept_weight(weight, bits, x.dtype), geometry)


def conv2d_packed_weight_grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, geometry: Geometry
) -> Tensor:
    dense = _weight_gradient(grad, x, weight, geometry)
    return apply_bits(bits, [torch.empty_like(weight).copy_(dense)])[0]


def _input_gradient(grad: Tensor, x: Tensor, masked: Tensor, geometry: Geometry) -> Tensor:
    """With the strides of torch.empty_like(x)."""
    *pairs, groups = geometry.flat()
    dx, _, _ = torch.ops.aten.convolution_backward(
        grad, x, masked, None, *pairs, False, [0, 0], groups, [True, False, False]
    )
    like = torch.empty_like(x)
    result: Tensor = dx if dx.stride() == like.stride() else like.copy_(dx)
    return result


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of the masked weight; `weight` gives its shape and memory format."""
    *pairs, groups = geometry.flat()
    _, dense, _ = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, *pairs, False, [0, 0], groups, [False, True, False]
    )
    result: Tensor = dense
    return result


_NAMES = ("conv2d", "conv2d_input_grad", "conv2d_mask_grad")
_PACKED_NAMES = ("conv2d_packed", "conv2d_packed_input_grad", "conv2d_packed_weight_grad")


def _shape_fake(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), bias, *how[-1].flat())


_HOW = f"{Draw.SCHEMA_OF_ONE}, {Geometry.SCHEMA}"

define(
    f"conv2d(Tensor x, Tensor weight, Tensor logits, Tensor? bias, {_HOW}) -> Tensor",
    reference=conv2d_reference,
    operands=lambda x, weight, logits, bias, draw, geometry: (x, weight, logits, geometry),
    fake=_shape_fake,
)
define(
    f"conv2d_input_grad(Tensor grad, Tensor x, Tensor weight, Tensor logits, {_HOW}) -> Tensor",
    reference=conv2d_input_grad_reference,
    operands=lambda grad, x, weight, logits, draw, geometry: (x, weight, logits, geometry),
    fake=lambda grad, x, *_: torch.empty_like(x),
)
define(
    f"conv2d_mask_grad(Tensor grad, Tensor x, Tensor weight, Tensor logits, {_HOW}, bool need_logits, "
    "bool need_weight) -> (Tensor, Tensor)",
    reference=conv2d_mask_grad_reference,
    operands=lambda grad, x, weight, logits, draw, geometry, *_: (x, weight, logits, geometry),
    fake=mask_grad_fake,
)
define(
    f"conv2d_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias, {Geometry.SCHEMA}) -> Tensor",
    reference=conv2d_packed_reference,
    operands=lambda x, weight, bits, bias, geometry: (x, weight, None, geometry),
    fake=_shape_fake,
)
define(
    f"conv2d_packed_input_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, {Geometry.SCHEMA}) -> Tensor",
    reference=conv2d_packed_input_grad_reference,
    operands=lambda grad, x, weight, bits, geometry: (x, weight, None, geometry),
    fake=lambda grad, x, *_: torch.empty_like(x),
)
define(
    f"conv2d_packed_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, {Geometry.SCHEMA}) -> Tensor",
    reference=conv2d_packed_weight_grad_reference,
    operands=lambda grad, x, weight, bits, geometry: (x, weight, None, geometry),
    fake=lambda grad, x, weight, *_: torch.empty_like(weight),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, logits, bias, rng_state, tau, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight, logits, rng_state, tau)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_x, need_weight, need_logits, need_bias, *_ = ctx.needs_input_grad
    arguments = (grad, *ctx.saved_tensors, *ctx.numbers)
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
    geometry = Geometry(stride, padding, dilation, groups)
    geometry.check(x)
    x, bias = autocast_operands(x, bias)
    result: Tensor = torch.ops.dwm_fast.conv2d(
        x, weight, logits, bias, rng_state, tau, layer, threshold, int(mode), step_offset, *geometry.flat()
    )
    return result


def conv2d_packed(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, *, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolution under a packed mask: bits (packed_nbytes(weight.numel()),); the rest as in `conv2d`."""
    check_length(bits, [weight.numel()])
    geometry = Geometry(stride, padding, dilation, groups)
    geometry.check(x)
    x, bias = autocast_operands(x, bias)
    if transformed():
        return F.conv2d(x, plainly_masked(weight, bits, x.dtype), bias, *geometry.flat())
    result: Tensor = torch.ops.dwm_fast.conv2d_packed(x, weight, bits, bias, *geometry.flat())
    return result
