"""Adam on numbers in few bits, to the reference's last bit: formats, ragged ends, alignment, what is not finite."""

import math

import pytest
import torch

from dwm_fast.kernels._launch import override_launch
from dwm_fast.kernels.coded_adam import coded_adam
from dwm_fast.ops import coding
from dwm_fast.ops.coded_adam import coded_adam_reference

SHAPES = [(1,), (131,), (4, 3, 3, 3), (3, 512), (2, 257), (0,)]
"""Less than a block, blocks and a ragged end, whole fours, whole programs, a program and a ragged end, nothing."""
STATE = [0x1234_5678_9ABC, 3]


def case(logits, moments, shapes=SHAPES, seed=0):
    """Logits and zero moments on the CPU, and gradients of two steps: some zero, one subnormal in its square."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator) for s in shapes]
    stored = [[coding.encoded(v, coding.LOGITS[logits]) for v in values]]
    stored += [[torch.zeros(s, dtype=dtype) for s in shapes] for dtype in coding.MOMENTS[moments]]
    coded = moments == "8bit"
    stored += [[torch.zeros(coding.scales_of(v.numel())) for v in values] if coded else [] for _ in range(2)]
    grads = [[torch.randn(s, generator=generator) * 10.0**-step for s in shapes] for step in range(2)]
    for g in (g.view(-1) for step in grads for g in step):
        g[::5] = 0
        g[1::7] *= 1e-20
    return stored, grads


def run(step, stored, grads, device, at=1, layers=None, **options):
    """The stored numbers after steps `at`, `at` + 1, ..."""
    stored = [[t.to(device) for t in role] for role in stored]
    first, *others = stored
    rule = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-15, "weight_decay": 0.0, "decoupled": True, **options}
    state, lr = torch.tensor(STATE, device=device), torch.tensor(0.01, dtype=torch.float64, device=device)
    layers = layers or list(range(4, 4 + len(first)))
    for i, given in enumerate(grads):
        steps = torch.full((len(first),), float(at + i), device=device)
        step(first, [g.to(device) for g in given], *others, state, layers, steps, lr, *rule.values())
    return [t.cpu() for role in stored for t in role]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        assert not a.is_floating_point() or torch.equal(a.isnan(), b.isnan())


def assert_reference(device, stored, grads, **options):
    expected = run(coded_adam_reference, [[t.clone() for t in role] for role in stored], grads, "cpu", **options)
    before = [t.clone() for t in stored[0]]
    with override_launch(block=512, strided=256):
        found = run(coded_adam, [[t.clone() for t in role] for role in stored], grads, device, **options)
    assert_equal(found, expected)
    assert not torch.equal(found[1], before[1])


@pytest.mark.parametrize(
    ("logits", "moments"),
    [("fp32", "fp32"), ("fp32", "8bit"), ("bf16", "bf16"), ("bf16", "fp32"), ("fixed16", "8bit")],
)
def test_every_format_is_the_references_to_the_last_bit(device, logits, moments):
    assert_reference(device, *case(logits, moments))


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": False, "beta1": 0.3}, {"at": 12345, "beta2": 0.95}],
    ids=["adamw", "adam", "late"],
)
def test_decay_and_late_steps_are_the_references(device, options):
    assert_reference(device, *case("fixed16", "8bit"), **options)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("moments", coding.MOMENTS)
def test_what_is_not_finite_shows(device, moments):
    stored, grads = case("fixed16" if moments == "8bit" else "bf16", moments, [(300,), (512,)])
    grads[0][0][140], grads[0][0][290], grads[0][1][3] = math.nan, math.inf, -math.inf
    grads[1][1].zero_()
    assert_reference(device, stored, grads)


def test_addresses_of_any_alignment_are_stepped(device):
    """A tensor behind the first element of its memory goes lane by lane, and gives the same."""
    stored, grads = case("fixed16", "8bit", [(700,)])
    expected = run(coded_adam_reference, [[t.clone() for t in role] for role in stored], grads, "cpu")

    def moved(t):
        return torch.cat([t.new_zeros(1), t]).to(device)[1:]

    found = run(
        coded_adam,
        [[moved(t) for t in role] for role in stored],
        [[moved(g) for g in given] for given in grads],
        device,
    )
    assert_equal(found, expected)


def test_a_block_and_its_noise_are_counted_within_their_own_tensor(device):
    """The same tensor alone, or behind another, is rounded by its own layer and scales."""
    stored, grads = case("bf16", "8bit", [(131,), (640,)])
    both = run(coded_adam, [[t.clone() for t in role] for role in stored], grads, device, layers=[7, 9])
    alone = run(coded_adam, [[role[1].clone()] for role in stored], [[g[1]] for g in grads], device, layers=[9])
    assert_equal(both[1::2], alone)
