"""KSM's kernels against METHODS section 3 written in fp64: any layout, any tile size, nothing left unwritten."""

import numpy as np
import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.kernels import kernel_soft as kernels
from dwm_fast.kernels._launch import override_launch

SHAPES = [(8, 12, 3, 3), (5, 3, 7, 7), (40, 30, 1, 1), (17, 9), (1, 1, 3, 3), (6, 1, 2, 3), (0, 4, 3, 3), (3, 4, 5)]
SMALL = {"block": 128, "strided": 128, "groups": 32}


def layout(weight, index):
    """Contiguous, channels_last and transposed in turn."""
    if weight.dim() == 4 and index % 2 == 0:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight.t().contiguous().t() if weight.dim() == 2 else weight


def network(device, dtype=torch.float32, low=-0.01):
    generator = torch.Generator().manual_seed(3)
    reals = [torch.rand(*s[:2], *[1] * (len(s) - 2), generator=generator) * 0.03 + low for s in SHAPES]
    weights = [layout(torch.randn(s, generator=generator), i).to(device, dtype) for i, s in enumerate(SHAPES)]
    return [r.to(device) for r in reals], weights


def state(device):
    return torch.tensor([7, 3], device=device)


def mask_values(real, keep):
    """M in fp64."""
    r = real.double().cpu()
    a = torch.where(keep, 0.0, r)
    if r.numel() == 0:
        return a
    spread = a.max() - a.min()
    scaled = torch.where(a != 0, (a - a.min()) / spread, 0.0) if spread > 0 else torch.zeros_like(a)
    return keep.double() + 0.5 * scaled


def run(device, **options):
    reals, weights = network(device, options.pop("weight_dtype", torch.float32), options.pop("low", -0.01))
    arguments = {"threshold": 5e-3, "noisy": False, "step_offset": 0, "dtype": None, **options}
    with override_launch(**SMALL):
        masked = kernels.kernel_soft(reals, weights, state(device), list(range(len(SHAPES))), **arguments)
    return reals, weights, masked


@pytest.mark.parametrize("low", [-0.01, 0.006, -0.04], ids=["mixed", "all kept", "all dropped"])
def test_masked_weights_are_the_formulas(device, low):
    reals, weights, masked = run(device, low=low)
    for real, weight, result in zip(reals, weights, masked, strict=True):
        expected = weight.double().cpu() * mask_values(real, real.cpu() >= 5e-3)
        # one subtraction and one correctly rounded quotient in [0, 1], one product: a few units of 2**-24
        torch.testing.assert_close(result.double().cpu(), expected, rtol=2.0**-21, atol=2.0**-21)
        assert result.stride() == torch.empty_like(weight).stride()


def test_agrees_bit_for_bit_with_the_reference(device):
    from dwm_fast.ops.kernel_soft import kernel_soft_reference

    reals, weights, masked = run(device)
    expected = kernel_soft_reference(reals, weights, state(device), range(len(SHAPES)), 5e-3, False, 0, None)
    assert all(torch.equal(a, b) for a, b in zip(masked, expected, strict=True))


def test_a_range_of_zero_gives_zero_and_never_nan(device):
    ones = torch.ones(2, 3, 3, 3, device=device)
    real = torch.full((2, 3, 1, 1), 1e-3, device=device)
    masked = kernels.kernel_soft([real, real * 0], [ones, ones], state(device), [0, 1], 5e-3, False, 0, None)
    assert all(torch.equal(m, torch.zeros_like(m)) for m in masked)


def test_the_range_is_the_tensors_own(device):
    """Tensors of several programs beside one another: each scaled by its own minimum and maximum."""
    reals = [torch.linspace(-0.02 * (i + 1), 4e-3, 900, device=device).view(30, 30) for i in range(3)]
    ones = [torch.ones(30, 30, device=device)] * 3
    with override_launch(**SMALL):
        masked = kernels.kernel_soft(reals, ones, state(device), [0, 1, 2], 5e-3, False, 0, None)
    for result in masked:
        assert (float(result.min()), float(result.max())) == (0.0, 0.5)


