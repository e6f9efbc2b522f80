"""bank_linear and bank_conv2d: a mixed batch is what its domains give one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops.bank import bank_conv2d, bank_linear

COUNTS = ([3, 0, 1, 4], [0, 0, 0, 5], [1, 1, 1, 1], [8])


def _case(counts: list[int], shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Weight, bool mask per domain, bits (D, nbytes), offsets (D + 1,)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    masks = [torch.rand(shape, generator=generator) < 0.5 for _ in counts]
    bits = torch.stack([ops.pack([mask]) for mask in masks])
    return weight, masks, bits, torch.tensor([0, *counts]).cumsum(0)


def _parts(counts: list[int]) -> list[slice]:
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


SHAPES = [(5, 7), (16, 128), (1, 3), (2049, 515)]


@pytest.mark.parametrize("counts", [*COUNTS, [20, 2, 0, 9]])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_loop_over_domains_exactly(counts: list[int], shape: tuple[int, int], poison: None) -> None:
    weight, masks, bits, offsets = _case(counts, shape)
    x, bias = torch.randn(sum(counts), shape[1]), torch.randn(shape[0])
    with dwm_fast.use_backend("reference"):
        plain = bank_linear(x, weight, bits, bias, offsets, len(x))
    mixed = bank_linear(x, weight, bits, bias, offsets, len(x))
    for domain, part in enumerate(_parts(counts)):
        if part.start < part.stop:
            assert torch.equal(plain[part], F.linear(x[part], torch.where(masks[domain], weight, 0.0), bias))
            assert torch.equal(mixed[part], ops.linear_packed(x[part], weight, bits[domain], bias))


@pytest.mark.parametrize("counts", [*COUNTS, [20, 2, 0, 9]])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_integers_are_exact_whoever_computes_them(counts: list[int], shape: tuple[int, int]) -> None:
    weight, masks, bits, offsets = _case(counts, shape)
    x, weight = torch.randint(-3, 4, (sum(counts), shape[1])).float(), weight.mul(2).round()
    y = bank_linear(x, weight, bits, None, offsets, len(x))
    for domain, part in enumerate(_parts(counts)):
        assert torch.equal(y[part], x[part] @ (weight * masks[domain]).T)


def test_linear_takes_a_bias_per_domain_and_rows_that_belong_to_one_sample() -> None:
    counts = [2, 1, 3]
    weight, masks, bits, offsets = _case(counts, (6, 10))
    x, bias = torch.randn(6, 4, 10), torch.randn(3, 6)
    y = bank_linear(x, weight, bits, bias, offsets, 6)
    assert y.shape == (6, 4, 6)
    for domain, part in enumerate(_parts(counts)):
        exact = x[part].double() @ (weight * masks[domain]).double().T + bias[domain].double()
        torch.testing.assert_close(y[part].double(), exact, rtol=0, atol=1e-5)


def test_bits_may_be_columns_of_a_larger_buffer() -> None:
    weight, _, bits, offsets = _case([2, 2], (3, 50))
    wide = torch.full((2, 4 * bits.shape[1]), 255, dtype=torch.uint8)
    inside = slice(bits.shape[1], 2 * bits.shape[1])
    wide[:, inside] = bits
    x = torch.randn(4, 50)
    expected = bank_linear(x, weight, bits, None, offsets, 4)
    assert torch.equal(bank_linear(x, weight, wide[:, inside], None, offsets, 4), expected)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_equals_the_loop_over_domains_exactly(
    counts: list[int], groups: int, memory_format: torch.memory_format, poison: None
) -> None:
    weight, masks, bits, offsets = _case(counts, (6, 4 // groups, 3, 3))
    x = torch.randn(sum(counts), 4, 9, 8).contiguous(memory_format=memory_format)
    geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": groups}
    y = bank_conv2d(x, weight, bits, None, offsets, len(x), **geometry)
    for part, mask in zip(_parts(counts), masks, strict=True):
        if part.start < part.stop:
            expected = F.conv2d(x[part], torch.where(mask, weight, 0.0), None, **geometry)
            assert torch.equal(y[part], expected)
    assert y.is_contiguous(memory_format=memory_format)


def test_an_empty_batch_gives_an_empty_result() -> None:
    weight, _, bits, offsets = _case([0, 0], (3, 5))
    assert bank_linear(torch.empty(0, 5), weight, bits, None, offsets, 0).shape == (0, 3)
    weight, _, bits, offsets = _case([0, 0], (3, 5, 3, 3))
    assert bank_conv2d(torch.empty(0, 5, 8, 8), weight, bits, None, offsets, 0).shape == (0, 3, 6, 6)


def test_low_precision_results_stay_within_the_error_of_their_dtype() -> None:
    counts = [3, 2]
    weight, masks, bits, offsets = _case(counts, (32, 64))
    weight, x = weight.bfloat16(), torch.randn(5, 64).bfloat16()
    y = bank_linear(x, weight, bits, None, offsets, 5)
    assert y.dtype == torch.bfloat16
    for part, mask in zip(_parts(counts), masks, strict=True):
        exact = x[part].double() @ (weight * mask).double().T
        plain = (x[part].float() @ (weight * mask).float().T).bfloat16().double()
        bound = 2 * ((plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())
        assert (y[part].double() - exact).abs().max() <= bound


def test_gradients_are_those_of_the_loop_over_domains() -> None:
    counts = [2, 0, 3]
    weight, masks, bits, offsets = _case(counts, (4, 2, 3, 3))
    weight, bias = weight.double().requires_grad_(), torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    parts = zip(_parts(counts), masks, bias, strict=True)
    looped = torch.cat([F.conv2d(x[p], torch.where(m, weight, 0.0), b) for p, m, b in parts])
    mixed = bank_conv2d(x, weight, bits, bias, offsets, 5)
    grad = torch.randn_like(mixed)
    wanted = torch.autograd.grad(looped, (x, weight, bias), grad)
    found = torch.autograd.grad(mixed, (x, weight, bias), grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_linear_passes_gradcheck() -> None:
    weight, _, bits, offsets = _case([1, 2], (3, 5))
    x, bias = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight.double(), bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: bank_linear(x, w, bits, b, offsets, 3), inputs)


def test_the_registered_operations_pass_torchs_own_check() -> None:
    weight, _, bits, offsets = _case([2, 1], (4, 6))
    x = torch.randn(3, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.dwm_fast.bank_linear, (x, weight, bits, None, offsets, 3))
    weight, _, bits, offsets = _case([2, 1], (4, 2, 3, 3))
    x, geometry = torch.randn(3, 2, 5, 5, requires_grad=True), ([1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.dwm_fast.bank_conv2d, (x, weight, bits, None, offsets, 3, *geometry))


def test_wrong_arguments_are_named() -> None:
    weight, _, bits, offsets = _case([2, 1], (4, 6))
    x = torch.randn(3, 6)
    with pytest.raises(InputError, match="bits"):
        bank_linear(x, weight, bits[:, :-1], None, offsets, 3)
    with pytest.raises(InputError, match="offsets"):
        bank_linear(x, weight, bits, None, offsets[:-1], 3)
    with pytest.raises(InputError, match="3 rows, which 2 samples"):
        bank_linear(x, weight, bits, None, offsets, 2)
    with pytest.raises(InputError, match="bias"):
        bank_linear(x, weight, bits, torch.randn(5), offsets, 3)


@pytest.mark.parametrize("offsets", [[0, 2, 3], [1, 2, 4], [0, 3, 2], [0, 5, 4], [0, 2, 5], [-1, 2, 4]], ids=str)
@pytest.mark.parametrize("backend", ["reference", None])
def test_offsets_that_do_not_cover_every_row_are_refused(offsets, backend):
    weight, _, bits, _ = _case([2, 2], (3, 50))
    image, _, image_bits, _ = _case([2, 2], (3, 2, 3, 3))
    with dwm_fast.use_backend(backend):
        with pytest.raises(InputError, match="expected numbers that rise from 0 to 4"):
            bank_linear(torch.randn(4, 50), weight, bits, None, torch.tensor(offsets), 4)
        with pytest.raises(InputError, match="expected numbers that rise from 0 to 4"):
            bank_conv2d(torch.randn(4, 2, 5, 5), image, image_bits, None, torch.tensor(offsets), 4)
