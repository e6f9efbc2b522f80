"""pattern_mask: N:M masks by Gumbel-softmax over patterns, by hand, by the formulas in fp64, and by counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import Mode
from dwm_fast.ops.patterns import pattern_keep, patterns

pytestmark = pytest.mark.usefixtures("reference", "poison")

STATE = torch.tensor([7, 3])
KINDS = [(2, 4), (1, 4), (4, 8), (3, 4), (1, 2)]


def network(n, m, dtype=torch.float32):
    """Logits and weights of three layers, one of them transposed in memory."""
    generator = torch.Generator().manual_seed(n * m)
    shapes = [(6, 2 * m), (3, 5 * m), (2, 3, m)]
    weights = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    weights[0] = weights[0].t().contiguous().t()
    count = len(patterns(n, m))
    logits = [torch.randn(*s[:-1], s[-1] // m, count, generator=generator) * 0.3 for s in shapes]
    return logits, weights


def formula(oracle, logits, weight, grad, n, m, layer, tau, kappa, step=3, seed=7):
    """Soft mask, the drawn pattern's mask and dL/dl of one layer in fp64, straight from the formulas."""
    table = np.array([[e in kept for e in range(m)] for kept in itertools.combinations(range(m), n)], dtype=np.float64)
    x = logits.double().numpy().reshape(-1, len(table))
    width = math.ceil(len(table) / 4) * 4
    u = oracle.uniform(0, len(x) * width, seed, step, layer).reshape(len(x), width)[:, : len(table)]
    scores = kappa * x - np.log(-np.log1p(-u))
    z = scores / tau
    y = np.exp(z - z.max(1, keepdims=True))
    y /= y.sum(1, keepdims=True)
    over_mask = (weight.double() * grad.double()).numpy().reshape(-1, m)
    b = over_mask @ table.T
    change = kappa / tau * y * (b - (y * b).sum(1, keepdims=True))
    return y @ table, table[scores.argmax(1)], change, scores


def as_tensor(values, like):
    return torch.from_numpy(np.ascontiguousarray(values)).view(like.shape)


def test_patterns_are_numbered_as_combinations_are():
    assert patterns(2, 4) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert len(patterns(4, 8)) == 70


