"""Device functions of the formats of `dwm_fast.ops.coding`, to the last bit: decode, encode, and rounding's noise."""

import triton
import triton.language as tl

from dwm_fast.kernels._adam import divide, square_root
from dwm_fast.kernels._tiles import rows_of_four
from dwm_fast.kernels.philox import words4
from dwm_fast.ops import coding

assert coding.BLOCK == 128, "blocks of a scale are 32 rows of four here"

_FRACTION: tl.constexpr = tl.constexpr(coding.FRACTION)
_LARGEST: tl.constexpr = tl.constexpr(float(coding.LARGEST_FIXED))
_NAN: tl.constexpr = tl.constexpr(coding.FIXED_NAN)
_INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _wide(x):
    """fp32 of bf16 or fp32; by integers, for the interpreter has no subnormal bf16."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def decoded(codes):
    """Values of logits in any format, fp32."""
    if codes.dtype == tl.int16:
        return tl.where(codes == _NAN, float("nan"), codes.to(tl.float32) * _FRACTION)
    else:
        return _wide(codes)


@triton.jit
def rounding_words(seed, step, layer, chunk, stream: tl.constexpr, BLOCK: tl.constexpr):
    """Words [BLOCK / 4, 4] of a stream for the elements of a chunk."""
    first = chunk * (BLOCK // 4)  # a multiple of the number of rows: the low word never carries
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    high = ((first >> 32) & 0x3FFFFFFF | (stream << 30)).to(tl.uint32)
    return rows_of_four(*words4(seed, step, layer, low, high), BLOCK // 4)


@triton.jit
def _half_uniform(word):
    """u of rounding from the low half of each word: (half + 1/2) 2^-16."""
    return (word & 0xFFFF).to(tl.int32).to(tl.float32) * 1.52587890625e-05 + 7.62939453125e-06


@triton.jit
def _bf16(x, word):
    """fp32 to bf16 by adding 16 random bits below its last and cutting there."""
    cut = ((x.to(tl.uint32, bitcast=True) + (word & 0xFFFF)) >> 16).to(tl.uint16)
    return tl.where(x == x, cut, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def encoded(x, word, dtype: tl.constexpr):
    """fp32 values as logits of `dtype`, rounded by the low half of each word."""
    if dtype == tl.bfloat16:
        return _bf16(x, word)
    elif dtype == tl.int16:
        number = x == x
        scaled = tl.minimum(tl.maximum(tl.where(number, x, 0.0) * (1.0 / _FRACTION), -_LARGEST), _LARGEST)
        whole = scaled.to(tl.int32)
        low = whole - (whole.to(tl.float32) > scaled).to(tl.int32)
        code = low + (_half_uniform(word) < scaled - low.to(tl.float32)).to(tl.int32)
        return tl.where(number, code, _NAN).to(tl.int16)
    else:
        return x


@triton.jit
def decoded_moment(codes, scale, SECOND: tl.constexpr):
    """Values of a moment [ROWS, 4], fp32; `scale` [ROWS, 1] is read where it is stored in 8 bits."""
    if codes.dtype == tl.int8 or codes.dtype == tl.uint8:
        root = codes.to(tl.float32) * scale
        if SECOND:
            square = root * root
            return square * square
        else:
            return root * tl.abs(root)
    else:
        return _wide(codes)


@triton.jit
def _largest_of_blocks(x):
    """The largest of each block of 128, for each of its rows of four: x [ROWS, 4], result [ROWS]."""
    ROWS: tl.constexpr = x.shape[0]
    top = tl.max(tl.max(x, axis=1).reshape(ROWS // 32, 32), axis=1)
    return tl.broadcast_to(top[:, None], [ROWS // 32, 32]).reshape(ROWS)


@triton.jit
def encoded_moment(x, word, dtype: tl.constexpr, SECOND: tl.constexpr):
    """A moment [ROWS, 4] as codes of `dtype`, rounded by the low half of each word, and the scale of each row.

    Zeros stand beyond a tensor's end. Without 8 bits the scales are zeros.
    """
    ROWS: tl.constexpr = x.shape[0]
    if dtype == tl.int8 or dtype == tl.uint8:
        LEVELS: tl.constexpr = 255 if SECOND else 127
        root = square_root(tl.abs(x))
        if SECOND:
            root = square_root(root)
        root = tl.where(root < _INFINITY, root, _INFINITY)
        top = _largest_of_blocks(root)
        scales = tl.where(top < _INFINITY, divide(top, tl.full([ROWS], LEVELS, tl.float32)), float("nan"))
        usable = (scales > 0)[:, None]
        z = tl.where(usable, divide(root, tl.where(usable, scales[:, None], 1.0).broadcast_to(ROWS, 4)), 0.0)
        return _code(x, z, word, LEVELS, SECOND).to(dtype), scales
    elif dtype == tl.bfloat16:
        return _bf16(x, word), tl.zeros([ROWS], tl.float32)
    else:
        return x, tl.zeros([ROWS], tl.float32)


@triton.jit
def _code(x, z, word, LEVELS: tl.constexpr, SECOND: tl.constexpr):
    """The code, int32, of a value x whose root is z steps of its grid."""
    whole = z.to(tl.int32)
    low = whole.to(tl.float32)
    rise = (z - low) * (z + low)  # z^2 - low^2
    gap = 2.0 * low + 1.0  # (low + 1)^2 - low^2
    if SECOND:  # of fourth powers
        rise = rise * (z * z + low * low)
        gap = gap * (2.0 * low * low + gap)
    code = tl.minimum(whole + (_half_uniform(word) * gap < rise).to(tl.int32), LEVELS)
    if SECOND:
        return tl.where(z > 0, tl.maximum(code, 1), code)
    else:
        return tl.where(x < 0, -code, code)
