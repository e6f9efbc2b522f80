"""Device functions of the noise contract: Philox4x32-10 words, uniforms, and the one comparison that decides a bit.

Every kernel that draws a mask inlines these functions, so that a bit is decided by the same instructions everywhere.
Kernels that inline them are launched with `enable_fp_fusion=False`; no product here feeds an addition that could round
differently when fused, and the option keeps it so whatever surrounds the inlined code.
"""

import triton
import triton.language as tl

from dwm_fast.kernels._math import exp, log, reciprocal


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
    """u = ((word >> 8) + 1/2) * 2**-24 in fp32, rounded once, in [2**-25, 1 - 2**-24]."""
    u = (word >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    return tl.minimum(u, 0.999999940395355224609375)


@triton.jit
def drop_probability(logit):
    """1 / (1 + exp(l)) = 1 - sigmoid(l), and exp(l): the threshold that u must exceed to keep a weight."""
    exponential = exp(logit)
    return reciprocal(1.0 + exponential), exponential


@triton.jit
def hard_keep(logit, u):
    """Bernoulli(sigmoid(l)) as u > 1 / (1 + exp(l)); equals soft > 1/2 and needs no logarithm."""
    drop, _ = drop_probability(logit)
    return u > drop


@triton.jit
def soft_argument(logit, u, inverse_tau):
    """(l + log u - log(1 - u)) / tau, the argument of the Gumbel-sigmoid."""
    return (logit + log(u) - log(1.0 - u)) * inverse_tau
