"""Kernels of conv2d and its gradients, one pass: implicit products over taps and channels, any strides and formats.

Right first: the rule of ways chooses them only where a table measured on the device says that they win. A tap's
elements of a weight lie KH * KW apart in the mask's order, so each has its own word of bits or Philox call. Loops over
taps run with at most four warps: flattened and with eight they are known to miscompile.

Offsets are of dtype INDEX, int64 where a tensor is too large for int32.
"""

import triton
import triton.language as tl

from dwm_fast.kernels._masks import GUMBEL_SOFT, logit_gradient, masked_value, weight_gradient
from dwm_fast.kernels._math import bound, narrow
from dwm_fast.kernels._products import PACKED, element_uniform, product
from dwm_fast.kernels.philox import seed_and_step


@triton.jit
def tap_elements(o, c, CI, tap, taps):
    """Logical numbers of a weight's elements at one tap, [outputs, inputs]."""
    return (o[:, None] * CI + c[None, :]) * taps + tap


@triton.jit
def tap_kept(bits, element, inside):
    """Keep flags of elements; `bits` are int32 words."""
    word = tl.load(bits + (element >> 5), mask=inside, other=0)
    return ((word >> (element & 31).to(tl.int32)) & 1) != 0


@triton.jit
def tap_offsets(o, c, kh, kw, strides):
    """Offsets of a weight-shaped tensor's elements at one tap."""
    return (o * strides[0])[:, None] + (c * strides[1])[None, :] + kh * strides[2] + kw * strides[3]


@triton.jit
def tap_uniform(seed, step, layer, element, MODE: tl.constexpr):
    """u of elements; zeros, never read, for rules without noise."""
    if MODE <= GUMBEL_SOFT:
        return element_uniform(seed, step, layer, element.to(tl.int64))
    else:
        return tl.zeros_like(element).to(tl.float32)


