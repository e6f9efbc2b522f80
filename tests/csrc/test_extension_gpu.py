"""The CUDA kernels against NumPy; only where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPES = [(64, 3, 7, 7), (130, 33, 3, 3), (96, 64, 1, 1), (10, 513), (5,), (1, 1), (1000, 1031)]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def masks_of(dtype: torch.dtype, repeats: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES * repeats
    return [(-torch.randint(-1, 2, s, generator=generator).float()).to(dtype) for s in shapes]


def reference_bits(masks: list[torch.Tensor]) -> np.ndarray:
    parts = []
    for mask in masks:
        packed = np.packbits((mask != 0).reshape(-1).numpy(), bitorder="little")
        parts += [packed, np.zeros(-packed.size % 16, np.uint8)]
    return np.concatenate(parts)


@pytest.mark.parametrize("repeats", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack_match_numpy(dtype: torch.dtype, repeats: int) -> None:
    from dwm_fast.ops import _extension_cuda as cuda

    masks = masks_of(dtype, repeats)
    bits = cuda.pack([m.cuda() for m in masks])
    assert np.array_equal(bits.cpu().numpy(), reference_bits(masks))
    for mask, flat in zip(masks, cuda.unpack(bits, [m.numel() for m in masks]), strict=True):
        assert torch.equal(flat.cpu(), (mask != 0).reshape(-1))


def test_views_that_start_anywhere_are_packed() -> None:
    from dwm_fast.ops import _extension_cuda as cuda

    whole = (torch.rand(10_001) < 0.5).cuda()
    for start in (1, 3, 8):
        assert np.array_equal(cuda.pack([whole[start:]]).cpu().numpy(), reference_bits([whole[start:].cpu()]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_keeps_or_zeroes(dtype: torch.dtype, channels_last: bool) -> None:
    from dwm_fast.ops import _extension_cuda as cuda

    masks = masks_of(torch.bool)
    weights = [torch.randn(s).mul(50).to(dtype).cuda() for s in SHAPES]
    if channels_last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
    got = cuda.apply(cuda.pack([m.cuda() for m in masks]), weights)
    for mask, weight, result in zip(masks, weights, got, strict=True):
        assert torch.equal(result, torch.where(mask.cuda(), weight, torch.zeros((), dtype=dtype, device="cuda")))
        assert result.stride() == torch.empty_like(weight).stride()


def test_set_operations_match_numpy() -> None:
    from dwm_fast.ops import _extension_cuda as cuda

    one, two = masks_of(torch.bool), [torch.rand(s) < 0.4 for s in SHAPES]
    numels = [m.numel() for m in one]
    a, b = cuda.pack([m.cuda() for m in one]), cuda.pack([m.cuda() for m in two])
    pairs = list(zip(one, two, strict=True))
    assert cuda.count(a, numels).tolist() == [int(m.sum()) for m in one]
    assert cuda.overlap(a, b, numels).tolist() == [[int((x & y).sum()), int((x | y).sum())] for x, y in pairs]
    x, y = a.cpu().numpy(), b.cpu().numpy()
    for op, expected in {"and": x & y, "or": x | y, "xor": x ^ y, "andnot": x & ~y}.items():
        assert np.array_equal(cuda.combine(a, b, op).cpu().numpy(), expected)


def test_kernels_run_on_the_current_stream_and_under_a_graph() -> None:
    from dwm_fast.ops import _extension_cuda as cuda

    weight = torch.randn(4096, 333, device="cuda")
    mask = torch.rand(4096, 333, device="cuda") < 0.5
    bits = cuda.pack([mask])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cuda.apply(bits, [weight])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (masked,) = cuda.apply(bits, [weight])
    weight.copy_(torch.randn_like(weight))
    graph.replay()
    assert torch.equal(masked, torch.where(mask, weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 1024), (8, 16, 32), (16, 48, 544), (32, 40, 672), (64, 70, 1056)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kept_weights_multiply_as_fp64_does(m: int, n: int, k: int, share: float, dtype: torch.dtype) -> None:
    from dwm_fast import ops

    weight, mask = torch.randn(n, k, device="cuda").to(dtype), torch.rand(n, k, device="cuda") < share
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    bits = ops.pack([mask])
    values, starts = ops.keep_values(weight.masked_fill(~mask, torch.nan), bits)
    with ops.use_way("one-pass"), ops.use_backend("cuda"):
        y = ops.linear_kept(x, values, starts, bits, bias)
        assert torch.equal(y, ops.linear_kept(x, values, starts, bits, bias))
    masked = torch.where(mask, weight, 0.0).double()
    exact = x.double() @ masked.T + bias.double()
    # Products of two-byte numbers are exact in fp32; a sum of k of them and a bias rounds k times at most, by half an
    # ulp of a partial sum (the tensor core may cut instead: a whole one), and the result once, to dtype.
    terms = x.double().abs() @ masked.abs().T + bias.double().abs()
    budget = k * 2.0**-23 * terms + torch.finfo(dtype).eps / 2 * exact.abs() * (1 + 2.0**-10)
    assert bool(((y.double() - exact).abs() <= budget).all())


def test_tensors_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    from dwm_fast.ops import _extension_cuda as cuda

    mask = (torch.rand(5000) < 0.5).to("cuda:1")
    bits = cuda.pack([mask])
    assert bits.device == mask.device
    assert cuda.count(bits, [5000]).item() == mask.sum().item()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 8 << 30, reason="needs 8 GiB of GPU memory"
)
def test_more_than_two_billion_elements() -> None:
    from dwm_fast.ops import _extension_cuda as cuda

    n = 2**31 + 77
    mask = torch.zeros(n, dtype=torch.bool, device="cuda")
    mask[-1] = mask[2**31 - 1] = True
    bits = cuda.pack([mask])
    assert cuda.count(bits, [n]).item() == 2
    assert cuda.unpack(bits, [n])[0].nonzero().flatten().tolist() == [2**31 - 1, n - 1]
