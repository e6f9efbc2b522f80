"""The device's noise is the contract's noise, word for word."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dwm_fast.kernels.philox import block_words4, seed_and_step, uniform, words4

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


@triton.jit
def _uniform_kernel(out, words, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, uniform(tl.load(words + i).to(tl.uint32)))


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


def test_uniform_stays_inside_the_open_interval(device):
    words = torch.tensor([0, 255, 256, 2**31, 2**32 - 256, 2**32 - 1, 1 << 30, 12345678], device=device)
    out = torch.zeros(8, device=device)
    _uniform_kernel[(1,)](out, words, N=8)
    exact = [((w >> 8) + 0.5) * 2.0**-24 for w in words.tolist()]
    expected = [min(float(np.float32(u)), 1 - 2.0**-24) for u in exact]
    assert out.tolist() == expected
    assert out.min() == 2.0**-25
    assert out.max() == 1 - 2.0**-24
