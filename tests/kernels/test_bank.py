"""Mixed-domain products in Triton stay within the error that fp64 allows, whatever the tiles."""

import pytest
import torch
import torch.nn.functional as F

import dwm_fast
from dwm_fast import ops
from dwm_fast.kernels import bank as kernels
from dwm_fast.kernels._launch import Tiles, override_launch
from dwm_fast.kernels.bank import FEW, FEW_WIDE, MANY
from dwm_fast.ops import backends
from dwm_fast.ops.geometry import Geometry

COUNTS = [[3, 0, 1, 4], [0, 9, 0], [17, 2, 1]]
SMALL = [Tiles(16, 32, 16, group=2), Tiles(16, 32, 16), Tiles(32, 64, 16, group=4)]


@pytest.fixture(params=SMALL, ids=["few", "many", "wide"])
def tiles(request):
    with override_launch(request.param):
        yield request.param


def make_case(device, counts, shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    masks = [torch.rand(shape, generator=generator) < 0.5 for _ in counts]
    bits = torch.stack([ops.pack([mask]) for mask in masks])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    masked = torch.stack([torch.where(m, weight, 0.0) for m in masks])[rows]
    return weight.to(device), bits.to(device), offsets.to(device), masked


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_within_budget(y, formula, *operands):
    """DESIGN's budget: `formula` in fp64 is exact; in fp32, rounded to y's dtype, it is the low-precision result."""
    exact = formula(*(t.double() for t in operands))
    low = formula(*(t.float() for t in operands)).to(y.dtype).double()
    bound = 2 * ((low - exact).abs().max() + torch.finfo(y.dtype).eps * exact.abs().max())
    assert y.isfinite().all()
    assert (y.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("shape", [(40, 64), (33, 50), (16, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_the_loop_over_domains(device, tiles, counts, shape, dtype):
    weight, bits, offsets, masked = make_case(device, counts, shape, dtype)
    x, bias = randn(sum(counts), shape[1], seed=1).to(dtype), randn(shape[0], seed=2).to(dtype)
    y = kernels.bank_linear(x.to(device), weight, bits, bias.to(device), offsets, len(x))
    assert y.dtype == dtype
    assert_within_budget(y, lambda x, w, b: torch.einsum("mk,mnk->mn", x, w) + b, x, masked, bias)


def test_the_operations_are_computed_here_where_triton_computes(device, tiles, monkeypatch):
    counts = [2, 0, 3]
    weight, bits, offsets, _ = make_case(device, counts, (6, 4, 3, 3))
    x = randn(5, 4, 7, 7, seed=1).to(device)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    expected = kernels.bank_conv2d(x, weight, bits, None, offsets, 5, geometry)
    monkeypatch.setitem(backends.REFERENCES, "bank_linear", None)
    with dwm_fast.use_backend("triton"):
        assert torch.equal(ops.bank_conv2d(x, weight, bits, None, offsets, 5, padding=(1, 1)), expected)
        flat = (x.flatten(1)[:, :36], weight.flatten(1), bits, None, offsets, 5)
        assert torch.equal(ops.bank_linear(*flat), kernels.bank_linear(*flat))


def test_biases_may_be_per_domain_and_samples_may_have_many_rows(device, tiles):
    counts = [2, 0, 3]
    weight, bits, offsets, masked = make_case(device, counts, (24, 96))
    x, bias = randn(5, 7, 96, seed=1), randn(3, 24, seed=2)
    y = kernels.bank_linear(x.to(device), weight, bits, bias.to(device), offsets, 5)
    rows = bias[[0, 0, 2, 2, 2], None]
    assert_within_budget(y, lambda x, w, b: torch.einsum("mtk,mnk->mtn", x, w) + b, x, masked, rows)


def test_bits_may_be_columns_of_a_larger_buffer(device, tiles):
    weight, bits, offsets, _ = make_case(device, [2, 2], (16, 32))
    wide = torch.full((2, 3 * bits.shape[1]), 255, dtype=torch.uint8, device=device)
    inside = slice(bits.shape[1], 2 * bits.shape[1])
    wide[:, inside] = bits
    x = randn(4, 32, seed=1).to(device)
    expected = kernels.bank_linear(x, weight, bits, None, offsets, 4)
    assert torch.equal(kernels.bank_linear(x, weight, wide[:, inside], None, offsets, 4), expected)


def test_small_integers_are_exact(device, tiles):
    counts = [3, 1, 4]
    weight, bits, offsets, masked = make_case(device, counts, (48, 160))
    weight, masked = weight.mul(2).round(), masked.mul(2).round()
    x = torch.randint(-4, 5, (8, 160), generator=torch.Generator().manual_seed(1)).float()
    y = kernels.bank_linear(x.to(device), weight, bits, None, offsets, 8)
    assert torch.equal(y.cpu().double(), torch.einsum("mk,mnk->mn", x.double(), masked.double()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_is_the_loop_over_domains(device, tiles, memory_format, groups):
    counts = [2, 0, 1]
    weight, bits, offsets, masked = make_case(device, counts, (6, 4 // groups, 3, 3))
    x, bias = randn(3, 4, 8, 7, seed=1).contiguous(memory_format=memory_format), randn(6, seed=2)
    geometry = ([2, 1], [1, 0], [1, 2], groups)
    with dwm_fast.use_backend("triton"):
        y = torch.ops.dwm_fast.bank_conv2d(x.to(device), weight, bits, bias.to(device), offsets, 3, *geometry)
    assert y.is_contiguous(memory_format=memory_format)

    def loop(x, w, b):
        return torch.cat([F.conv2d(x[i : i + 1], w[i], b, *geometry) for i in range(3)])

    assert_within_budget(y, loop, x, masked, bias)


def test_the_way_follows_the_rows_per_domain():
    assert kernels.tiles_for(64, 16, 512, 4096, torch.bfloat16) is FEW
    assert kernels.tiles_for(64, 16, 512, 4096, torch.float32) is FEW_WIDE
    assert kernels.tiles_for(64, 16, 512, 100, torch.bfloat16) is FEW_WIDE
    assert kernels.tiles_for(16 * 3136, 16, 64, 576, torch.bfloat16) is MANY


@pytest.mark.gpu
def test_a_captured_batch_follows_offsets_that_change(device):
    weight, bits, offsets, _ = make_case(device, [4, 4], (256, 256), torch.bfloat16)
    x = randn(8, 256, seed=1).to(device, torch.bfloat16)
    kernels.bank_linear(x, weight, bits, None, offsets, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.bank_linear(x, weight, bits, None, offsets, 8)
    offsets.copy_(torch.tensor([0, 1, 8]))
    graph.replay()
    assert torch.equal(y, kernels.bank_linear(x, weight, bits, None, offsets, 8))