def test_noise_is_the_contracts_and_decides_as_the_formula(device, oracle):
    reals, _, masked = run(device, noisy=True, step_offset=4)
    for layer, (real, result) in enumerate(zip(reals, masked, strict=True)):
        if real.numel() == 0:
            continue
        u = oracle.uniform(0, real.numel(), 7, 3 + 4, layer).reshape(real.shape)
        z = (real.double().cpu().numpy() - np.float64(np.float32(5e-3))) * 1200
        margin = z + np.log(u) - np.log1p(-u)
        keep = torch.from_numpy(margin >= 0)
        weight = network(device)[1][layer].double().cpu()
        expected = weight * mask_values(real, keep)
        sure = torch.from_numpy(np.abs(margin) > 1e-4).expand_as(expected)  # 1200 * 2**-24 * 0.03 and fp32 logarithms
        assert sure.double().mean() > 0.99
        torch.testing.assert_close(result.double().cpu()[sure], expected[sure], rtol=2.0**-21, atol=2.0**-21)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_backward_is_the_formula(device, oracle, bounded, noisy, grad_dtype):
    reals, weights = network(device)
    generator = torch.Generator().manual_seed(8)
    grads = [torch.randn(s, generator=generator).to(device, grad_dtype) for s in SHAPES]  # contiguous: other strides
    with override_launch(**SMALL):
        found = kernels.kernel_soft_backward(grads, reals, weights, state(device), range(len(SHAPES)), 5e-3, noisy, 0)
    for layer, (d, g, r, w) in enumerate(zip(found, grads, reals, weights, strict=True)):
        assert d.shape == r.shape
        if r.numel() == 0:
            continue
        z = (bounded(r) - bounded(5e-3, 5e-3 * bounded.UNIT)) * 1200
        u = torch.from_numpy(oracle.uniform(0, r.numel(), 7, 3, layer)).view(r.shape)
        argument = bounded.gumbel(z, u, 100.0) if noisy else z * bounded.inverse(100.0)
        rows = (g.reshape(*r.shape[:2], 1, -1), w.reshape(*r.shape[:2], -1, 1))
        over_mask = bounded.matmul(*rows).view(r.shape)
        (over_mask * (12 * argument.slope())).assert_holds(d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_once(device, dtype):
    _, _, wide = run(device, weight_dtype=dtype, dtype=torch.float32)
    _, _, masked = run(device, weight_dtype=dtype)
    assert all(torch.equal(m, w.to(dtype)) for m, w in zip(masked, wide, strict=True))


def test_any_tile_size_gives_the_same_bits(device):
    results = []
    for block in (128, 1024):
        reals, weights = network(device)
        with override_launch(block=block, strided=128):
            results.append(kernels.kernel_soft(reals, weights, state(device), range(8), 5e-3, True, 0, None))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_window_of_two_strides_is_copied_and_comes_back_in_its_own(device):
    weight = torch.randn(4, 5, 3, 2, device=device).transpose(2, 3)
    real = torch.rand(4, 5, 1, 1, device=device) * 0.02 - 5e-3
    masked = kernels.kernel_soft([real], [weight], state(device), [0], 5e-3, False, 0, None)[0]
    assert torch.equal(
        masked, kernels.kernel_soft([real], [weight.contiguous()], state(device), [0], 5e-3, False, 0, None)[0]
    )
    assert masked.stride() == torch.empty_like(weight).stride()


def test_other_dtypes_of_reals_are_refused(device):
    with pytest.raises(InputError, match=r"expected torch\.float32"):
        kernels.kernel_soft(
            [torch.ones(1, 1, device=device).double()],
            [torch.ones(1, 1, device=device)],
            state(device),
            [0],
            5e-3,
            False,
            0,
            None,
        )
