"""Filters laid out once: torch's own convolution, bit for bit, and only where torch would ask the same library."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn.functional as F

from dwm_fast.ops.filters import Blocked, fit_blocked

X86 = platform.machine() in ("x86_64", "AMD64")
HOW = ((1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize(
    ("shape", "size", "how"),
    [
        ((64, 64, 3, 3), 16, HOW),
        ((128, 64, 3, 3), 9, ((2, 2), (1, 1), (1, 1), 1)),
        ((512, 512, 3, 3), 2, HOW),
        ((16, 48, 5, 2), 11, ((1, 3), (0, 2), (2, 1), 1)),
        ((32, 16, 1, 3), 5, ((1, 1), (0, 0), (1, 1), 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_torchs_convolution_at_every_batch_size(shape, size, how, threads):
    weight, before = torch.randn(shape), torch.get_num_threads()
    x = torch.randn(3, shape[1], size, size + 1)
    assert fit_blocked(x, weight, None, how) is X86
    if not X86:
        return
    filters = Blocked(weight, x, how)
    assert filters.nbytes == 4 * weight.numel()
    try:
        torch.set_num_threads(threads)
        for images in (x, torch.randn(17, *x.shape[1:]), torch.randn(2, shape[1], size + 4, size + 3)):
            assert fit_blocked(images, weight, None, how)
            y, expected = filters.conv2d(images), F.conv2d(images, weight, None, *how)
            assert torch.equal(y, expected)
            assert y.stride() == expected.stride()
    finally:
        torch.set_num_threads(before)


def test_what_torch_would_compute_otherwise_is_refused():
    x, weight = torch.randn(3, 32, 6, 6), torch.randn(16, 32, 3, 3)
    assert fit_blocked(x, weight, None, HOW) is X86
    last = torch.channels_last
    refused = [
        (x.contiguous(memory_format=last), weight, None, HOW),
        (x, weight.contiguous(memory_format=last), None, HOW),
        (x.bfloat16(), weight, None, HOW),
        (x, weight.double(), None, HOW),
        (x, weight, torch.zeros(16), HOW),
        (x[:, :24], weight[:, :24].contiguous(), None, HOW),  # no whole blocks
        (x, weight[:8], None, HOW),
        (x, weight[:, :16].contiguous(), None, (*HOW[:3], 2)),
        (x, weight[..., :1, :1].contiguous(), None, HOW),
        (x[:1], weight, None, HOW),  # torch has a way of its own for one small image
        (x.requires_grad_(True), weight, None, HOW),
    ]
    assert [fit_blocked(*case) for case in refused] == [False] * len(refused)
    with torch.no_grad():
        assert fit_blocked(x, weight, None, HOW) is X86
