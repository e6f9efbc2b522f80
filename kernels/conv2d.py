"""conv2d and its gradients in Triton: which way, and the launches of `conv`'s kernels.

A 1x1 convolution over channels_last images is a linear map and taken as one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS
from dwm_fast.kernels._product_launch import convolution_tiles, packed_words, precision, whole_index_dtype
from dwm_fast.kernels.conv import conv_mask_gradient_kernel, conv_product_kernel
from dwm_fast.kernels.linear import from_bits, multiply
from dwm_fast.kernels.linear_grad import empty_like, gradients
from dwm_fast.ops.conv2d import (
    conv2d_input_grad_reference,
    conv2d_mask_grad_reference,
    conv2d_packed_input_grad_reference,
    conv2d_packed_reference,
    conv2d_packed_weight_grad_reference,
    conv2d_reference,
)
from dwm_fast.ops.ways import Problem, convolution_tf32, one_pass, problem_on

_MAX_PIXELS = 2**31 - 2**16
"""Pixels are counted in int32."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a convolution does beside its tensors, and the number of its output's pixels, rows and columns."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    rows: int
    columns: int

    @property
    def arguments(self) -> tuple[tuple[int, int], ...]:
        """Stride, padding and dilation, as the kernels take them."""
        return self.stride, self.padding, self.dilation


def _geometry(x: Tensor, weight: Tensor, *given: Any) -> Geometry:
    stride, padding, dilation = (tuple(map(int, pair)) for pair in given[:3])
    sizes = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    return Geometry(stride, padding, dilation, int(given[3]), *sizes)


