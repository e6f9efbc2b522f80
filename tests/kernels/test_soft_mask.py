"""SPG's kernels against METHODS section 4 in fp64, over mixed layouts and tile sizes."""

import pytest
import torch

from dwm_fast.kernels import soft_mask as kernels
from dwm_fast.kernels._launch import override_launch

SHAPES = [(1,), (131,), (12, 40), (3, 48, 3, 3), (2, 3, 3, 3), (16, 12), (0, 3), (4100,)]
SMALL = {"block": 256, "strided": 128, "groups": 32}


def layout(tensors):
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    tensors[5] = tensors[5].t().contiguous().t()
    return tensors


def tensors(device, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return layout([torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES])


def gammas(device):
    generator = torch.Generator().manual_seed(9)
    return layout([torch.rand(s, generator=generator).to(device) for s in SHAPES])


def rate(device):
    return torch.tensor(0.1, dtype=torch.float64, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_step_is_the_formula_and_the_references(device, dtype):
    from dwm_fast.ops.soft_mask import soft_masked_sgd_reference

    weights, grads, gamma = tensors(device, 1, dtype), tensors(device, 2, dtype), gammas(device)
    gamma[2] = torch.tensor(0.25, device=device)  # one number for a whole tensor
    grads[4] = grads[4].contiguous()  # a gradient in another layout than its weight
    before = [w.clone() for w in weights]
    with override_launch(**SMALL):
        kernels.soft_masked_sgd(weights, grads, gamma, rate(device))
    expected = [w.clone() for w in before]
    soft_masked_sgd_reference(expected, grads, gamma, rate(device))
    for w, old, g, free, same in zip(weights, before, grads, gamma, expected, strict=True):
        assert torch.equal(w, same)
        exact = old.double() - 0.1 * (1 - free.double()) * g.double()
        eps = torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps  # 1 - gamma is formed in fp32
        torch.testing.assert_close(w.double(), exact, rtol=2 * eps, atol=2 * eps)


def test_full_importance_keeps_every_bit(device):
    weights, grads = tensors(device, 1), tensors(device, 2)
    before = [w.clone() for w in weights]
    kernels.soft_masked_sgd(weights, grads, [torch.ones_like(w) for w in weights], rate(device))
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("launch", [SMALL, {}], ids=["small tiles", "table"])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_importance_is_the_formula(device, bounded, launch, shift):
    gamma, grads = gammas(device), [g + shift for g in tensors(device, 3)]
    before = [g.clone() for g in gamma]
    with override_launch(**launch):
        kernels.raise_importance(gamma, grads)
    for new, old, g in zip(gamma, before, grads, strict=True):
        exact = g.double()
        apart = ((exact - exact.mean()) / exact.std()).abs() if g.numel() > 1 else torch.zeros_like(exact)
        expected = torch.maximum(old.double(), torch.tanh(apart))
        tail = (-2 * bounded(apart, bounded.UNIT * apart)).exp()
        value = (1 - tail) * (1 + tail).reciprocal(1)  # tanh, by a quotient that IEEE rounds
        bounded(expected, value.error).assert_holds(new)
        above = old.double().cpu() > value.value + value.error
        assert torch.equal(new.cpu()[above], old.cpu()[above])


def test_no_spread_gives_zero_and_never_nan(device):
    grads = [torch.zeros(300, device=device), torch.full((7,), 3.0, device=device), torch.ones((), device=device)]
    gamma = [torch.zeros_like(g) for g in grads]
    kernels.raise_importance(gamma, grads)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gamma)


def test_it_is_the_same_at_every_run(device):
    results = []
    for _ in range(2):
        gamma = gammas(device)
        kernels.raise_importance(gamma, tensors(device, 3))
        results.append(gamma)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
