"""The device's noise is the contract's noise, word for word."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dwm_fast.kernels.philox import (
    block_words4,
    hard_keep,
    seed_and_step,
    soft_slope,
    soft_value,
    uniform,
    words4,
)
from dwm_fast.ops.philox import signed_uniform

KNOWN = [  # Random123's known answers for Philox4x32-10: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _words_kernel(out, rng_state, counters, SPLIT: tl.constexpr):
    seed, step = seed_and_step(rng_state, 0)
    layer = tl.load(counters + 2).to(tl.uint32)
    if SPLIT:
        low, high = tl.load(counters).to(tl.uint32), tl.load(counters + 1).to(tl.uint32)
        words = words4(seed, step, layer, low, high)
    else:
        words = block_words4(seed, step, layer, (tl.load(counters + 1) << 32) | tl.load(counters))
    for i in tl.static_range(4):
        tl.store(out + i, words[i].to(tl.int64))


BLOCK = 1024 if torch.cuda.is_available() else 2**14  # the interpreter takes its time per program, not per word
"""Words of a program; all of them in one would be unrolled thousands of times."""


@triton.jit
def _uniform_kernel(out, words, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, uniform(tl.load(words + i).to(tl.uint32)))


@triton.jit
def _mask_kernel(keep, soft, slope, words, logit, inverse_tau, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    u = uniform(tl.load(words + i).to(tl.uint32))
    x = tl.zeros([N], tl.float32) + logit
    tl.store(keep + i, hard_keep(x, u).to(tl.float32))
    tl.store(soft + i, soft_value(x, u, inverse_tau))
    tl.store(slope + i, soft_slope(x, u, inverse_tau))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_words_equal_random123(device, oracle, counter, key, expected, split):
    rng = torch.tensor([_signed(key[0] | key[1] << 32), counter[3]], device=device)
    counters = torch.tensor(counter, device=device)
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _words_kernel[(1,)](out, rng, counters, SPLIT=split)
    assert tuple(out.tolist()) == expected
    assert tuple(int(c) for c in oracle.philox([np.array(c) for c in counter], key)) == expected


def _tails_and_more() -> torch.Tensor:
    """Every word of both tails, and as many beside them."""
    return torch.cat([torch.arange(2**17), torch.arange(2**32 - 2**17, 2**32)])


def test_uniform_is_the_references_in_both_tails_and_beside_them(device):
    words = torch.cat([_tails_and_more(), torch.randint(2**32, (2**18,), generator=torch.Generator().manual_seed(1))])
    out = torch.zeros(len(words), device=device)
    _uniform_kernel[(len(words) // BLOCK,)](out, words.to(device), N=BLOCK)
    assert torch.equal(out.cpu(), signed_uniform(words))


@pytest.mark.parametrize("p", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
def test_rare_masks_are_the_references_on_every_word_of_the_tails(device, p):
    words = _tails_and_more()
    for logit in (math.log(p / (1 - p)), math.log((1 - p) / p)):
        keep, soft, slope = (torch.zeros(len(words), device=device) for _ in range(3))
        _mask_kernel[(len(words) // BLOCK,)](keep, soft, slope, words.to(device), logit, 1.25, N=BLOCK)
        u = signed_uniform(words)
        near = u.abs().double()
        argument = (logit + u.sign() * (near.log() - torch.log1p(-near))) * 1.25
        clear = argument.abs() > 2.0**-18  # |l log2 e| < 32 is rounded by 2^-20, lg2 and ex2 are good to 2^-22
        assert (~clear).sum() <= 2
        assert torch.equal(keep.cpu().bool()[clear], (argument > 0)[clear])
        torch.testing.assert_close(soft.cpu().double(), torch.sigmoid(argument), rtol=2.0**-16, atol=0)
        exact = torch.sigmoid(argument) * torch.sigmoid(-argument)
        torch.testing.assert_close(slope.cpu().double(), exact, rtol=2.0**-16, atol=0)
