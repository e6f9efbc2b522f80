"""Packed bits are exact: order, padding, counts and set operations against NumPy."""

import numpy as np
import pytest
import torch

from dwm_fast.kernels import bits as kernels
from dwm_fast.kernels._launch import override_launch

SHAPES = [(1,), (128,), (129,), (31, 7), (8, 16, 3, 3), (3, 48, 3, 3), (4, 3, 7, 7), (0,), (40, 12)]
NUMELS = [int(np.prod(s)) for s in SHAPES]


@pytest.fixture(params=[{}, {"block": 128, "strided": 128, "groups": 32}], ids=["default", "small"], autouse=True)
def _tiles(request):
    with override_launch(**request.param):
        yield


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def layout(request):
    return request.param


def make_masks(device, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(s, generator=generator) < 0.4 for s in SHAPES]
    return [(m.contiguous(memory_format=layout) if m.dim() == 4 else m).to(device) for m in masks]


def logical(mask):
    return mask.cpu().contiguous().numpy().reshape(-1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int64])
def test_pack_is_lsb_first_on_fresh_16_bytes(device, oracle, layout, dtype):
    masks = make_masks(device, layout)
    packed = kernels.pack([-2 * m.to(dtype) if dtype != torch.bool else m for m in masks])
    np.testing.assert_array_equal(packed.cpu().numpy(), oracle.bits([logical(m) for m in masks]))


def test_unpack_inverts_pack(device, oracle, layout):
    masks = make_masks(device, layout)
    packed = torch.from_numpy(oracle.bits([logical(m) for m in masks])).to(device)
    for flat, mask in zip(kernels.unpack(packed, NUMELS), masks, strict=True):
        assert flat.dtype == torch.bool
        np.testing.assert_array_equal(flat.cpu().numpy(), logical(mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_keeps_values_and_strides(device, oracle, layout, dtype):
    masks = make_masks(device, layout)
    packed = torch.from_numpy(oracle.bits([logical(m) for m in masks])).to(device)
    weights = [torch.randn(s).to(device, dtype) for s in SHAPES]
    weights = [w.contiguous(memory_format=layout) if w.dim() == 4 else w for w in weights]
    weights[-1] = weights[-1].t().contiguous().t()
    for out, weight, mask in zip(kernels.apply(packed, weights), weights, masks, strict=True):
        assert out.dtype == dtype
        assert out.stride() == weight.stride()
        assert torch.equal(out, torch.where(mask, weight, 0))
        assert not torch.signbit(out[~mask]).any()


def test_counts_and_overlaps(device, oracle):
    masks = [[logical(m) for m in make_masks(device, torch.contiguous_format, seed)] for seed in (1, 2)]
    a, b = (torch.from_numpy(oracle.bits(m)).to(device) for m in masks)
    assert kernels.count(a, NUMELS).tolist() == [int(m.sum()) for m in masks[0]]
    both = [[int((x & y).sum()), int((x | y).sum())] for x, y in zip(*masks, strict=True)]
    assert kernels.overlap(a, b, NUMELS).tolist() == both
    full = torch.full_like(a, 255)
    assert kernels.count(full, [8 * len(full)]).tolist() == [8 * len(full)]


@pytest.mark.parametrize(
    ("op", "rule"),
    [("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor), ("andnot", lambda x, y: x & ~y)],
)
@pytest.mark.parametrize("length", [16, 4096 + 16, 0])
def test_combinations(device, op, rule, length):
    rng = np.random.default_rng(3)
    a, b = (rng.integers(0, 256, length, dtype=np.uint8) for _ in range(2))
    out = kernels.combine(torch.from_numpy(a).to(device), torch.from_numpy(b).to(device), op)
    np.testing.assert_array_equal(out.cpu().numpy(), rule(a, b))


def test_no_tensors():
    assert kernels.pack([]).numel() == 0
    assert kernels.unpack(torch.zeros(0, dtype=torch.uint8), []) == []
    assert kernels.apply(torch.zeros(0, dtype=torch.uint8), []) == []
    assert kernels.count(torch.zeros(0, dtype=torch.uint8), []).shape == (0,)
