"""N:M masks on a GPU: KEEP's bits and drawn patterns are the reference's, soft masks and gradients within a bound."""

import math

import pytest
import torch

from dwm_fast.errors import Unsupported
from dwm_fast.kernels.patterns import pattern_mask, pattern_mask_backward
from dwm_fast.ops.draw import Mode
from dwm_fast.ops.patterns import (
    _scores,
    pattern_mask_backward_reference,
    pattern_mask_reference,
)

HARD, SOFT, KEEP = Mode.GUMBEL_HARD.value, Mode.GUMBEL_SOFT.value, Mode.KEEP.value
KINDS = [(2, 4), (1, 8), (3, 6), (4, 8)]
LAYERS, OFFSET = [3, 9, 1], 2
UNIT = 2.0**-24


def network(n, m, device, dtype=torch.float32):
    """Logits, weights and gradients of three layers: several programs, a few groups, none."""
    generator = torch.Generator().manual_seed(m)
    shapes = [(5, 30 * m), (2, 3, m), (0, m)]
    weights = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    grads = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    count = math.comb(m, n)
    logits = [(torch.randn(*s[:-1], s[-1] // m, count, generator=generator) * 0.1).to(device) for s in shapes]
    return logits, weights, grads


def noise(device, tau=0.7, kappa=20.0):
    return torch.tensor([7, 3], device=device), torch.tensor([tau, kappa], device=device)


def on_cpu(tensors):
    return [t.cpu() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), KINDS)
def test_chosen_patterns_are_the_references(device, n, m, dtype):
    """Bit for bit: KEEP decides without rounding, and the two largest scores of these draws lie further apart."""
    logits, weights, _ = network(n, m, device, dtype)
    logits[0][0, 0] = 0.5  # equals: the first wins
    logits[0][0, 1, -1] = math.inf
    logits[0][0, 2, 0] = math.nan  # no largest: the last
    state, tau = noise(device)
    for mode in (HARD, KEEP):
        found = pattern_mask(logits, weights, state, tau, LAYERS, n, m, mode, OFFSET, None)
        expected = pattern_mask_reference(
            on_cpu(logits), on_cpu(weights), state.cpu(), tau.cpu(), LAYERS, n, m, mode, OFFSET, None
        )
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        kept = (found[0] != 0).reshape(-1, m).sum(1)
        assert torch.equal(kept, torch.full_like(kept, n))


def bound_of_softmax(logits, state, tau, layer):
    """Largest error of y, and so of a mask's value over n.

    A score kappa l + G rounds by three units of its size. G is off by 2^-19 (lg2's 2^-22 in a -log(1 - u) of at least
    0.28, and 2^-22 of its own) and by four units of its size. A softmax's part changes by twice that over tau, and exp
    and the sum add 16 units.
    """
    largest = _scores(logits, state, tau, layer, SOFT, OFFSET).abs().max() + (tau[1] * logits).abs().max()
    return 2 * (2.0**-19 + 7 * UNIT * largest) / tau[0] + 16 * UNIT


@pytest.mark.parametrize(("n", "m"), KINDS)
def test_soft_masks_and_gradients_are_the_references_within_rounding(device, n, m):
    logits, weights, grads = network(n, m, device)
    state, tau = noise(device)
    rule = (LAYERS, n, m)
    found = pattern_mask(logits, weights, state, tau, *rule, SOFT, OFFSET, torch.float32)
    slopes = pattern_mask_backward(grads, logits, weights, state, tau, *rule, SOFT, OFFSET)
    lists = on_cpu(logits), on_cpu(weights), state.cpu(), tau.cpu()
    expected = pattern_mask_reference(*lists, *rule, SOFT, OFFSET, torch.float32)
    wanted = pattern_mask_backward_reference(on_cpu(grads), *lists, *rule, SOFT, OFFSET)
    for i, layer in enumerate(LAYERS[:2]):
        slack = bound_of_softmax(lists[0][i], state.cpu(), tau.cpu(), layer)
        assert ((found[i].cpu() - expected[i]).abs() <= n * slack * lists[1][i].abs()).all()
        gain = n * (lists[1][i] * grads[i].cpu()).abs().max()  # of b and of its mean: both move with y
        assert ((slopes[i].cpu() - wanted[i]).abs() <= 4 * slack * gain * tau[1].cpu() / tau[0].cpu()).all()
        assert wanted[i].abs().max() > 0.1
    hard = pattern_mask_backward(grads, logits, weights, state, tau, *rule, HARD, OFFSET)
    assert all(map(torch.equal, slopes, hard))
    keep = pattern_mask_backward(grads, logits, weights, state, tau, *rule, KEEP, OFFSET)
    assert not any(x.any() for x in keep)


def test_what_is_not_in_logical_order_and_many_patterns_of_no_power_of_two_are_left_to_the_reference(device):
    logits, weights, grads = network(2, 7, device)
    with pytest.raises(Unsupported):
        pattern_mask(logits, weights, *noise(device), LAYERS, 2, 7, SOFT, 0, None)
    logits, weights, grads = network(2, 4, device)
    weights[0] = weights[0].t().contiguous().t()
    with pytest.raises(Unsupported):
        pattern_mask(logits, weights, *noise(device), LAYERS, 2, 4, SOFT, 0, None)
    with pytest.raises(Unsupported):
        pattern_mask_backward(grads, logits, weights, *noise(device), LAYERS, 2, 4, SOFT, 0)
