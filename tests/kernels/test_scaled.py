"""The scaled soft rule: what the soft rule gives of logits that were scaled before, in every layout and direction."""

import pytest
import torch

from dwm_fast.kernels._launch import override_launch
from dwm_fast.kernels.sample import sample, sample_backward
from dwm_fast.kernels.update import mask_adam
from dwm_fast.ops.draw import SCALED_SOFT, Draw, Mode

SHAPES = [(5, 7), (129,), (12, 40), (8, 16, 3, 3), (5, 4, 3, 3), (4, 3, 7, 7), (6, 5, 3, 3)]
TAU, KAPPA = 0.7, 37.0
SMALL = {"block": 128, "strided": 128, "groups": 32}
UNIT = 2.0**-24


def tensors(device, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator) * scale for s in SHAPES]
    return [(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).to(device) for x in made]


def draws(device):
    """The draw with a scale, and the soft rule's with the same noise."""
    rng, layers, nothing = torch.tensor([11, 5], device=device), list(range(len(SHAPES))), [0.25] * len(SHAPES)
    return (
        Draw(rng, torch.tensor([TAU, KAPPA], device=device), layers, nothing, SCALED_SOFT, 2),
        Draw(rng, torch.tensor(TAU, device=device), layers, nothing, int(Mode.GUMBEL_SOFT), 2),
    )


@pytest.mark.parametrize("fields", [{}, SMALL], ids=["own tiles", "small tiles"])
def test_masks_and_bits_are_those_of_scaled_logits_and_the_penalty_is_their_mean(device, fields):
    logits, weights = tensors(device, 1, 0.05), tensors(device, 2)
    scaled, soft = draws(device)
    with override_launch(**fields):
        masked, bits, penalty = sample(logits, weights, scaled, None, True)
        expected, expected_bits, _ = sample([x * KAPPA for x in logits], weights, soft, None, True)
        ones, _, _ = sample(logits, [torch.ones_like(w) for w in weights], scaled, None, False)
    assert all(torch.equal(a, b) for a, b in zip(masked, expected, strict=True))
    assert torch.equal(bits, expected_bits)
    values = torch.cat([m.flatten() for m in ones]).double()
    # Partial sums of at most 2048 numbers in [0, 1] in fp32, then fp64.
    assert abs(float(penalty) - float(values.mean())) <= 2048 * UNIT * float(values.mean())


@pytest.mark.parametrize("fields", [{}, SMALL], ids=["own tiles", "small tiles"])
def test_gradients_hold_the_scale_and_the_penaltys_part(device, fields):
    logits, weights, grads = tensors(device, 1, 0.05), tensors(device, 2), tensors(device, 3)
    scaled, soft = draws(device)
    total, rise = sum(x.numel() for x in logits), 3.0
    with override_launch(**fields):
        found = sample_backward(grads, torch.tensor(rise, device=device), logits, weights, scaled, True, True)
        ahead = [x * KAPPA for x in logits]
        ones = [torch.ones_like(w) for w in weights]
        zero = torch.tensor(0.0, device=device)
        slopes, dweights = sample_backward(ones, zero, ahead, ones, soft, True, False)[0], found[1]
        expected_dweights = sample_backward(grads, zero, ahead, weights, soft, False, True)[1]
    assert all(torch.equal(a, b) for a, b in zip(dweights, expected_dweights, strict=True))
    for dl, g, w, slope in zip(found[0], grads, weights, slopes, strict=True):
        over_mask = g.double() * w.double() + rise / total
        expected = over_mask * slope.double() * KAPPA
        # one product and one sum round in the mask's gradient, three products after it; the sum may cancel
        budget = 4 * UNIT * expected.abs() + 4 * UNIT * (g.double() * w.double()).abs() * slope.double() * KAPPA
        assert ((dl.double() - expected).abs() <= budget + 1e-30).all()


def test_the_fused_step_is_adam_on_those_gradients(device):
    logits, weights, grads = tensors(device, 1, 0.05), tensors(device, 2), tensors(device, 3)
    scaled, _ = draws(device)
    total = sum(x.numel() for x in logits)
    rise = torch.tensor(0.5, device=device)
    with override_launch(**SMALL):
        slopes, _ = sample_backward(grads, rise * total, logits, weights, scaled, True, False)
        first, second = ([torch.zeros_like(x) for x in logits] for _ in range(2))
        lr, steps = torch.tensor(0.01, device=device).double(), torch.ones(len(SHAPES), device=device)
        mask_adam(logits, weights, grads, first, second, scaled, rise, steps, lr, 0.9, 0.99, 1e-8, 0.0, True)
    for moment, slope in zip(first, slopes, strict=True):
        # 1 - 0.9 in fp32 parts and one product; rise * total / total rounds twice
        assert ((moment.double() - 0.1 * slope.double()).abs() <= 2.0**-20 * slope.double().abs() + 1e-8).all()