@pytest.mark.parametrize(("n", "m"), KINDS)
def test_the_kept_mask_is_the_largest_logits_pattern_and_satisfies_n_of_m(n, m):
    logits, weights = network(n, m)
    masked = ops.pattern_mask(logits, weights, STATE, torch.tensor([1.0, 1.0]), n=n, m=m, mode=Mode.KEEP)
    for scores, weight, result in zip(logits, weights, masked, strict=True):
        keep = pattern_keep(scores, n, m)
        assert torch.equal(keep.reshape(-1, m).sum(1), torch.full((weight.numel() // m,), n))
        assert torch.equal(result, torch.where(keep, weight, torch.zeros(())))
        best = scores.reshape(-1, scores.shape[-1]).argmax(1).tolist()
        places = [tuple(row.nonzero().flatten().tolist()) for row in keep.reshape(-1, m)]
        assert places == [patterns(n, m)[number] for number in best]


def test_of_equal_logits_the_first_pattern_wins():
    assert pattern_keep(torch.zeros(1, 1, 6), 2, 4).tolist() == [[True, True, False, False]]
    assert pattern_keep(torch.tensor([[[0.0, 1, 0, 1, 1, 0]]]), 2, 4).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(("tau", "kappa"), [(1.0, 1.0), (4.0, 100.0), (0.05, 20.0)])
@pytest.mark.parametrize(("n", "m"), KINDS)
def test_soft_masks_and_gradients_are_the_formulas(oracle, n, m, tau, kappa):
    logits, weights = network(n, m)
    logits = [x.requires_grad_() for x in logits]
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(w.shape, generator=generator) for w in weights]
    both = torch.tensor([tau, kappa])
    masked = ops.pattern_mask(logits, weights, STATE, both, n=n, m=m)
    torch.autograd.backward(masked, grads)
    for layer, (x, w, g, result) in enumerate(zip(logits, weights, grads, masked, strict=True)):
        soft, _, change, scores = formula(oracle, x.detach(), w, g, n, m, layer, float(both[0]), float(both[1]))
        assert result.stride() == w.stride()
        # fp32 scores are off by some units of 2^-24 of their size, a softmax by that over tau, twice (its sum)
        slack = 2.0**-24 * 16 * (1 + np.abs(scores).max()) / tau
        expected = as_tensor(soft, w) * w.double()
        assert ((result.detach().double() - expected).abs() <= 2 * slack * w.double().abs()).all()
        size = float((w.double() * g.double()).abs().max()) * n
        assert (x.grad.double() - as_tensor(change, x)).abs().max() <= 4 * slack * size * kappa / tau


@pytest.mark.parametrize(("n", "m"), KINDS)
def test_hard_masks_are_the_drawn_pattern_with_the_soft_gradient(oracle, n, m):
    logits, weights = network(n, m)
    tau = torch.tensor([2.0, 3.0])
    found = {}
    for mode in (Mode.GUMBEL_SOFT, Mode.GUMBEL_HARD):
        leaves = [x.clone().requires_grad_() for x in logits]
        masked = ops.pattern_mask(leaves, weights, STATE, tau, n=n, m=m, mode=mode)
        torch.autograd.backward(masked, [torch.ones_like(w) for w in weights])
        found[mode] = masked, [x.grad for x in leaves]
    for soft, hard in zip(found[Mode.GUMBEL_SOFT][1], found[Mode.GUMBEL_HARD][1], strict=True):
        assert torch.equal(soft, hard)
    for layer, (x, w, result) in enumerate(zip(logits, weights, found[Mode.GUMBEL_HARD][0], strict=True)):
        _, drawn, _, scores = formula(oracle, x, w, w, n, m, layer, 2.0, 3.0)
        top = np.sort(scores, axis=1)
        assert (top[:, -1] - top[:, -2] > 2.0**-18).all()
        assert torch.equal(result.detach(), torch.where(as_tensor(drawn, w) != 0, w, torch.zeros(())))


def test_patterns_are_drawn_with_the_probabilities_of_a_softmax():
    groups = 200_000
    logits = torch.tensor([0.5, -1.0, 0.0, 1.0, 0.25, -0.5])
    ones = torch.ones(groups, 4)
    masked = ops.pattern_mask(
        [logits.expand(groups, 1, 6).contiguous()], [ones], STATE, torch.tensor([1.0, 2.0]), mode=Mode.GUMBEL_HARD
    )[0]
    code = (masked * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum(1)
    wanted = [sum(2.0**e for e in kept) for kept in patterns(2, 4)]
    counts = torch.tensor([float((code == w).sum()) for w in wanted], dtype=torch.float64)
    p = torch.softmax(2 * logits.double(), 0)
    assert ((counts - groups * p) ** 2 / (groups * p)).sum() < 20.5  # 0.999 quantile, five degrees of freedom


def test_layers_steps_and_offsets_are_streams_of_their_own():
    logits, weights = [torch.zeros(4, 8, 6)], [torch.ones(4, 32)]
    tau = torch.tensor([1.0, 1.0])

    def drawn(**options):
        state = options.pop("state", STATE)
        return ops.pattern_mask(logits, weights, state, tau, mode=Mode.GUMBEL_HARD, **options)[0]

    assert torch.equal(drawn(step_offset=2), drawn(state=torch.tensor([7, 5])))
    assert torch.equal(drawn(), drawn(layers=[0]))
    for other in (drawn(layers=[1]), drawn(step_offset=1), drawn(state=torch.tensor([8, 3]))):
        assert not torch.equal(drawn(), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_once(dtype):
    logits, weights = network(2, 4, dtype)
    tau = torch.tensor([1.0, 1.0])
    wide = ops.pattern_mask(logits, [w.float() for w in weights], STATE, tau)
    for mine, theirs in zip(ops.pattern_mask(logits, weights, STATE, tau), wide, strict=True):
        assert torch.equal(mine, theirs.to(dtype))


def test_opcheck_and_compile():
    logits, weights = network(2, 4)
    leaves = [x.requires_grad_() for x in logits]
    arguments = (leaves, weights, STATE, torch.tensor([1.0, 2.0]), [0, 1, 2], 2, 4, 1, 0, None)
    torch.library.opcheck(torch.ops.dwm_fast.pattern_mask, arguments)

    def total(x):
        return ops.pattern_mask([x], [weights[1]], STATE, torch.tensor([1.0, 2.0]))[0].square().sum()

    eager, compiled = (logits[1].detach().clone().requires_grad_() for _ in range(2))
    total(eager).backward()
    torch.compile(total, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_empty_tensors_pass():
    tau = torch.tensor([1.0, 1.0])
    assert ops.pattern_mask([torch.zeros(0, 2, 6)], [torch.zeros(0, 8)], STATE, tau)[0].shape == (0, 8)
    assert ops.pattern_mask([], [], STATE, tau) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4, "m": 4}, "n=4 of m=4 is no known pattern"),
        ({"n": 8, "m": 16}, "n=8 of m=16 is no known pattern"),
        (
            {"m": 16, "n": 1},
            r"logits\[0\] has shape \(2, 4, 6\) for a weight of shape \(2, 16\); expected \(2, 1, 16\)",
        ),
        ({"n": 1, "m": 5}, "no whole groups of 5"),
        ({"mode": Mode.EDIT}, "mode=.*; expected GUMBEL_SOFT, GUMBEL_HARD or KEEP"),
        ({"layers": [2**32]}, "layer 4294967296"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(InputError, match=message):
        ops.pattern_mask([torch.zeros(2, 4, 6)], [torch.zeros(2, 16)], STATE, torch.tensor([1.0, 1.0]), **options)


def test_tau_holds_two_numbers_and_lists_have_one_length():
    with pytest.raises(InputError, match=r"expected temperature and scale, fp32 of shape \(2,\)"):
        ops.pattern_mask([], [], STATE, torch.tensor(1.0))
    with pytest.raises(InputError, match="got 0 logits, 1 weights and 1 layers"):
        ops.pattern_mask([], [torch.zeros(4)], STATE, torch.tensor([1.0, 1.0]))
