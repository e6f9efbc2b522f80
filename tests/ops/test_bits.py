"""bits: the layout, and every operation on it, against NumPy and sets."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dwm_fast import ops, use_backend
from dwm_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("reference", "poison")

SHAPES = [(3, 5), (128,), (129,), (), (0,), (1,), (2, 3, 3, 3), (16, 8)]


def _masks(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(s, generator=generator) < 0.4 for s in shapes]


def _packed(masks: list[torch.Tensor]) -> bytes:
    parts = [np.packbits(m.numpy().reshape(-1), bitorder="little").tobytes() for m in masks]
    return b"".join(p + bytes(-len(p) % 16) for p in parts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.booleans(), max_size=300), max_size=5))
def test_pack_has_the_documented_layout_and_unpack_inverts_it(lists):
    with use_backend("reference"):
        masks = [torch.tensor(values, dtype=torch.bool) for values in lists]
        bits = ops.pack(masks)
        assert bytes(bits.numpy()) == _packed(masks)
        numels = [m.numel() for m in masks]
        assert all(torch.equal(a, b) for a, b in zip(ops.unpack(bits, numels), masks, strict=True))
        assert ops.count(bits, numels).tolist() == [sum(values) for values in lists]


def test_sizes_and_offsets_are_multiples_of_sixteen_bytes():
    assert [ops.packed_nbytes(n) for n in (0, 1, 127, 128, 129, 11_166_912)] == [0, 16, 16, 16, 32, 1_395_872]
    assert ops.packed_offsets([1, 0, 129, 128]) == [0, 16, 16, 48, 64]
    assert ops.packed_offsets([]) == [0]


def test_the_first_weight_is_the_lowest_bit():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[2, 1] = True
    assert ops.pack([mask]).tolist() == [1, 2] + [0] * 14


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float16])
def test_any_nonzero_value_is_kept(dtype):
    values = torch.tensor([0, 2, 0, 128, 1, 0], dtype=dtype)
    assert ops.pack([values])[0] == 0b011010
    if dtype.is_floating_point:
        odd = torch.tensor([-0.0, -1e-3, math.inf, math.nan, 0.0], dtype=dtype)
        assert ops.pack([odd])[0] == 0b01110


def test_strided_masks_are_packed_in_logical_order():
    masks = _masks((4, 6, 3, 3), (10, 7))
    expected = ops.pack(masks)
    strided = [masks[0].to(memory_format=torch.channels_last), masks[1].t().contiguous().t()]
    assert torch.equal(ops.pack(strided), expected)
    assert torch.equal(ops.pack([masks[0].float(), masks[1].to(torch.int32)]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_apply_keeps_weights_bit_for_bit_and_writes_plus_zero_elsewhere(dtype):
    masks = _masks(*SHAPES)
    weights = [-torch.rand(s).to(dtype) for s in SHAPES]
    weights[1][:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    out = ops.apply(ops.pack(masks), weights)
    for o, w, m in zip(out, weights, masks, strict=True):
        assert o.dtype == dtype
        assert o.shape == w.shape
        assert torch.equal(o[m].view(torch.uint8), w[m].view(torch.uint8))
        assert not o[~m].any()
        assert not o[~m].signbit().any()


def test_apply_keeps_strides():
    (mask,) = _masks((4, 6, 3, 3))
    weight = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    (out,) = ops.apply(ops.pack([mask]), [weight])
    assert out.stride() == weight.stride()
    assert torch.equal(out, weight * mask)


def test_apply_passes_gradients_through_kept_weights_alone():
    masks = _masks((5, 4), (3,), (7,))
    weights = [torch.randn(m.shape, requires_grad=True) for m in masks]
    out = ops.apply(ops.pack(masks), weights)
    (out[0].square().sum() + out[2].sum()).backward()
    assert torch.equal(weights[0].grad, 2 * weights[0].detach() * masks[0])
    assert torch.equal(weights[2].grad, masks[2].float())
    assert weights[1].grad is None or not weights[1].grad.any()


def test_combine_is_the_set_operation_on_masks():
    a, b = _masks(*SHAPES, seed=1), _masks(*SHAPES, seed=2)
    pairs = list(zip(a, b, strict=True))
    for op, expected in {
        "and": [x & y for x, y in pairs],
        "or": [x | y for x, y in pairs],
        "xor": [x ^ y for x, y in pairs],
        "andnot": [x & ~y for x, y in pairs],
    }.items():
        assert bytes(ops.combine(ops.pack(a), ops.pack(b), op).numpy()) == _packed(expected), op


def test_overlap_and_jaccard_count_intersections_and_unions():
    a, b = _masks(*SHAPES, seed=1), _masks(*SHAPES, seed=2)
    numels = [m.numel() for m in a]
    both = [int((x & y).sum()) for x, y in zip(a, b, strict=True)]
    either = [int((x | y).sum()) for x, y in zip(a, b, strict=True)]
    result = ops.overlap(ops.pack(a), ops.pack(b), numels)
    assert result.dtype == torch.int64
    assert result.tolist() == [list(pair) for pair in zip(both, either, strict=True)]
    assert ops.jaccard(ops.pack(a), ops.pack(b), numels) == sum(both) / sum(either)
    assert ops.jaccard(ops.pack(a), ops.pack(a), numels) == 1.0


def test_no_tensors_at_all():
    bits = ops.pack([])
    assert bits.shape == (0,)
    assert bits.dtype == torch.uint8
    assert ops.unpack(bits, []) == []
    assert ops.apply(bits, []) == []
    assert ops.count(bits, []).shape == (0,)
    assert ops.overlap(bits, bits, []).shape == (0, 2)
    assert ops.jaccard(bits, bits, []) == 1.0


def test_wrong_buffers_are_named():
    bits = ops.pack(_masks((200,)))
    with pytest.raises(InputError, match=r"shape \(32,\), expected uint8 of shape \(16,\) for 1 tensors of 100"):
        ops.unpack(bits, [100])
    with pytest.raises(InputError, match=r"torch.int32"):
        ops.count(bits.int(), [200])
    with pytest.raises(InputError, match=r"expected uint8 of shape \(16,\)"):
        ops.apply(bits, [torch.zeros(10, 10)])
    with pytest.raises(InputError, match=r"shape \(2, 16\)"):
        ops.overlap(bits, bits.view(2, 16), [200])
    with pytest.raises(InputError, match="op 'nand'; expected one of and, or, xor, andnot"):
        ops.combine(bits, bits, "nand")
    with pytest.raises(InputError, match="uint8, of equal length"):
        ops.combine(bits, bits[:16], "and")
    with pytest.raises(InputError, match="uint8, of equal length"):
        ops.combine(bits.bool(), bits.bool(), "andnot")


def test_bit_operations_are_well_formed():
    masks, numels = _masks((5, 3), (130,)), [15, 130]
    a, b = ops.pack(masks), ops.pack(_masks((5, 3), (130,), seed=4))
    weights = [torch.randn(5, 3, requires_grad=True), torch.randn(130)]
    namespace = torch.ops.dwm_fast
    for op, args in (
        (namespace.pack, (masks,)),
        (namespace.unpack, (a, numels)),
        (namespace.apply, (a, weights)),
        (namespace.count, (a, numels)),
        (namespace.combine, (a, b, "xor")),
        (namespace.overlap, (a, b, numels)),
    ):
        torch.library.opcheck(op.default, args)