def _is_linear(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether this is a linear map of pixels that lie in rows: 1x1 over channels_last images."""
    plain = geometry.arguments == ((1, 1), (0, 0), geometry.dilation) and geometry.groups == 1
    return plain and weight.shape[2] * weight.shape[3] == 1 and x.permute(0, 2, 3, 1).is_contiguous()


def _problem(op: str, x: Tensor, weight: Tensor, geometry: Geometry) -> Problem:
    """What the rule of ways decides about; a linear map has a linear map's name."""
    pixels, groups = x.shape[0] * geometry.rows * geometry.columns, geometry.groups
    out, inner, taps = weight.shape[0] // groups, weight.shape[1], weight.shape[2] * weight.shape[3]
    name = op.replace("conv2d", "linear") if _is_linear(x, weight, geometry) else op
    return problem_on(
        name, x.device, x.dtype, weight.dtype, pixels, out, inner * taps, convolution_tf32(), taps, groups
    )


def _chosen(op: str, x: Tensor, weight: Tensor, logits: Tensor | None, *given: Any) -> tuple[Geometry, Problem] | None:
    """Geometry and problem where one pass is taken, else None; a window that does not fit is for torch to refuse."""
    geometry = _geometry(x, weight, *given)
    if min(geometry.rows, geometry.columns) < 1:
        return None
    problem = _problem(op, x, weight, geometry)
    pixels = max(problem.m, x.shape[0] * x.shape[2] * x.shape[3])
    if (logits is not None and logits.dtype != torch.float32) or pixels > _MAX_PIXELS or not one_pass(problem):
        return None
    return geometry, problem


def _rows(images: Tensor) -> Tensor:
    """Images (B, C, H, W) as rows (B * H * W, C), a view where they are channels_last."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _matrix(t: Tensor) -> Tensor:
    """A 1x1 weight or its logits (O, C, 1, 1) as (O, C); packed bits as they are."""
    return t[:, :, 0, 0] if t.dim() == 4 else t


def _output(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A fresh output: channels_last where input or weight are."""
    shapes = [torch.empty_like(t, device="meta") for t in (x, weight)]
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in shapes)
    shape = (x.shape[0], weight.shape[0], geometry.rows, geometry.columns)
    if not last:
        return _tables.empty(shape, dtype=x.dtype, device=x.device)
    b, c, h, w = shape
    return _tables.empty((b, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


def _four(t: Tensor) -> tuple[int, ...]:
    """Strides of a weight-shaped tensor; packed bits have none."""
    return tuple(t.stride()) if t.dim() == 4 else (0, 0, 0, 0)


def _multiply(
    found: tuple[Geometry, Problem], x: Tensor, y: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None,
    noise: tuple[Tensor, Tensor], rule: tuple[int, float, int, int], back: bool,
) -> Tensor:  # fmt: skip
    """y from x under the masked weight; `back`: the gradient of the input from that of the output."""
    geometry, problem = found
    layer, threshold, mode, step_offset = rule
    tiles = convolution_tiles(problem, back)
    out, inner = weight.shape[0] // geometry.groups, weight.shape[1]
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    if not y.numel():
        return y
    tiles_r = triton.cdiv(inner if back else out, tiles.block_k if back else tiles.block_n)
    with _tables.device_guard(x.device):
        conv_product_kernel[(triton.cdiv(pixels, tiles.block_m) * tiles_r, geometry.groups)](
            x, weight, source, y if bias is None else bias.contiguous(), y, *noise, pixels, tuple(y.shape[2:]),
            tuple(x.shape[2:]), out, inner, weight.shape[3], problem.taps, tuple(x.stride()), tuple(weight.stride()),
            _four(source), tuple(y.stride()), *geometry.arguments, layer, threshold, step_offset, MODE=mode, BACK=back,
            HAS_BIAS=bias is not None, PRECISION=precision(problem), BLOCK_O=tiles.block_n, BLOCK_I=tiles.block_k,
            BLOCK_M=tiles.block_m, STAGES=tiles.stages, INDEX=whole_index_dtype(x, y, weight, source),
            num_warps=tiles.num_warps, **OPTIONS,
        )  # fmt: skip
    return y


def _mask_gradients(
    found: tuple[Geometry, Problem], grad: Tensor, x: Tensor, weight: Tensor, source: Tensor,
    noise: tuple[Tensor, Tensor], rule: tuple[int, float, int, int], need_logits: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of logits and weight."""
    geometry, problem = found
    layer, threshold, mode, step_offset = rule
    dsource, dweight = empty_like(source, need_logits), empty_like(weight, need_weight)
    if not weight.numel() or not (need_logits or need_weight):
        return dsource, dweight
    tiles = convolution_tiles(problem)
    out, inner = weight.shape[0] // geometry.groups, weight.shape[1]
    grid = (triton.cdiv(out, tiles.block_n) * triton.cdiv(inner, tiles.block_k), problem.taps, geometry.groups)
    with _tables.device_guard(x.device):
        conv_mask_gradient_kernel[grid](
            grad, x, weight, source, dsource, dweight, *noise, problem.m, tuple(grad.shape[2:]), tuple(x.shape[2:]),
            out, inner, weight.shape[3], problem.taps, tuple(grad.stride()), tuple(x.stride()), tuple(weight.stride()),
            _four(source), _four(dsource), _four(dweight), *geometry.arguments, layer, threshold, step_offset,
            MODE=mode, NEED_LOGITS=need_logits, NEED_WEIGHT=need_weight, PRECISION=precision(problem),
            BLOCK_O=tiles.block_n, BLOCK_I=tiles.block_k, BLOCK_M=tiles.block_m, STAGES=tiles.stages,
            INDEX=whole_index_dtype(grad, x, weight, source), num_warps=tiles.num_warps, **OPTIONS,
        )  # fmt: skip
    return dsource, dweight


def _forward(
    found: tuple[Geometry, Problem], x: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, *how: Any
) -> Tensor:
    geometry, problem = found
    if problem.op.startswith("linear"):
        rows = multiply(problem, _rows(x), _matrix(weight), _matrix(source), bias, *how, False)
        return _images(rows, x.shape[0], geometry.rows, geometry.columns)
    return _multiply(found, x, _output(x, weight, geometry), weight, source, bias, *how, False)


def _input_grad(
    found: tuple[Geometry, Problem], grad: Tensor, x: Tensor, weight: Tensor, source: Tensor, *how: Any
) -> Tensor:
    if found[1].op.startswith("linear"):
        rows = multiply(found[1], _rows(grad), _matrix(weight), _matrix(source), None, *how, True)
        return _images(rows, x.shape[0], x.shape[2], x.shape[3])
    return _multiply(found, grad, empty_like(x, True), weight, source, None, *how, True)


def _mask_grad(
    found: tuple[Geometry, Problem], grad: Tensor, x: Tensor, weight: Tensor, source: Tensor, *how: Any
) -> tuple[Tensor, Tensor]:
    if not found[1].op.startswith("linear"):
        return _mask_gradients(found, grad, x, weight, source, *how)
    results = gradients(found[1], _rows(grad), _rows(x), _matrix(weight), _matrix(source), *how)
    dsource, dweight = (t[:, :, None, None] if t.dim() == 2 else t for t in results)
    return dsource, dweight


def conv2d(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, rng_state: Tensor, tau: Tensor, layer: int,
    threshold: float, mode: int, step_offset: int, *geometry: Any,
) -> Tensor:  # fmt: skip
    """The operation of the same name, in the way that the rule chooses."""
    rule = (layer, threshold, mode, step_offset)
    found = _chosen("conv2d", x, weight, logits, *geometry)
    if found is None:
        return conv2d_reference(x, weight, logits, bias, rng_state, tau, *rule, *geometry)
    return _forward(found, x, weight, logits, bias, (rng_state, tau), rule)


def conv2d_packed(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """The operation of the same name, in the way that the rule chooses."""
    found = _chosen("conv2d_packed", x, weight, None, *geometry)
    if found is None:
        return conv2d_packed_reference(x, weight, bits, bias, *geometry)
    return _forward(found, x, weight, packed_words(bits), bias, *from_bits(x))


def conv2d_input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, rng_state: Tensor, tau: Tensor, layer: int,
    threshold: float, mode: int, step_offset: int, *geometry: Any,
) -> Tensor:  # fmt: skip
    """The operation of the same name, in the way that the rule chooses."""
    rule = (layer, threshold, mode, step_offset)
    found = _chosen("conv2d_input_grad", x, weight, logits, *geometry)
    if found is None:
        return conv2d_input_grad_reference(grad, x, weight, logits, rng_state, tau, *rule, *geometry)
    return _input_grad(found, grad, x, weight, logits, (rng_state, tau), rule)


def conv2d_packed_input_grad(grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, *geometry: Any) -> Tensor:
    """The operation of the same name, in the way that the rule chooses."""
    found = _chosen("conv2d_packed_input_grad", x, weight, None, *geometry)
    if found is None:
        return conv2d_packed_input_grad_reference(grad, x, weight, bits, *geometry)
    return _input_grad(found, grad, x, weight, packed_words(bits), *from_bits(x))


def conv2d_mask_grad(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, rng_state: Tensor, tau: Tensor, layer: int,
    threshold: float, mode: int, step_offset: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, need_logits: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of the same name, in the way that the rule chooses."""
    rule, geometry = (layer, threshold, mode, step_offset), (stride, padding, dilation, groups)
    found = _chosen("conv2d_mask_grad", x, weight, logits, *geometry)
    if found is None:
        return conv2d_mask_grad_reference(
            grad, x, weight, logits, rng_state, tau, *rule, *geometry, need_logits, need_weight
        )
    return _mask_grad(found, grad, x, weight, logits, (rng_state, tau), rule, need_logits, need_weight)


def conv2d_packed_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, *geometry: Any) -> Tensor:
    """The operation of the same name, in the way that the rule chooses."""
    found = _chosen("conv2d_packed_weight_grad", x, weight, None, *geometry)
    if found is None:
        return conv2d_packed_weight_grad_reference(grad, x, weight, bits, *geometry)
    return _mask_grad(found, grad, x, weight, packed_words(bits), *from_bits(x), False, True)[1]
