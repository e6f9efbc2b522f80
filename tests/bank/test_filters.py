"""Masked filters of a mixed batch on a CPU: made once under the bank's budget, and the outputs are the same without."""

from __future__ import annotations

import pytest
import torch

from dwm_fast import ops
from dwm_fast.bank import MaskBank, layers

from . import nets

NAMES = ["photo", "art", "sketch"]
X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([2, 0, 1, 0, 2, 1])
FILTERS = 3 * 4 * (8 * 3 * 9 + 12 * 8 * 9)


def bank(budget: int) -> MaskBank:
    net = nets.small_net()
    made = MaskBank(net, memory_budget=budget)
    for i, name in enumerate(NAMES):
        made.add(name, nets.masks_for(net, i))
    return made


@pytest.fixture
def from_bits(monkeypatch):
    """Counts the convolutions that make their filters from bits."""
    calls = []
    compute = layers.bank_conv2d

    def counted(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(layers, "bank_conv2d", counted)
    return calls


def test_filters_are_kept_where_the_budget_has_room_and_nothing_changes(from_bits):
    roomy, tight = bank(1 << 20), bank(1)
    y = roomy.serve(NAMES)(X, ids=IDS)
    assert not from_bits
    assert torch.equal(tight.serve(NAMES)(X, ids=IDS), y)
    assert len(from_bits) == 2
    half = bank(2 * FILTERS - 2)  # room for the first convolution alone
    assert torch.equal(half.serve(NAMES)(X, ids=IDS), y)
    assert len(from_bits) == 3


def test_they_count_as_bytes_of_the_bank():
    large, small = bank(1 << 20), bank(1)
    large.serve(NAMES)
    small.serve(NAMES)
    assert large.hot_nbytes >= FILTERS
    assert small.hot_nbytes == 0


def test_a_forced_backend_and_another_dtype_take_the_bits(from_bits):
    served = bank(1 << 20).serve(NAMES)
    y = served(X, ids=IDS)
    with ops.use_backend("reference"):
        torch.testing.assert_close(served(X, ids=IDS), y)
    assert len(from_bits) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        served(X, ids=IDS)
    assert len(from_bits) == 4
