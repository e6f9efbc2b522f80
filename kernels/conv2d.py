"""conv2d and its gradients in Triton, one pass: the launches of `conv`'s kernels.

A 1x1 convolution over channels_last images is a linear map and taken as one.
"""

import torch
import triton
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import OPTIONS
from dwm_fast.kernels._product_launch import convolution_tiles, precision, whole_index_dtype, words_of
from dwm_fast.kernels.conv import conv_mask_gradient_kernel, conv_product_kernel
from dwm_fast.kernels.linear import multiply
from dwm_fast.kernels.linear_grad import empty_like, gradients
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.geometry import Geometry
from dwm_fast.ops.problem import Problem


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
    shape = (x.shape[0], weight.shape[0], *geometry.output(x.shape, weight.shape))
    if not last:
        return _tables.empty(shape, dtype=x.dtype, device=x.device)
    b, c, h, w = shape
    return _tables.empty((b, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


def _pairs(geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    """Stride, padding and dilation, as the kernels take them."""
    return tuple(tuple(map(int, pair)) for pair in (geometry.stride, geometry.padding, geometry.dilation))


def _four(t: Tensor) -> tuple[int, ...]:
    """Strides of a weight-shaped tensor; packed bits have none."""
    return tuple(t.stride()) if t.dim() == 4 else (0, 0, 0, 0)


def _multiply(
    problem: Problem, x: Tensor, y: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, draw: Draw,
    geometry: Geometry, back: bool,
) -> Tensor:  # fmt: skip
    """y from x under the masked weight; `back`: the gradient of the input from that of the output."""
    tiles = convolution_tiles(problem, back)
    out, inner = weight.shape[0] // geometry.groups, weight.shape[1]
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    if not y.numel():
        return y
    tiles_r = triton.cdiv(inner if back else out, tiles.block_k if back else tiles.block_n)
    with _tables.device_guard(x.device):
        conv_product_kernel[(triton.cdiv(pixels, tiles.block_m) * tiles_r, geometry.groups)](
            x, weight, source, y if bias is None else bias.contiguous(), y, draw.rng_state, draw.tau, pixels,
            tuple(y.shape[2:]), tuple(x.shape[2:]), out, inner, weight.shape[3], problem.taps, tuple(x.stride()),
            tuple(weight.stride()), _four(source), tuple(y.stride()), *_pairs(geometry), draw.layers[0],
            draw.thresholds[0], draw.step_offset, MODE=draw.mode, BACK=back, HAS_BIAS=bias is not None,
            PRECISION=precision(problem), BLOCK_O=tiles.block_n, BLOCK_I=tiles.block_k, BLOCK_M=tiles.block_m,
            STAGES=tiles.stages, INDEX=whole_index_dtype(x, y, weight, source), num_warps=tiles.num_warps, **OPTIONS,
        )  # fmt: skip
    return y


def _mask_gradients(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, source: Tensor, draw: Draw, geometry: Geometry,
    need_logits: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of logits and weight."""
    dsource, dweight = empty_like(source, need_logits), empty_like(weight, need_weight)
    if not weight.numel() or not (need_logits or need_weight):
        return dsource, dweight
    tiles = convolution_tiles(problem)
    out, inner = weight.shape[0] // geometry.groups, weight.shape[1]
    grid = (triton.cdiv(out, tiles.block_n) * triton.cdiv(inner, tiles.block_k), problem.taps, geometry.groups)
    with _tables.device_guard(x.device):
        conv_mask_gradient_kernel[grid](
            grad, x, weight, source, dsource, dweight, draw.rng_state, draw.tau, problem.m, tuple(grad.shape[2:]),
            tuple(x.shape[2:]), out, inner, weight.shape[3], problem.taps, tuple(grad.stride()), tuple(x.stride()),
            tuple(weight.stride()), _four(source), _four(dsource), _four(dweight), *_pairs(geometry), draw.layers[0],
            draw.thresholds[0], draw.step_offset, MODE=draw.mode, NEED_LOGITS=need_logits, NEED_WEIGHT=need_weight,
            PRECISION=precision(problem),
            BLOCK_O=tiles.block_n, BLOCK_I=tiles.block_k, BLOCK_M=tiles.block_m, STAGES=tiles.stages,
            INDEX=whole_index_dtype(grad, x, weight, source), num_warps=tiles.num_warps, **OPTIONS,
        )  # fmt: skip
    return dsource, dweight


def _forward(
    problem: Problem, x: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, draw: Draw, geometry: Geometry
) -> Tensor:
    if not problem.linear:
        return _multiply(problem, x, _output(x, weight, geometry), weight, source, bias, draw, geometry, False)
    rows = multiply(problem, _rows(x), _matrix(weight), _matrix(source), bias, draw, False)
    return _images(rows, x.shape[0], x.shape[2], x.shape[3])


def _input_grad(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, source: Tensor, draw: Draw, geometry: Geometry
) -> Tensor:
    if not problem.linear:
        return _multiply(problem, grad, empty_like(x, True), weight, source, None, draw, geometry, True)
    rows = multiply(problem, _rows(grad), _matrix(weight), _matrix(source), None, draw, True)
    return _images(rows, x.shape[0], x.shape[2], x.shape[3])


def conv2d(
    problem: Problem, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, draw: Draw, geometry: Geometry
) -> Tensor:
    """The operation of the same name."""
    return _forward(problem, x, weight, logits, bias, draw, geometry)


def conv2d_packed(
    problem: Problem, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The operation of the same name."""
    return _forward(problem, x, weight, words_of(bits), bias, Draw.from_bits(x), geometry)


def conv2d_input_grad(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, geometry: Geometry
) -> Tensor:
    """The operation of the same name."""
    return _input_grad(problem, grad, x, weight, logits, draw, geometry)


def conv2d_packed_input_grad(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, geometry: Geometry
) -> Tensor:
    """The operation of the same name."""
    return _input_grad(problem, grad, x, weight, words_of(bits), Draw.from_bits(x), geometry)


def conv2d_mask_grad(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, draw: Draw, geometry: Geometry,
    need_logits: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of the same name."""
    if not problem.linear:
        return _mask_gradients(problem, grad, x, weight, logits, draw, geometry, need_logits, need_weight)
    results = gradients(
        problem, _rows(grad), _rows(x), _matrix(weight), _matrix(logits), draw, need_logits, need_weight
    )
    dlogits, dweight = (t[:, :, None, None] if t.dim() == 2 else t for t in results)
    return dlogits, dweight


def conv2d_packed_weight_grad(
    problem: Problem, grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, geometry: Geometry
) -> Tensor:
    """The operation of the same name."""
    return conv2d_mask_grad(problem, grad, x, weight, words_of(bits), Draw.from_bits(x), geometry, False, True)[1]
