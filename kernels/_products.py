"""Device functions of masked products: tiles of strided matrices, and a weight under bits or under a drawn mask.

A tile of the weight lies as the weight does, [BLOCK_N, BLOCK_K], from row n0 and column k0 (int64). Offsets inside a
tile are of dtype INDEX; starts are int64. What lies at a tile's edge:

- FULL: the tile ends inside the matrix.
- CLAMP: what lies beyond repeats an element inside; the result there is thrown away.
- ZERO: what lies beyond is 0, and its address repeats one inside.
"""

import triton
import triton.language as tl

from dwm_fast.kernels._masks import GUMBEL_SOFT, masked_value
from dwm_fast.kernels._math import INTERPRETED, narrow, sigmoid
from dwm_fast.kernels.philox import block_words4, uniform
from dwm_fast.ops import draw
from dwm_fast.ops.problem import ACTIVATIONS

FULL: tl.constexpr = tl.constexpr(0)
CLAMP: tl.constexpr = tl.constexpr(1)
ZERO: tl.constexpr = tl.constexpr(2)

PACKED: tl.constexpr = tl.constexpr(draw.PACKED)
"""The mask is read from packed bits; numbers below are the rules of dwm_fast.ops.Mode."""

_RELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("relu"))
_GELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu"))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32; the interpreter, whose bfloat16 are integers, multiplies them as fp32, which is exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """Activation of fp32 values by its number in ACTIVATIONS; NaN stays NaN."""
    if ACTIVATION == _RELU:
        return tl.where(value < 0, 0.0, value)
    elif ACTIVATION == _GELU:
        return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION > _GELU:
        return value * sigmoid(value)
    else:
        return value


@triton.jit
def places(left, BLOCK: tl.constexpr, EDGE: tl.constexpr, RUN: tl.constexpr):
    """Indices 0 .. BLOCK - 1 of an axis that has `left` more elements, repeated at the edge in whole runs of RUN."""
    index = tl.arange(0, BLOCK)
    if EDGE == FULL:
        return index
    else:
        end = tl.minimum(left, BLOCK).to(tl.int32)
        if RUN > 1:
            held = tl.minimum(index // RUN * RUN, end - RUN) + index % RUN
            return tl.max_contiguous(tl.multiple_of(held, RUN), RUN)
        else:
            return tl.minimum(index, end - 1)


@triton.jit
def load_tile(
    pointer, r0, c0, rows, columns, row_stride, column_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EDGE_R: tl.constexpr, EDGE_C: tl.constexpr,
    RUN_R: tl.constexpr, RUN_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_C] of a strided matrix (rows, columns) from row r0 and column c0."""
    row = places(rows - r0, BLOCK_R, EDGE_R, RUN_R)
    column = places(columns - c0, BLOCK_C, EDGE_C, RUN_C)
    offsets = (row.to(INDEX) * row_stride)[:, None] + (column.to(INDEX) * column_stride)[None, :]
    start = pointer + r0 * row_stride + c0 * column_stride
    if EDGE_R == ZERO:
        return tl.load(start + offsets, mask=(tl.arange(0, BLOCK_R) < rows - r0)[:, None], other=0.0)
    elif EDGE_C == ZERO:
        return tl.load(start + offsets, mask=(tl.arange(0, BLOCK_C) < columns - c0)[None, :], other=0.0)
    else:
        return tl.load(start + offsets)


