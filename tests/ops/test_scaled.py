"""sample under SCALED_SOFT (LEAP): a scale kappa of the logits beside tau, and the drawn mask's mean as penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import SCALED_SOFT, Mode

pytestmark = pytest.mark.usefixtures("poison")

STATE = torch.tensor([2**35 + 7, 3])
SHAPES = [(5, 3), (4, 2, 3, 3), (1,), (0,), (300, 9)]
BACKENDS = ["reference", "cpp"]


def network(memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(s, generator=generator) * 0.02 for s in SHAPES]
    tensors = [logits, *([torch.randn(s, generator=generator) for s in SHAPES] for _ in range(2))]
    for many in tensors:
        many[1] = many[1].contiguous(memory_format=memory_format)
    return tensors


def formula(oracle, logits, layer, tau, kappa):
    """m and dm/dl of one tensor in fp64."""
    u = oracle.uniform(0, logits.numel(), int(STATE[0]), int(STATE[1]), layer).reshape(tuple(logits.shape))
    argument = (kappa * logits.double().contiguous().numpy() + np.log(u) - np.log1p(-u)) / tau
    with np.errstate(over="ignore"):
        soft = 1 / (1 + np.exp(-argument))
        other = 1 / (1 + np.exp(argument))
    return torch.from_numpy(soft), torch.from_numpy(soft * other * kappa / tau)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("tau", "kappa"), [(1.0, 1.0), (4.0, 25.0), (2.0, 200.0), (0.05, 350.0)])
def test_mask_penalty_and_gradients_are_the_formulas(oracle, backend, memory_format, tau, kappa):
    logits, weights, grads = network(memory_format)
    leaves = [x.requires_grad_() for x in logits]
    frozen = [w.requires_grad_() for w in weights]
    both = torch.tensor([tau, kappa])
    with dwm_fast.use_backend(backend):
        masked, _, penalty = ops.sample(leaves, frozen, STATE, both, mode=SCALED_SOFT)
        (sum((m * g).sum() for m, g in zip(masked, grads, strict=True)) + 7 * penalty).backward()
    total = sum(x.numel() for x in logits)
    mean = 0.0
    for layer, (x, w, g, result) in enumerate(zip(leaves, frozen, grads, masked, strict=True)):
        soft, slope = formula(oracle, x.detach(), layer, float(both[0]), float(both[1]))
        mean += float(soft.sum()) / total
        # The argument holds sums and a quotient of numbers up to kappa |l| + 23 and their rounding, all over tau.
        slack = 2.0**-24 * 12 * (kappa * 0.08 + 23) / tau
        assert (
            (result.detach().double() - w.detach().double() * soft)
            .abs()
            .le((slack + 2.0**-22) * w.detach().double().abs() + 1e-37)
            .all()
        )
        over_mask = w.detach().double() * g.double() + 7 / total
        budget = (2 * slack + 2.0**-20) * over_mask.abs() * kappa / tau
        assert (x.grad.double() - over_mask * slope).abs().le(budget + 1e-30).all()
        assert (w.grad.double() - g.double() * soft).abs().le((slack + 2.0**-22) * g.double().abs() + 1e-37).all()
        assert x.grad.stride() == x.stride()
    assert float(penalty.detach()) == pytest.approx(mean, abs=slack + 2.0**-22)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_scale_it_is_the_soft_rule(backend):
    logits, weights, _ = network()
    with dwm_fast.use_backend(backend):
        scaled = ops.sample(logits, weights, STATE, torch.tensor([0.7, 1.0]), mode=SCALED_SOFT, pack=True)
        plain = ops.sample(logits, weights, STATE, torch.tensor(0.7), mode=Mode.GUMBEL_SOFT, pack=True)
    assert all(torch.equal(a, b) for a, b in zip(scaled[0], plain[0], strict=True))
    assert torch.equal(scaled[1], plain[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_a_bernoulli_draw_of_the_scaled_logits(backend, oracle):
    logits, weights, _ = network()
    with dwm_fast.use_backend(backend):
        _, bits, _ = ops.sample(logits, weights, STATE, torch.tensor([0.7, 30.0]), mode=SCALED_SOFT, pack=True)
    for layer, (x, keep) in enumerate(zip(logits, ops.unpack(bits, [x.numel() for x in logits]), strict=True)):
        u = oracle.uniform(0, x.numel(), int(STATE[0]), int(STATE[1]), layer)
        border = 1 / (1 + np.exp(30.0 * x.double().numpy().reshape(-1)))
        assert (np.abs(u - border) > 2.0**-20).all()
        assert np.array_equal(keep.numpy(), u > border)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fused_step_is_adam_on_these_gradients(backend):
    logits, weights, grads = network()
    both, scale = torch.tensor([2.0, 50.0]), torch.tensor(0.3)
    draw = (STATE, both, list(range(5)), [0.0] * 5, SCALED_SOFT, 0)
    total = sum(x.numel() for x in logits)
    with dwm_fast.use_backend("reference"):
        slopes, _ = torch.ops.dwm_fast.sample_backward(grads, scale * total, logits, weights, *draw, True, False)
    expected = [x.clone() for x in logits]
    state = [[torch.zeros_like(x) for x in logits] for _ in range(4)]
    with dwm_fast.use_backend("reference"):
        nothing = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        ops.frozen_adamw(expected, slopes, *state[:2], *nothing, torch.ones(5), torch.tensor(0.01).double())
    with dwm_fast.use_backend(backend):
        ops.mask_adam(
            logits, weights, grads, *state[2:], STATE, both, scale, torch.ones(5), torch.tensor(0.01).double(),
            mode=SCALED_SOFT, layers=range(5), thresholds=[0.0] * 5, eps=1e-8,
        )  # fmt: skip
    for mine, theirs, g in zip(state[2], state[0], slopes, strict=True):
        # first moments are a tenth of the gradients, which agree to 2^-16 of themselves at these arguments
        assert (mine - theirs).abs().le(2.0**-16 * g.abs() + 1e-30).all()
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(logits, expected, strict=True) if a.numel())


def test_tau_without_a_scale_is_refused_and_a_penalty_alone_needs_it():
    with pytest.raises(InputError, match=r"expected temperature and scale, fp32 of shape \(2,\)"):
        ops.sample([torch.zeros(3)], [torch.ones(3)], STATE, torch.tensor(1.0), mode=SCALED_SOFT)
    with pytest.raises(InputError, match=r"expected a 0-dim fp32 tensor"):
        ops.linear(torch.ones(1, 2), torch.ones(2, 2), torch.ones(2, 2), None, STATE, torch.ones(2), mode=SCALED_SOFT)
    with pytest.raises(InputError, match="add coefficient"):
        ops.penalty([torch.zeros(3)], SCALED_SOFT)
    assert float(ops.penalty([torch.full((3,), 0.5)], SCALED_SOFT, tau=torch.tensor([1.0, 2.0]))) == pytest.approx(
        1 / (1 + np.exp(-1.0)), rel=1e-6
    )
