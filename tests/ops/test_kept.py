"""linear_kept: a product from kept weights alone equals masking first and multiplying then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dwm_fast import ops
from dwm_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("reference", "poison")


def _problem(n: int = 6, k: int = 5, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(n, k, generator=generator, dtype=dtype)
    mask = torch.rand(n, k, generator=generator) < 0.4
    bits = ops.pack([mask])
    return torch.where(mask, weight, 0), bits, *ops.keep_values(weight.masked_fill(~mask, torch.nan), bits)


def test_storage_is_what_the_format_says():
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    bits = ops.pack([torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])])
    values, starts = ops.keep_values(weight, bits)
    assert values.tolist() == [1, 3, 8, 9] + [0] * ops.PADDING
    assert starts.tolist() == [0, 2, 2, 4]
    assert ops.expand_values(values, bits, (3, 3)).tolist() == [[1, 0, 3], [0, 0, 0], [0, 8, 9]]
    assert ops.PADDING * torch.bfloat16.itemsize == 64


def test_values_are_in_logical_order_whatever_the_strides():
    weight, mask = torch.randn(4, 7), torch.rand(4, 7) < 0.5
    bits = ops.pack([mask])
    assert torch.equal(ops.keep_values(weight.t().contiguous().t(), bits)[0], ops.keep_values(weight, bits)[0])


@pytest.mark.parametrize("x_shape", [(4,), (), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_product_with_the_masked_weight_and_so_are_its_gradients(x_shape, with_bias):
    masked, bits, values, starts = _problem()
    x, bias = torch.randn(*x_shape, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    leaves = [x, bias] if with_bias else [x]
    expected = F.linear(x, masked, bias if with_bias else None)
    got = ops.linear_kept(x, values, starts, bits, bias if with_bias else None)
    assert torch.equal(got, expected)
    grad = torch.randn(got.shape)
    for a, e in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, e)
    with torch.no_grad():
        assert torch.equal(ops.linear_kept(x, values, starts, bits, bias), F.linear(x, masked, bias))


def test_gradcheck_and_opcheck():
    _, bits, values, starts = _problem(dtype=torch.float64)
    x, bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear_kept(x, values, starts, bits, b), (x, bias))
    torch.library.opcheck(torch.ops.dwm_fast.linear_kept.default, (x, values, starts, bits, bias))


def test_the_input_decides_the_dtype_and_autocast_is_respected():
    masked, bits, values, starts = _problem()
    x = torch.randn(3, 5)
    y = ops.linear_kept(x.bfloat16(), values, starts, bits)
    assert torch.equal(y, F.linear(x.bfloat16(), masked.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.linear_kept(x, values, starts, bits), y)


def test_kept_weights_are_frozen_and_the_second_derivative_is_refused():
    _, bits, values, starts = _problem()
    with pytest.raises(InputError, match="no gradient for its values"):
        ops.linear_kept(torch.ones(2, 5), values.requires_grad_(True), starts, bits).sum().backward()
    x = torch.ones(2, 5, requires_grad=True)
    y = ops.linear_kept(x, values.detach(), starts, bits)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match="differentiable once"):
        dx.sum().backward()


def test_wrong_arguments_are_named():
    _, bits, values, starts = _problem()
    x = torch.ones(2, 5)
    with pytest.raises(InputError, match=r"row_starts: given torch.int32 of shape \(7,\), expected int64 \(N \+ 1,\)"):
        ops.linear_kept(x, values, starts.int(), bits)
    with pytest.raises(InputError, match=r"values: given torch.float32 of shape \(3,\), expected a floating dtype"):
        ops.linear_kept(x, values[:3], starts, bits)
    with pytest.raises(InputError, match="packed bits: given"):
        ops.linear_kept(torch.ones(2, 50), values, starts, bits)
    with pytest.raises(InputError, match="packed bits: given"):
        ops.keep_values(torch.ones(50, 50), bits)


def test_kept_weights_are_chosen_where_they_win():
    large = torch.empty(2048, 2048, device="meta")
    assert not ops.is_faster_kept(large, 1)  # not on a CPU
    large = torch.empty(1).expand(2048, 2048)
    assert ops.is_faster_kept(large, 2**21)
    assert not ops.is_faster_kept(large, 2**21 + 1)
    assert not ops.is_faster_kept(large[1:], 1)
    assert ops.is_faster_kept(large.bfloat16(), 1)
    for dtype in (torch.float64, torch.float16):
        assert not ops.is_faster_kept(large.to(dtype), 1)