@triton.jit
def kept_tile(
    bits, words, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
    EDGE_N: tl.constexpr, EDGE_K: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Keep flags of a tile, bool; `bits` has `words` int32 words. WHOLE: K is a multiple of 32.

    A word is loaded once for 32 columns, two words where rows begin inside a word.
    """
    row = places(N - n0, BLOCK_N, EDGE_N, 1)
    group = places((K - k0 + 31) // 32, BLOCK_K // 32, EDGE_K, 1)
    if WHOLE:
        offsets = (row.to(INDEX) * (K // 32))[:, None] + group[None, :]
        word = tl.load(bits + n0 * (K // 32) + k0 // 32 + offsets)
    else:
        first = ((n0 + row) * K)[:, None] + (k0 + 32 * group)[None, :]
        low = tl.load(bits + (first >> 5)).to(tl.uint32, bitcast=True)
        high = tl.load(bits + tl.minimum((first >> 5) + 1, words - 1)).to(tl.uint32, bitcast=True)
        shift = (first & 31).to(tl.uint32)
        word = ((low >> shift) | ((high << 1) << (31 - shift))).to(tl.int32, bitcast=True)
    return ((word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1).reshape(BLOCK_N, BLOCK_K) != 0


@triton.jit
def under_words(w, words, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """`w` [BLOCK_N, BLOCK_K] where its bit is 1, else 0; `words` int32 [BLOCK_N, BLOCK_K // 32], a bit a column.

    Two-byte weights travel in pairs. Each bit is moved to the top of its word; one instruction spreads the tops of two
    words over the halves of a third, and one takes the pair under it.
    """
    if INTERPRETED or w.dtype.primitive_bitwidth != 16:
        keep = ((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1).reshape(BLOCK_N, BLOCK_K) != 0
        return tl.where(keep, w, 0.0)
    else:
        tops = (words[:, :, None] << (31 - tl.arange(0, 32))[None, None, :]).reshape(BLOCK_N, BLOCK_K)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 kept; prmt.b32 kept, $2, $3, 0xFFBB; and.b32 $0, $1, kept; }", "=r,r,r,r", [w, tops],
            dtype=w.dtype, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def element_uniform(seed, step, layer, element):
    """u of elements by their logical numbers (int64), one Philox call each."""
    w0, w1, w2, w3 = block_words4(seed, step, layer, element >> 2)
    lane = (element & 3).to(tl.int32)
    return uniform(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def noise_tile(
    seed, step, layer, n0, k0, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, WHOLE: tl.constexpr
):
    """u of a tile, fp32; zeros, never read, for rules without noise. WHOLE: K is a multiple of 4: a call for four."""
    if MODE > GUMBEL_SOFT:
        return tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    elif WHOLE:
        first = ((n0 + tl.arange(0, BLOCK_N)) * (K // 4))[:, None]
        w0, w1, w2, w3 = block_words4(seed, step, layer, first + (k0 // 4 + tl.arange(0, BLOCK_K // 4))[None, :])
        return uniform(tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_N, BLOCK_K))
    else:
        element = ((n0 + tl.arange(0, BLOCK_N)) * K)[:, None] + (k0 + tl.arange(0, BLOCK_K))[None, :]
        return element_uniform(seed, step, layer, element)


@triton.jit
def masked_tile(
    weight, source, words, seed, step, layer, threshold, inverse_tau, n0, k0, N, K, w_n, w_k, s_n, s_k,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, WHOLE: tl.constexpr,
    EDGE_N: tl.constexpr, EDGE_K: tl.constexpr, RUN_K: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The weight under its mask, rounded once to DTYPE; `source` is the packed bits or the logits.

    The very functions that `sample` is made of decide a drawn mask, so its bits are the staged ones.
    """
    w = load_tile(weight, n0, k0, N, K, w_n, w_k, BLOCK_N, BLOCK_K, EDGE_N, EDGE_K, 1, RUN_K, INDEX)
    if MODE == PACKED:
        keep = kept_tile(source, words, n0, k0, N, K, BLOCK_N, BLOCK_K, WHOLE, EDGE_N, EDGE_K, INDEX)
        return narrow(tl.where(keep, w, 0.0), DTYPE)
    else:
        logit = load_tile(source, n0, k0, N, K, s_n, s_k, BLOCK_N, BLOCK_K, EDGE_N, EDGE_K, 1, RUN_K, INDEX)
        u = noise_tile(seed, step, layer, n0, k0, K, BLOCK_N, BLOCK_K, MODE, WHOLE)
        _, value, _ = masked_value(logit, w.to(tl.float32), u, threshold, inverse_tau, MODE, False)
        return narrow(value, DTYPE)
