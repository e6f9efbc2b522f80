"""How learned numbers and moments are stored in fewer bits: formats, and the reference that encodes and decodes them.

Formats of logits, by dtype: fp32; bf16; int16, fixed point in units of 2^-11 from -32767 to 32767, with -32768 for NaN.

Formats of moments, by dtype: fp32; bf16; 8 bits in blocks of 128 neighbours in logical order, with one fp32 scale r a
block. The first moment is int8, m = sign(q) (q r)^2 with r = max sqrt|m| / 127; the second is uint8, v = (q r)^4 with
r = max v^(1/4) / 255, and at least 1 where v > 0, so that no step is ever divided by a moment that was lost. Both grids
are fine near 0. A block that holds an infinity or NaN has a scale of NaN: it is seen, not hidden.

Rounding is stochastic, and unbiased in the value (but for that least 1): a value between two neighbours of its grid
becomes the upper one with probability (value - lower) / (upper - lower), to 16 bits. Its noise are two streams of the
noise contract, so that it is the same on every backend and after resuming.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwm_fast.errors import InputError

LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fixed16": torch.int16}
"""Formats of logits by name."""

MOMENTS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "8bit": (torch.int8, torch.uint8),
}
"""Formats of the two moments by name."""

BLOCK = 128
"""Elements that share a scale."""

FRACTION = 2.0**-11
"""Unit of a fixed-point logit."""

LARGEST_FIXED, FIXED_NAN = 32767, -32768
LEVELS = {torch.int8: 127, torch.uint8: 255}


def half_uniform(words: Tensor) -> Tensor:
    """u of rounding, fp32 in (0, 1), from the low half of random words (int64): (half + 1/2) 2^-16."""
    return (words & 0xFFFF).to(torch.float32) * 2.0**-16 + 2.0**-17


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of a dtype are computed in: fp32, and fp64 for fp64; InputError where they are no format."""
    if dtype != torch.int16 and not dtype.is_floating_point:
        raise InputError(f"logits are {dtype}; expected float32, bfloat16, or int16 for fixed point")
    return torch.float64 if dtype == torch.float64 else torch.float32


def decoded(logits: Tensor) -> Tensor:
    """The values of logits in any format; themselves where they are fp32 or fp64."""
    dtype = value_dtype(logits.dtype)
    if logits.dtype == torch.int16:
        return (logits.to(dtype) * FRACTION).masked_fill_(logits == FIXED_NAN, math.nan)
    return logits.to(dtype)


def encoded(values: Tensor, dtype: torch.dtype, words: Tensor | None = None) -> Tensor:
    """fp32 values as logits of `dtype`; rounded by the low halves of `words`, or to nearest without.

    Args:
        values: fp32. dtype: one of `LOGITS`. words: int64 of the values' shape, in [0, 2^32).
    """
    if dtype == torch.float32:
        return values
    if dtype == torch.bfloat16:
        return values.to(dtype) if words is None else _bf16(values, words & 0xFFFF)
    u = torch.full_like(values, 0.5) if words is None else half_uniform(words)
    scaled = (values / FRACTION).clamp(-LARGEST_FIXED, LARGEST_FIXED)
    low = scaled.floor()
    codes = torch.where(u < scaled - low, low + 1.0, low)
    return torch.where(values.isnan(), float(FIXED_NAN), codes).to(torch.int16)


def _bf16(values: Tensor, noise: Tensor) -> Tensor:
    """bf16 by adding 16 random bits (int64) below its last and cutting there."""
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    cut = (((bits + noise.reshape(bits.shape)) >> 16) << 16).to(torch.int32).view(torch.float32)
    return torch.where(values.isnan(), math.nan, cut).to(torch.bfloat16)


def scales_of(numel: int) -> int:
    """Scales that a moment of `numel` elements has in 8 bits."""
    return -(-numel // BLOCK)


def square_root(x: Tensor) -> Tensor:
    """fp32, correctly rounded: on a CPU torch's own may be one unit off, and in fp64 that is far below the rounding."""
    return x.double().sqrt().float()


def decoded_moment(codes: Tensor, scales: Tensor | None) -> Tensor:
    """The values of a moment in any format, fp32, of its shape; `scales` of 8-bit ones."""
    if codes.dtype not in LEVELS:
        return codes.to(torch.float32)
    assert scales is not None
    scale = scales.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    root = codes.to(torch.float32) * scale
    if codes.dtype == torch.int8:
        return root * root.abs()
    square = root * root
    return square * square


def encoded_moment(values: Tensor, dtype: torch.dtype, words: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """fp32 values as a moment of `dtype` (fp32, bf16, int8 for the first, uint8 for the second), and its scales.

    Rounded by the low halves of `words` (a step gives the second moment the high halves of the first's), or to nearest
    without.
    """
    if dtype not in LEVELS:
        if words is None or dtype != torch.bfloat16:
            return values.to(dtype), None
        return _bf16(values, words & 0xFFFF), None
    levels, second = LEVELS[dtype], dtype == torch.uint8
    root = square_root(values.abs())
    root = square_root(root) if second else root
    root = torch.where(root < math.inf, root, math.inf).reshape(-1)
    top = torch.nn.functional.pad(root, (0, -root.numel() % BLOCK)).view(-1, BLOCK).amax(1)
    # A tensor, since a GPU divides by a number by multiplying with its rounded reciprocal.
    scales = torch.where(top < math.inf, top / torch.full_like(top, levels), math.nan)
    # What has no scale has codes of 0, whatever is divided here.
    usable = (scales > 0).repeat_interleave(BLOCK)[: root.numel()]
    z = torch.where(usable, root / scales.repeat_interleave(BLOCK)[: root.numel()], 0.0)
    u = torch.full_like(z, 0.5) if words is None else half_uniform(words.reshape(-1))
    low = z.floor()
    rise, gap = (z - low) * (z + low), 2.0 * low + 1.0  # z^2 - low^2, (low + 1)^2 - low^2
    if second:  # of fourth powers
        rise, gap = rise * (z * z + low * low), gap * (2.0 * low * low + gap)
    codes = torch.where(u * gap < rise, low + 1.0, low).clamp(max=levels)
    if second:
        codes = torch.where((z > 0) & (codes < 1), 1.0, codes)
    else:
        codes = torch.where(values.reshape(-1) < 0, -codes, codes)
    return codes.to(dtype).view(values.shape), scales