@triton.jit
def masked_tap(
    weight, source, seed, step, layer, threshold, inverse_tau, o, c, inside, kh, kw, CI, KW, taps, w_strides, s_strides,
    DTYPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The weight under its mask at one tap [outputs, inputs], rounded once to DTYPE; 0 where not `inside`."""
    element = tap_elements(o, c, CI, kh * KW + kw, taps)
    w = tl.load(weight + tap_offsets(o, c, kh, kw, w_strides), mask=inside, other=0.0)
    if MODE == PACKED:
        return narrow(tl.where(tap_kept(source, element, inside), w, 0.0), DTYPE)
    else:
        logit = tl.load(source + tap_offsets(o, c, kh, kw, s_strides), mask=inside, other=0.0)
        u = tap_uniform(seed, step, layer, element, MODE)
        _, value, _ = masked_value(logit, w.to(tl.float32), u, threshold, inverse_tau, MODE, False)
        return narrow(tl.where(inside, value, 0.0), DTYPE)


@triton.jit
def pixel(m, height, width):
    """Sample, row and column of pixels by number."""
    return m // (height * width), m % (height * width) // width, m % width


@triton.jit
def opposite(at, tap, stride, padding, dilation, size, BACK: tl.constexpr):
    """Row or column at the other end of a tap, 0 where there is none, and whether there is one.

    From an output to an input; BACK: from an input to the output that saw it through this tap.
    """
    if BACK:
        scaled = at + padding - tap * dilation
        there = tl.where(scaled >= 0, scaled, 0) // stride
        valid = (scaled >= 0) & (there * stride == scaled) & (there < size)
    else:
        there = at * stride - padding + tap * dilation
        valid = (there >= 0) & (there < size)
    return tl.where(valid, there, 0), valid


@triton.jit
def held(first, size, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """Numbers first .. of an axis, the last repeated beyond the end, and which are inside."""
    index = first + tl.arange(0, BLOCK)
    return tl.minimum(index, size - 1).to(INDEX), index < size


@triton.jit(do_not_specialize=["layer", "step_offset"])
def conv_product_kernel(
    x, weight, source, bias, y, rng_state, tau, M, sizes, sources, OG, CI, KW, taps, x_strides, w_strides, s_strides,
    y_strides, stride, padding, dilation, layer, threshold, step_offset,
    MODE: tl.constexpr, BACK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """y, images of `sizes` (rows, columns), from x, images of `sources`.

    BACK: y is the gradient of the input, x that of the output. r counts channels of y in a group, c channels of x.
    Grid (tiles of r and, fastest, of pixels; groups).
    """
    if MODE == PACKED:
        seed, step, inverse_tau = 0, 0, 1.0
    else:
        seed, step = seed_and_step(rng_state, step_offset)
        inverse_tau = 1.0 / tl.load(tau)
    layer = layer.to(tl.uint32)
    group = tl.program_id(1).to(INDEX)
    R, C = OG, CI
    if BACK:
        R, C = CI, OG
    BLOCK_R: tl.constexpr = BLOCK_I if BACK else BLOCK_O
    BLOCK_C: tl.constexpr = BLOCK_O if BACK else BLOCK_I
    tiles = tl.cdiv(M, BLOCK_M)
    m, m_inside = held(tl.program_id(0) % tiles * BLOCK_M, M, BLOCK_M, INDEX)
    r, r_inside = held(tl.program_id(0) // tiles * BLOCK_R, R, BLOCK_R, INDEX)
    b, row, column = pixel(m, sizes[0], sizes[1])
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for tap in range(bound(taps)):
        kh, kw = tap // KW, tap % KW
        i, i_valid = opposite(row, kh, stride[0], padding[0], dilation[0], sources[0], BACK)
        j, j_valid = opposite(column, kw, stride[1], padding[1], dilation[1], sources[1], BACK)
        places = b * x_strides[0] + i * x_strides[2] + j * x_strides[3]
        for c0 in tl.range(0, bound(C), BLOCK_C, num_stages=STAGES):
            c, c_inside = held(c0, C, BLOCK_C, INDEX)
            valid = c_inside[:, None] & (i_valid & j_valid & m_inside)[None, :]
            values = tl.load(x + ((group * C + c) * x_strides[1])[:, None] + places[None, :], mask=valid, other=0.0)
            if BACK:
                o, k, inside = group * OG + c, r, c_inside[:, None] & r_inside[None, :]
            else:
                o, k, inside = group * OG + r, c, r_inside[:, None] & c_inside[None, :]
            masked = masked_tap(
                weight, source, seed, step, layer, threshold, inverse_tau, o, k, inside, kh, kw, CI, KW, taps,
                w_strides, s_strides, x.dtype.element_ty, MODE,
            )  # fmt: skip
            acc = product(tl.trans(masked) if BACK else masked, values, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + group * R + r).to(tl.float32)[:, None]
    places = b * y_strides[0] + row * y_strides[2] + column * y_strides[3]
    target = y + ((group * R + r) * y_strides[1])[:, None] + places[None, :]
    tl.store(target, narrow(acc, y.dtype.element_ty), mask=r_inside[:, None] & m_inside[None, :])


@triton.jit(do_not_specialize=["layer", "step_offset"])
def conv_mask_gradient_kernel(
    grad, x, weight, source, dsource, dweight, rng_state, tau, M, sizes, sources, OG, CI, KW, taps, g_strides,
    x_strides, w_strides, s_strides, ds_strides, dw_strides, stride, padding, dilation, layer, threshold, step_offset,
    MODE: tl.constexpr, NEED_LOGITS: tl.constexpr, NEED_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """The masked weight's gradient in registers, and from it those of logits and weight.

    Grid (tiles of outputs and, fastest, of inputs; taps; groups).
    """
    tiles = tl.cdiv(CI, BLOCK_I)
    c, c_inside = held(tl.program_id(0) % tiles * BLOCK_I, CI, BLOCK_I, INDEX)
    r, r_inside = held(tl.program_id(0) // tiles * BLOCK_O, OG, BLOCK_O, INDEX)
    kh, kw = tl.program_id(1) // KW, tl.program_id(1) % KW
    group = tl.program_id(2).to(INDEX)
    o = group * OG + r
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for m0 in tl.range(0, bound(M), BLOCK_M, num_stages=STAGES):
        m, m_inside = held(m0, M, BLOCK_M, INDEX)
        b, row, column = pixel(m, sizes[0], sizes[1])
        i, i_valid = opposite(row, kh, stride[0], padding[0], dilation[0], sources[0], False)
        j, j_valid = opposite(column, kw, stride[1], padding[1], dilation[1], sources[1], False)
        places = b * g_strides[0] + row * g_strides[2] + column * g_strides[3]
        left = tl.load(
            grad + (o * g_strides[1])[:, None] + places[None, :], mask=r_inside[:, None] & m_inside[None, :], other=0.0
        )
        places = b * x_strides[0] + i * x_strides[2] + j * x_strides[3]
        valid = (i_valid & j_valid & m_inside)[:, None] & c_inside[None, :]
        right = tl.load(x + places[:, None] + ((group * CI + c) * x_strides[1])[None, :], mask=valid, other=0.0)
        acc = product(left, right, acc, PRECISION)
    inside = r_inside[:, None] & c_inside[None, :]
    element = tap_elements(o, c, CI, kh * KW + kw, taps)
    to_weight = dweight + tap_offsets(o, c, kh, kw, dw_strides)
    if MODE == PACKED:
        kept = tl.where(tap_kept(source, element, inside), acc, 0.0)
        tl.store(to_weight, narrow(kept, dweight.dtype.element_ty), mask=inside)
    else:
        seed, step = seed_and_step(rng_state, step_offset)
        inverse_tau = 1.0 / tl.load(tau)
        logit = tl.load(source + tap_offsets(o, c, kh, kw, s_strides), mask=inside, other=0.0)
        u = tap_uniform(seed, step, layer.to(tl.uint32), element, MODE)
        if NEED_LOGITS:
            w = tl.load(weight + tap_offsets(o, c, kh, kw, w_strides), mask=inside, other=0.0).to(tl.float32)
            change = logit_gradient(acc, logit, w, u, threshold, inverse_tau, 0.0, MODE)
            tl.store(dsource + tap_offsets(o, c, kh, kw, ds_strides), change, mask=inside)
        if NEED_WEIGHT:
            change = weight_gradient(acc, logit, u, threshold, inverse_tau, MODE)
            tl.store(to_weight, narrow(change, dweight.dtype.element_ty), mask=inside)
