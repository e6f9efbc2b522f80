"""Device functions of the noise contract: Philox4x32-10 words, uniforms, and the one comparison that decides a bit.

Every kernel that draws a mask inlines these functions, so that a bit is decided by the same instructions everywhere.
Kernels that inline them are launched with `enable_fp_fusion=False`; no product here feeds an addition that could round
differently when fused, and the option keeps it so whatever surrounds the inlined code.
"""

import triton
import triton.language as tl

from dwm_fast.kernels._math import exp, log, reciprocal, sigmoid, sigmoid_slope


@triton.jit
def seed_and_step(rng_state, step_offset):
    """Seed (int64) and step (uint32) of this draw, read from the device tensor [seed, step]."""
    step = tl.load(rng_state + 1) + step_offset
    return tl.load(rng_state), (step & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def words4(seed, step, layer, low, high):
    """Four uint32 words for the elements 4 * block .. 4 * block + 3, where block = high * 2**32 + low."""
    return tl.philox(seed, low, high, layer, step)


@triton.jit
def block_words4(seed, step, layer, block):
    """`words4` for int64 block numbers."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, layer, step)


@triton.jit
def uniform(word):
    """u of a word as every function here takes it: u itself, and -(1 - u) in the upper tail, where u would round.

    ((word >> 8) + 1/2) * 2**-24, rounded once; within 2**16 of either end of its range a word is, as a signed number,
    its distance from that end, and counts in steps of 2**-32.
    """
    ordinary = (word >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    tail = (word.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.where(tl.abs(tail) < 1.52587890625e-05, tail, ordinary)


@triton.jit
def drop_probability(logit):
    """1 / (1 + exp(l)) = 1 - sigmoid(l), and exp(l): what a weight is kept by."""
    exponential = exp(logit)
    return reciprocal(1.0 + exponential), exponential


@triton.jit
def kept(u, drop, exponential):
    """u > 1 / (1 + exp(l)), and in the upper tail 1 - u < exp(l): there it is sigmoid(l) but for part of a step."""
    return (u > drop) | ((u < 0) & (tl.abs(u) < exponential))  # a choice of two would hold more predicates at once


@triton.jit
def hard_keep(logit, u):
    """Bernoulli(sigmoid(l)); equals soft > 1/2 and needs no logarithm."""
    drop, exponential = drop_probability(logit)
    return kept(u, drop, exponential)


@triton.jit
def on_side(x, u):
    """x, and -x in the upper tail."""
    sign = u.to(tl.uint32, bitcast=True) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def argument_on_side(logit, u, inverse_tau):
    """(l + log u - log(1 - u)) / tau, the argument of the Gumbel-sigmoid, and its negative in the upper tail."""
    near = tl.abs(u)
    return (on_side(logit, u) + log(near) - log(1.0 - near)) * inverse_tau


@triton.jit
def soft_value(logit, u, inverse_tau):
    """The Gumbel-sigmoid: sigmoid((l + log u - log(1 - u)) / tau)."""
    return sigmoid(on_side(argument_on_side(logit, u, inverse_tau), u))


@triton.jit
def soft_slope(logit, u, inverse_tau):
    """soft (1 - soft); even in the argument."""
    return sigmoid_slope(argument_on_side(logit, u, inverse_tau))
