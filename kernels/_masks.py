"""Device functions of the mask rules: noise of a tile, masked value, and both gradients; one file for every kernel."""

import triton
import triton.language as tl

from dwm_fast.kernels._math import exp, sigmoid_slope
from dwm_fast.kernels._tiles import rows_of_four
from dwm_fast.kernels.philox import (
    block_words4,
    drop_probability,
    hard_keep,
    kept,
    soft_slope,
    soft_value,
    uniform,
    words4,
)
from dwm_fast.ops import draw
from dwm_fast.ops.draw import Mode

SCALED_SOFT: tl.constexpr = tl.constexpr(draw.SCALED_SOFT)
GUMBEL_HARD: tl.constexpr = tl.constexpr(Mode.GUMBEL_HARD.value)
GUMBEL_SOFT: tl.constexpr = tl.constexpr(Mode.GUMBEL_SOFT.value)
KEEP: tl.constexpr = tl.constexpr(Mode.KEEP.value)
THRESHOLD_MODE: tl.constexpr = tl.constexpr(Mode.THRESHOLD.value)
TERNARY: tl.constexpr = tl.constexpr(Mode.TERNARY.value)
EDIT: tl.constexpr = tl.constexpr(Mode.EDIT.value)


@triton.jit
def flat_uniform(seed, step, layer, chunk, BLOCK: tl.constexpr, MODE: tl.constexpr):
    """u of a FLAT or STRIDED chunk [BLOCK / 4, 4]; zeros, never read, for the modes without noise."""
    if MODE <= GUMBEL_SOFT:
        first = chunk * (BLOCK // 4)  # a multiple of the number of rows: the low word never carries
        low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
        high = ((first >> 32) & 0xFFFFFFFF).to(tl.uint32)
        w0, w1, w2, w3 = words4(seed, step, layer, low, high)
        return uniform(rows_of_four(w0, w1, w2, w3, BLOCK // 4))
    else:
        return tl.zeros([BLOCK // 4, 4], tl.float32)


@triton.jit
def taps_words(seed, step, layer, group, MODE: tl.constexpr):
    """The 36 words of each group of a TAPS chunk, in logical order, as a tuple of blocks [GROUPS]."""
    words = ()
    if MODE <= GUMBEL_SOFT:
        for block in tl.static_range(9):
            words = words + block_words4(seed, step, layer, 9 * group + block)
    return words


@triton.jit
def tap_uniform(words, tap: tl.constexpr, GROUPS: tl.constexpr, MODE: tl.constexpr):
    """u of one tap of a TAPS chunk [GROUPS, 4]: channel i of a group takes logical element 9 * i + tap."""
    if MODE <= GUMBEL_SOFT:
        return uniform(rows_of_four(words[tap], words[9 + tap], words[18 + tap], words[27 + tap], GROUPS))
    else:
        return tl.zeros([GROUPS, 4], tl.float32)


@triton.jit
def number_of(threshold, tau_ptr, MODE: tl.constexpr):
    """A layer's number for its rule: the threshold, or under SCALED_SOFT kappa, the scale of the logits."""
    if MODE == SCALED_SOFT:
        return tl.load(tau_ptr + 1)
    else:
        return threshold


@triton.jit
def masked_value(logit, weight, u, threshold, inverse_tau, MODE: tl.constexpr, PENALTY: tl.constexpr):
    """Keep flag, masked weight (fp32) and term of the penalty's sum of each element."""
    term = logit
    if MODE == SCALED_SOFT:
        scaled = logit * threshold
        keep = hard_keep(scaled, u)
        term = soft_value(scaled, u, inverse_tau)
        value = weight * term
    elif MODE <= GUMBEL_SOFT:
        drop, exponential = drop_probability(logit)
        keep = kept(u, drop, exponential)
        value = tl.where(keep, weight, 0.0) if MODE == GUMBEL_HARD else weight * soft_value(logit, u, inverse_tau)
        if PENALTY:
            term = tl.where(logit > 40.0, 1.0, exponential * drop)
    elif MODE == KEEP:
        keep = logit >= 0
        value = tl.where(keep, weight, 0.0)
    elif MODE == THRESHOLD_MODE:
        keep = logit > threshold
        value = tl.where(keep, weight, 0.0)
    elif MODE == TERNARY:
        sign = (logit > threshold).to(tl.float32) - (logit < 0).to(tl.float32)
        keep = sign != 0
        value = weight * sign
    else:
        keep = tl.abs(logit) <= 1.0
        value = weight + threshold * logit
        if PENALTY:
            term = exp(-tl.abs(logit))
    return keep, value, term


@triton.jit
def logit_gradient(grad, logit, weight, u, threshold, inverse_tau, penalty_scale, MODE: tl.constexpr):
    """Gradient of the loss and of the penalty with respect to a logit; `penalty_scale` is grad_penalty / N."""
    if MODE == SCALED_SOFT:
        slope = soft_slope(logit * threshold, u, inverse_tau) * (inverse_tau * threshold)
        return (grad * weight + penalty_scale) * slope  # the penalty is the mean of the mask itself
    elif MODE <= GUMBEL_SOFT:
        slope = soft_slope(logit, u, inverse_tau) * inverse_tau
        return grad * weight * slope + penalty_scale * sigmoid_slope(logit)
    elif MODE == KEEP:
        return tl.zeros_like(logit)
    elif MODE == EDIT:
        sign = (logit > 0).to(tl.float32) - (logit < 0).to(tl.float32)
        return grad * threshold - penalty_scale * sign * exp(-tl.abs(logit))
    else:
        return grad * weight


@triton.jit
def weight_gradient(grad, logit, u, threshold, inverse_tau, MODE: tl.constexpr):
    """Gradient of the loss with respect to a weight: grad times the mask's value."""
    if MODE == SCALED_SOFT:
        return grad * soft_value(logit * threshold, u, inverse_tau)
    elif MODE == GUMBEL_HARD:
        return tl.where(hard_keep(logit, u), grad, 0.0)
    elif MODE == GUMBEL_SOFT:
        return grad * soft_value(logit, u, inverse_tau)
    elif MODE == KEEP:
        return tl.where(logit >= 0, grad, 0.0)
    elif MODE == THRESHOLD_MODE:
        return tl.where(logit > threshold, grad, 0.0)
    elif MODE == TERNARY:
        return grad * ((logit > threshold).to(tl.float32) - (logit < 0).to(tl.float32))
    else:
        return grad
