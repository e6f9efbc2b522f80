"""bank_linear_union: the union of several domains' kept weights is enough for a mixed batch of all of them."""

from __future__ import annotations

import pytest
import torch

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops.union import Bytes, bytes_of, smallest


@pytest.fixture(params=["reference", None], ids=["reference", "default"])
def backend(request):
    with dwm.use_backend(request.param):
        yield


def case(n: int, k: int, domains: int, kept: float = 0.3):
    """A weight whose elements outside of the union are NaN, masks, bits (D, nbytes), values and row starts."""
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator)
    masks = [torch.rand(n, k, generator=generator) < kept for _ in range(domains)]
    union = torch.stack(masks).any(0)
    bits = torch.stack([ops.pack([mask]) for mask in masks])
    values, starts = ops.keep_union(weight.masked_fill(~union, torch.nan), bits)
    assert torch.equal(values[: -ops.PADDING], weight[union])
    assert starts.tolist() == [0, *union.sum(1).cumsum(0).tolist()]
    return weight, masks, bits, values, starts


@pytest.mark.parametrize("counts", [[2, 1], [1, 0, 3], [5, 17, 2, 40], [0, 0, 4], [3]], ids=str)
@pytest.mark.parametrize(("n", "k"), [(6, 5), (37, 53), (20, 4101)])
@pytest.mark.usefixtures("poison")
def test_it_is_bit_for_bit_what_all_weights_give(backend, counts, n, k):
    weight, masks, bits, values, starts = case(n, k, len(counts))
    x, offsets = torch.randn(sum(counts), k), torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    for bias in (None, torch.randn(n), torch.randn(len(counts), n)):
        y = ops.bank_linear_union(x, values, starts, bits, bias, offsets, len(x))
        assert torch.equal(y, ops.bank_linear(x, weight, bits, bias, offsets, len(x)))
    terms = k + 2  # of a sum in fp32, in whatever order
    for d, mask in enumerate(masks):
        part = slice(int(offsets[d]), int(offsets[d + 1]))
        exact = x[part].double() @ torch.where(mask, weight, 0).double().T + bias[d].double()
        size = x[part].double().abs() @ torch.where(mask, weight, 0).double().abs().T + bias[d].double().abs()
        assert ((y[part].double() - exact).abs() <= terms * 2.0**-24 / (1 - terms * 2.0**-24) * size).all()


def test_a_weight_that_another_domain_keeps_is_none_of_mine(backend):
    weight, masks, bits, _, _ = case(8, 40, 2)
    weight[masks[0] & ~masks[1]] = torch.nan
    values, starts = ops.keep_union(weight, bits)
    y = ops.bank_linear_union(torch.ones(4, 40), values, starts, bits, None, torch.tensor([0, 2, 4]), 4)
    assert torch.isfinite(y[2:]).all()
    assert y[:2].isnan().any()


def test_rows_of_tokens_and_rows_of_bits_that_lie_apart(backend):
    weight, _, bits, values, starts = case(12, 21, 3)
    wide = torch.zeros(3, bits.shape[1] + 9, dtype=torch.uint8)
    wide[:, 5:-4] = bits
    x, offsets = torch.randn(5, 3, 21), torch.tensor([0, 2, 2, 5])
    y = ops.bank_linear_union(x, values, starts, wide[:, 5:-4], None, offsets, 5)
    assert y.shape == (5, 3, 12)
    assert torch.equal(y, ops.bank_linear(x, weight, bits, None, offsets, 5))
    torch.library.opcheck(torch.ops.dwm_fast.bank_linear_union, (x, values, starts, bits, None, offsets, 5))


def test_other_dtypes_are_the_references():
    weight, _, bits, values, starts = case(12, 21, 2)
    x, offsets = torch.randn(4, 21), torch.tensor([0, 1, 4])
    for low in (torch.bfloat16, torch.float64):
        y = ops.bank_linear_union(x.to(low), values.to(low), starts, bits, None, offsets, 4)
        assert torch.equal(y, ops.bank_linear(x.to(low), weight.to(low), bits, None, offsets, 4))


def test_wrong_arguments_are_named(backend):
    _, _, bits, values, starts = case(6, 5, 2)
    x, offsets = torch.ones(2, 5), torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match=r"row_starts: given torch.int32 of shape \(7,\); expected int64"):
        ops.bank_linear_union(x, values, starts.int(), bits, None, offsets, 2)
    with pytest.raises(InputError, match=r"values: given torch\.int64"):
        ops.bank_linear_union(x, values.long(), starts, bits, None, offsets, 2)
    with pytest.raises(InputError, match="bits: given"):
        ops.bank_linear_union(torch.ones(2, 50), values, starts, bits, None, offsets, 2)
    with pytest.raises(InputError, match="rise from 0 to 2"):
        ops.bank_linear_union(x, values, starts, bits, None, torch.tensor([0, 2, 1]), 2)
    with pytest.raises(InputError, match=r"no gradient; use bank_linear"):
        ops.bank_linear_union(x.requires_grad_(True), values, starts, bits, None, offsets, 2)


def test_a_store_that_does_not_fit_its_bits_is_refused_before_its_values_are_read():
    _, _, bits, values, starts = case(40, 64, 2)
    flipped = bits.clone()
    flipped[0, 3] ^= 255
    with dwm.use_backend("cpp"), pytest.raises(RuntimeError, match="count different numbers of kept weights"):
        ops.bank_linear_union(torch.ones(2, 64), values, starts, flipped, None, torch.tensor([0, 1, 2]), 2)


@pytest.mark.parametrize(
    ("kept", "union", "expected"),
    [
        ((30, 30), 40, "union"),  # 40 of 60
        ((30, 30), 46, "separate"),  # a quarter of 60 is not saved
        ((30, 30), 45, "union"),
        ((40, 40), 50, "union"),
        ((40, 40), 51, "separate"),  # more than half: reading all of them costs no more
        ((50, 50), 90, "dense"),  # as many as there are
        ((40, 40, 40), 60, "dense"),
        ((51, 20), 60, "dense"),  # a domain that keeps more than half
        ((10,) * 4, 20, "union"),
        ((10,) * 5, 20, "separate"),  # of five domains none is made
        ((30,), 30, "separate"),
        ((), 0, "dense"),
    ],
)
def test_the_smallest_store_is_chosen_by_counts(kept, union, expected):
    assert smallest(100, kept, union) == expected


def test_bytes_count_the_bits_of_every_domain():
    assert bytes_of(100, 4, (30, 30), 40) == Bytes(400 + 26, 240 + 26, 160 + 26)
