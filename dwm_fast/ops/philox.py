"""The noise contract: Philox4x32-10 (Salmon et al., SC 2011), a function of seed, step, layer and element.

Reference in plain PyTorch. Words are carried in int64 tensors: PyTorch has no full set of uint32 operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwm_fast.ops.draw import MASKS, check_layers
from dwm_fast.ops.registration import call, define

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10

# Blocks a chunk: on a CPU the dozen int64 temporaries stay in cache, elsewhere they stay under 1 GiB.
_CHUNK_CPU, _CHUNK = 1 << 15, 1 << 22

TAIL = 2.0**-16
"""Below u = TAIL and above u = 1 - TAIL the contract counts in steps of 2^-32, else of 2^-24."""


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of a constant and words, without overflowing int64."""
    low_half = a * (b & 0xFFFF)
    high_half = a * (b >> 16) + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors of equal or broadcastable shape with values in [0, 2^32).
        key: two int64 tensors (0-dim or broadcastable) with values in [0, 2^32).

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def block_words(block: Tensor, rng_state: Tensor, layer: int, step_offset: int = 0, stream: int = MASKS) -> Tensor:
    """Words of elements 4 * block ... 4 * block + 3: block int64 (n,), each in [0, 2^61) -> int64 (n, 4)."""
    seed, step = rng_state[0], (rng_state[1] + step_offset) & _LOW
    key = (seed & _LOW, (seed >> 32) & _LOW)
    counter = (block & _LOW, (block >> 32) | (stream << 30), torch.full_like(block, layer), step.expand_as(block))
    return torch.stack(philox4x32(counter, key), dim=1)


def random_words(numel: int, rng_state: Tensor, layer: int, step_offset: int = 0, stream: int = MASKS) -> Tensor:
    """The contract's random word of every element of one tensor.

    Counter = (element // 4 low, element // 4 high + 2^30 stream, layer, step), key = seed; element e takes word e % 4.

    Args:
        numel: number of elements, in logical contiguous order.
        rng_state: int64 tensor (2,): seed (read as 64 bits) and step (its low 32 bits count).
        layer: index of the tensor in its network, in [0, 2^32).
        step_offset: added to the step: sample j of a batch that is split into several mask samples uses j.
        stream: MASKS, LOGIT_ROUNDING or MOMENT_ROUNDING. A tensor has fewer than 2^63 elements, so the two highest bits
            of the second word are free for it, and no two streams share a counter.

    Returns:
        int64 tensor (numel,) with values in [0, 2^32).

    Raises:
        InputError: a layer outside its range.
    """
    check_layers((layer,))
    blocks = (numel + 3) // 4
    words = torch.empty((blocks, 4), dtype=torch.int64, device=rng_state.device)
    chunk = _CHUNK_CPU if rng_state.device.type == "cpu" else _CHUNK
    for first in range(0, blocks, chunk):
        block = torch.arange(first, min(first + chunk, blocks), device=rng_state.device, dtype=torch.int64)
        words[first : first + chunk] = block_words(block, rng_state, layer, step_offset, stream)
    return words.view(-1)[:numel]


def signed_uniform(words: Tensor) -> Tensor:
    """u as every backend carries it: u itself, and -(1 - u) in the upper tail, where u would round; fp32.

    A word within 2^16 of either end of [0, 2^32) is, read as a signed number, its distance from that end: a tail needs
    no bit beyond the word's 32. Every value in the tails is exact.
    """
    ordinary = (words >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25
    tail = ((words - ((words >> 31) << 32)).to(torch.float32) + 0.5) * 2.0**-32
    return torch.where(tail.abs() < TAIL, tail, ordinary)


def uniform(words: Tensor) -> Tensor:
    """The contract's u of random words (int64), rounded to fp32 and kept below 1; so 0 < u < 1.

    u = ((word >> 8) + 1/2) * 2^-24, but (word + 1/2) * 2^-32 below 2^-16 and above 1 - 2^-16. Draws compare 1 - u
    in the upper tail, which this rounds.
    """
    u = signed_uniform(words)
    return torch.where(u < 0, 1.0 + u, u).clamp_(max=1.0 - 2.0**-24)


def advance_reference(rng_state: Tensor, steps: int) -> Tensor:
    drawn = rng_state.clone()
    rng_state.select(0, 1).add_(steps)
    return drawn


define(
    "advance(Tensor(a!) rng_state, int steps) -> Tensor",
    reference=advance_reference,
    fake=lambda rng_state, steps: torch.empty_like(rng_state),
    one_backend=True,
)


def advance(rng_state: Tensor, steps: int = 1) -> Tensor:
    """Take the noise state of this draw, a copy of `rng_state` (2,), and move `rng_state` on by `steps`.

    It runs on the device without synchronising, so each replay of a CUDA graph moves on and draws new noise.
    An operation of its own, because a compiler may otherwise read the advanced state in the backward pass.
    """
    drawn: Tensor = call("advance", rng_state, steps)
    return drawn
