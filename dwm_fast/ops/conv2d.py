"""conv2d: convolution under a mask that is sampled (`conv2d`) or read from packed bits (`conv2d_packed`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops import _backends
from dwm_fast.ops._library import autocast_operands, define
from dwm_fast.ops.bits import apply as apply_bits
from dwm_fast.ops.bits import check_length
from dwm_fast.ops.sample import check_noise


def conv2d_reference(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, rng_state: Tensor, tau: Tensor,
    layer: int, threshold: float, mode: int, step_offset: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    masked, _, _ = torch.ops.dwm_fast.sample(
        [logits], [weight], rng_state, tau, [layer], [threshold], mode, step_offset, x.dtype, False
    )
    return F.conv2d(x, masked[0], bias, list(stride), list(padding), list(dilation), groups)


def conv2d_packed_reference(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    masked = apply_bits(bits, [weight])[0].to(x.dtype)
    return F.conv2d(x, masked, bias, list(stride), list(padding), list(dilation), groups)


_backends.register("conv2d", "reference", f"{__name__}:conv2d_reference")
_backends.register("conv2d_packed", "reference", f"{__name__}:conv2d_packed_reference")


def _shape_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight.to(x.dtype), bias, list(stride), list(padding), list(dilation), groups)


define(
    "conv2d(Tensor x, Tensor weight, Tensor logits, Tensor? bias, Tensor rng_state, Tensor tau, int layer, "
    "float threshold, int mode, int step_offset, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups) -> Tensor",
    fake=lambda x, weight, logits, bias, rng_state, tau, layer, threshold, mode, step_offset, *geometry: (
        _shape_fake(x, weight, bias, *geometry)
    ),
    device_of=lambda a: a[0],
)
define(
    "conv2d_packed(Tensor x, Tensor weight, Tensor bits, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups) -> Tensor",
    fake=lambda x, weight, bits, bias, *geometry: _shape_fake(x, weight, bias, *geometry),
    device_of=lambda a: a[0],
)


def _convolution_gradients(
    ctx: Any, grad: Tensor, x: Tensor, masked: Tensor, need_x: bool, need_masked: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = ctx.geometry
    bias_sizes = [masked.shape[0]] if ctx.has_bias else None
    output_mask = [need_x, need_masked, need_bias and ctx.has_bias]
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, masked, bias_sizes, stride, padding, dilation, False, [0, 0], groups, output_mask
    )
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, logits, bias, rng_state, tau, layer, threshold, mode, step_offset, *ctx.geometry = inputs
    ctx.arguments = (layer, threshold, mode, step_offset)
    ctx.save_for_backward(x, weight, logits, rng_state, tau)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, logits, rng_state, tau = ctx.saved_tensors
    layer, threshold, mode, step_offset = ctx.arguments
    need_x, need_weight, need_logits, need_bias, *_ = ctx.needs_input_grad
    masked, _, _ = torch.ops.dwm_fast.sample(
        [logits], [weight], rng_state, tau, [layer], [threshold], mode, step_offset, x.dtype, False
    )
    dx, dense, db = _convolution_gradients(
        ctx, grad, x, masked[0], need_x, need_weight or need_logits, need_bias
    )
    dw = dl = None
    if dense is not None and (need_weight or need_logits):
        zero = torch.zeros((), device=grad.device)
        dlogits, dweights = torch.ops.dwm_fast.sample_backward(
            [dense], zero, [logits], [weight], rng_state, tau, [layer], [threshold], mode, step_offset,
            need_logits, need_weight,
        )  # fmt: skip
        dl = dlogits[0] if need_logits else None
        dw = dweights[0] if need_weight else None
    return dx, dw, dl, db, *([None] * 10)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, bits)
    ctx.has_bias = bias is not None


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bits = ctx.saved_tensors
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    masked = apply_bits(bits, [weight])[0].to(x.dtype)
    dx, dense, db = _convolution_gradients(ctx, grad, x, masked, need_x, need_weight, need_bias)
    dw = apply_bits(bits, [dense.to(weight.dtype)])[0] if need_weight and dense is not None else None
    return dx, dw, None, db, *([None] * 4)


torch.library.register_autograd("dwm_fast::conv2d", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "dwm_fast::conv2d_packed", _packed_backward, setup_context=_packed_setup_context
)


class Padding(Protocol):
    """What nn.Conv2d knows about its padding."""

    padding_mode: str
    _reversed_padding_repeated_twice: list[int]


def padded(x: Tensor, layer: Padding) -> tuple[Tensor, tuple[int, int]]:
    """The input of a Conv2d, padded where zeros alike on both sides are not enough, and the padding left to do."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    zeros = layer.padding_mode == "zeros"
    if zeros and left == right and top == bottom:
        return x, (top, left)
    mode = "constant" if zeros else layer.padding_mode
    return F.pad(x, [left, right, top, bottom], mode=mode), (0, 0)


def _check_images(x: Tensor) -> None:
    if x.dim() != 4:
        raise InputError(f"x has shape {tuple(x.shape)}; expected (batch, channels, rows, columns)")


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
    _check_images(x)
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
    _check_images(x)
    x, bias = autocast_operands(x, bias)
    result: Tensor = torch.ops.dwm_fast.conv2d_packed(
        x, weight, bits, bias, list(stride), list(padding), list(dilation), groups
    )
    return result
