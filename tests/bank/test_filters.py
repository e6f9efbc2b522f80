"""Masked filters of a mixed batch on a CPU: made once under the bank's budget, and the outputs are the same without."""

from __future__ import annotations

import pytest
import torch

from dwm_fast import ops
from dwm_fast.bank import MaskBank, layers
from dwm_fast.bank.filters import DomainFilters
from dwm_fast.ops.filters import Blocked, Filters, Plain

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


def test_filters_are_laid_out_once_two_calls_in_a_row_want_that_and_the_bits_stay():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 32, 3, 3, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < 0.5
    filters = DomainFilters(weight, ops.pack([mask]))
    plain, how = torch.where(mask, weight, 0.0), ((2, 2), (1, 1), (1, 1), 1)

    def form_after(rows: int) -> type:
        x = torch.randn(rows, 32, 6, 5, generator=generator)
        assert torch.equal(filters.conv2d(x, None, how), torch.nn.functional.conv2d(x, plain, None, *how))
        return type(filters._form)

    # a batch of one is not given to oneDNN by torch
    assert [form_after(rows) for rows in (3, 1, 3, 3, 2, 1, 4, 1, 1, 5)] == [*[Plain] * 3, *[Blocked] * 5, *[Plain] * 2]
    assert filters.nbytes == 4 * weight.numel()
    bias, last = torch.randn(48), torch.randn(3, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    for x, shift in ((last, None), (torch.randn(3, 32, 6, 5), bias)):
        expected = torch.nn.functional.conv2d(x, plain, shift, *how)
        assert torch.equal(filters.conv2d(x, shift, how), expected)


def test_filters_that_are_larger_laid_out_are_laid_out_once_to_see_that(monkeypatch):
    weight, made = torch.randn(8, 3, 3, 3), []
    filters = DomainFilters(weight, ops.pack([torch.ones_like(weight)]))
    real = Filters.__init__
    monkeypatch.setattr(Filters, "__init__", lambda self, *args: (made.append(1), real(self, *args))[1])
    last = torch.randn(4, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    for _ in range(7):
        filters.conv2d(last, None, ((1, 1), (1, 1), (1, 1), 1))
    assert type(filters._form) is Plain
    assert made == [1]


def test_a_call_computes_in_its_own_form_whatever_form_another_thread_puts_in_its_place():
    weight, how = torch.randn(32, 32, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    filters = DomainFilters(weight, ops.pack([torch.ones_like(weight)]))
    x = torch.randn(4, 32, 9, 9)
    for _ in range(3):
        filters.conv2d(x, None, how)

    class Watched(DomainFilters):
        """The moment after its form is exchanged, another thread has exchanged it again."""

        def __setattr__(self, name, value):
            super().__setattr__(name, Blocked(weight, x, how) if name == "_form" else value)

    filters.__class__ = Watched
    x.requires_grad_(True)
    for _ in range(3):
        x.grad = None
        filters.conv2d(x, None, how).sum().backward()
        assert x.grad is not None


def test_a_mixed_batch_with_filters_laid_out_gives_the_bits_of_a_domain_alone():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 48, 3, stride=2, bias=False)
    ).eval()
    made = MaskBank(net)
    for i, name in enumerate(NAMES):
        made.add(name, nets.masks_for(net, i, names=("0.weight", "2.weight")))
    served = made.serve(NAMES)
    for _ in range(3):
        y = served(X, ids=IDS)
        for i, name in enumerate(NAMES):
            made.activate(name)
            assert torch.equal(y[i == IDS], made(X[i == IDS]))
    held = vars(served._twin.get_submodule("2"))["forward"].filters
    assert {type(one._form) for one in held} == {Blocked}
    last = X.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        y = served(last, ids=IDS)
        for i, name in enumerate(NAMES):
            made.activate(name)
            assert torch.equal(y[i == IDS], made(last[i == IDS]))
    assert all(type(one._form) in (Filters, Plain) for one in held)
    assert all(getattr(one._form, "nbytes", one.nbytes) <= one.nbytes for one in held)
