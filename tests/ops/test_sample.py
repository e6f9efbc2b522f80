"""sample: what every rule gives, forward and backward, by hand, by formula in fp64 and by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import Mode

pytestmark = pytest.mark.usefixtures("reference", "poison")

SEED = 2**35 + 12345
STEP = 3


def _state(seed: int = SEED, step: int = STEP) -> torch.Tensor:
    return torch.tensor([seed, step], dtype=torch.int64)


def _tau(value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def _network(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(s, generator=generator) for s in shapes]
    return logits, [torch.randn(s, generator=generator) for s in shapes]


SHAPES = [(5, 3), (4, 2, 3, 3), (), (1,), (7,), (0,), (2, 0, 3)]


# --- what is drawn


def test_hard_masks_are_bernoulli_of_sigmoid_over_ten_million_draws():
    bins = 20
    logits = torch.linspace(-6, 6, bins).repeat_interleave(500_000)
    keep = ops.sample([logits], [torch.ones_like(logits)], _state(), _tau())[0][0]
    counts = keep.view(bins, -1).sum(1, dtype=torch.float64)
    p = torch.sigmoid(torch.linspace(-6, 6, bins, dtype=torch.float64))
    chi_square = ((counts - 500_000 * p) ** 2 / (500_000 * p * (1 - p))).sum()
    assert chi_square < 45.3  # 0.999 quantile with 20 degrees of freedom
    centred = (keep.double().view(bins, -1) - p[:, None]) / (p * (1 - p)).sqrt()[:, None]
    for lag in (1, 2, 3, 4):
        correlation = (centred[:, lag:] * centred[:, :-lag]).mean()
        assert abs(correlation) < 4.5 / math.sqrt(bins * 500_000)


@pytest.mark.parametrize(("layer", "step"), [(1, STEP), (0, STEP + 1), (1, STEP + 1), (2**31, STEP)])
def test_layers_and_steps_are_not_correlated(layer, step):
    n = 400_000
    a = ops.uniform(ops.random_words(n, _state(), 0)).double() - 0.5
    b = ops.uniform(ops.random_words(n, _state(SEED, step), layer)).double() - 0.5
    assert abs(12 * (a * b).mean()) < 4.5 / math.sqrt(n)


def test_hard_masks_are_the_contract_predicate_on_the_oracle_noise(oracle):
    (logits,), _ = _network((1000,))
    mask = ops.sample([logits], [torch.ones(1000)], _state(), _tau(), layers=[6])[0][0]
    u = torch.from_numpy(oracle.uniform(0, 1000, SEED, STEP, 6))
    border = 1 / (1 + torch.exp(logits.double()))
    assert ((u - border).abs() > 2**-20).all()
    assert torch.equal(mask.bool(), u > border)


def test_hard_equals_soft_above_one_half_and_ignores_tau():
    logits, _ = _network((3000,), seed=5)
    hard = [ops.sample(logits, [torch.ones(3000)], _state(), _tau(t))[0][0] for t in (0.1, 1.0, 7.0)]
    assert torch.equal(hard[0], hard[1])
    assert torch.equal(hard[0], hard[2])
    soft = ops.sample(logits, [torch.ones(3000)], _state(), _tau(0.7), mode=Mode.GUMBEL_SOFT)[0][0]
    clear = (soft - 0.5).abs() > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal((soft > 0.5)[clear], hard[0].bool()[clear])


def test_extreme_logits_give_finite_certain_masks():
    logits = torch.tensor([-1e4, 1e4, -math.inf, math.inf, 0.0]).repeat_interleave(64)
    for mode in (Mode.GUMBEL_HARD, Mode.GUMBEL_SOFT):
        x = logits.clone().requires_grad_(True)
        masked, _, penalty = ops.sample([x], [torch.full_like(logits, -3.0)], _state(), _tau(), mode=mode)
        assert masked[0].view(5, 64)[:4].tolist() == [[v] * 64 for v in (0.0, -3.0, 0.0, -3.0)]
        (masked[0].sum() + penalty).backward()
        assert x.grad.isfinite().all()
        assert penalty.item() == pytest.approx(0.5)


def test_each_layer_draws_its_own_noise_wherever_it_is_sampled():
    logits, weights = _network((40,), (40,), (8, 5))
    together, _, _ = ops.sample(logits, weights, _state(), _tau())
    for i in (2, 0, 1):
        alone, _, _ = ops.sample([logits[i]], [weights[i]], _state(), _tau(), layers=[i])
        assert torch.equal(alone[0], together[i])
    same = ops.sample([logits[0]] * 2, [torch.ones(40)] * 2, _state(), _tau())[0]
    assert not torch.equal(same[0], same[1])


def test_step_offset_draws_the_noise_of_that_step():
    logits, weights = _network((200,))
    a = ops.sample(logits, weights, _state(), _tau(), step_offset=2)[0][0]
    assert torch.equal(a, ops.sample(logits, weights, _state(step=STEP + 2), _tau())[0][0])
    assert not torch.equal(a, ops.sample(logits, weights, _state(), _tau())[0][0])


# --- every rule by hand

W = [2.0, -3.0, 4.0, 5.0, -6.0]


@pytest.mark.parametrize(
    ("mode", "logits", "threshold", "masked", "bits"),
    [
        (Mode.KEEP, [0.0, -0.0, -1e-30, 3.0, -3.0], 9.0, [2, -3, 0, 5, 0], 0b01011),
        (Mode.THRESHOLD, [0.005, 0.0050001, 0.0049, 1.0, -1.0], 0.005, [0, -3, 0, 5, 0], 0b01010),
        (Mode.TERNARY, [-0.1, 0.0, 0.005, 0.006, -1e-30], 0.005, [-2, 0, 0, 5, 6], 0b11001),
        (Mode.EDIT, [0.0, 1.0, -1.0, 1.5, -2.0], 0.5, [2, -2.5, 3.5, 5.75, -7], 0b00111),
    ],
)
def test_deterministic_rules_by_hand(mode, logits, threshold, masked, bits):
    out, packed, _ = ops.sample(
        [torch.tensor(logits)], [torch.tensor(W)], _state(), _tau(), mode=mode, thresholds=[threshold], pack=True
    )
    assert out[0].tolist() == masked
    assert packed.tolist() == [bits] + [0] * 15


@pytest.mark.parametrize(
    ("mode", "threshold", "dlogits", "dweights"),
    [
        (Mode.KEEP, 0.0, [0, 0, 0, 0, 0], [10, 0, 0, 40, 0]),
        (Mode.THRESHOLD, 0.25, [20, -60, 120, 200, -300], [10, 0, 0, 40, 0]),
        (Mode.TERNARY, 0.25, [20, -60, 120, 200, -300], [10, -20, 0, 40, -50]),
        (Mode.EDIT, 0.25, [2.5, 5, 7.5, 10, 12.5], [10, 20, 30, 40, 50]),
    ],
)
def test_straight_through_gradients_by_hand(mode, threshold, dlogits, dweights):
    logits = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5], requires_grad=True)
    if mode == Mode.KEEP:
        logits = torch.tensor([1.0, -1.0, -0.1, 0.5, -0.5], requires_grad=True)
    weight = torch.tensor(W, requires_grad=True)
    out, _, _ = ops.sample([logits], [weight], _state(), _tau(), mode=mode, thresholds=[threshold])
    out[0].backward(torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0]))
    assert logits.grad.tolist() == dlogits
    assert weight.grad.tolist() == dweights


def test_infinite_logits_keep_or_drop_for_good(infinite_logits):
    infinite_logits("cpu")


@pytest.mark.parametrize("layer", [-1, 2**32, 2**63 - 1])
def test_a_layer_that_is_no_counter_word_is_refused_whoever_computes(layer):
    one, state, tau = torch.ones(2, 2), _state(), _tau()
    calls = [
        lambda: ops.random_words(4, state, layer),
        lambda: ops.sample([one], [one], state, tau, layers=[layer]),
        lambda: torch.ops.dwm_fast.sample([one], [one], state, tau, [layer], [0.0], 0, 0, None, False),
        lambda: ops.linear(one, one, one, None, state, tau, layer=layer),
        lambda: ops.kernel_soft([one], [one], state, layers=[layer]),
    ]
    for backend in ("reference", None):
        for call in calls:
            with dwm_fast.use_backend(backend), pytest.raises(InputError, match=r"from 0 to 2\^32 - 1"):
                call()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_gumbel_gradient_is_the_published_formula_with_the_same_noise(oracle, hard, tau):
    logits, weights = _network((300,), (4, 5, 3, 3))
    logits = [x.requires_grad_(True) for x in logits]
    weights = [w.requires_grad_(True) for w in weights]
    mode = Mode.GUMBEL_HARD if hard else Mode.GUMBEL_SOFT
    masked, _, _ = ops.sample(logits, weights, _state(), _tau(tau), mode=mode)
    grads = _network((300,), (4, 5, 3, 3), seed=9)[0]
    torch.autograd.backward(masked, grads)
    for layer, (x, w, g) in enumerate(zip(logits, weights, grads, strict=True)):
        u = torch.from_numpy(oracle.uniform(0, x.numel(), SEED, STEP, layer)).view(x.shape)
        z = x.detach().double() + u.log() - torch.log1p(-u)
        soft = torch.sigmoid(z / tau)
        value = (z > 0).double() if hard else soft
        dx = g.double() * w.detach().double() * soft * (1 - soft) / tau
        torch.testing.assert_close(masked[layer].detach().double(), w.detach().double() * value, rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), dx, rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(w.grad.double(), g.double() * value, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("mode", [Mode.GUMBEL_SOFT, Mode.EDIT])
def test_smooth_rules_pass_gradcheck_in_double_precision(mode):
    def network(*tensors):
        masked, _, penalty = ops.sample(
            tensors[:3], tensors[3:], _state(), _tau(0.8, torch.float64), mode=mode, thresholds=[0.3, 0.7, 1.1]
        )
        return (*masked, penalty)

    logits, weights = _network((2, 3), (2, 1, 2, 2), ())
    inputs = [t.double().requires_grad_(True) for t in (*logits, *weights)]
    assert torch.autograd.gradcheck(network, inputs)


# --- the penalty


@pytest.mark.parametrize("mode", list(Mode))
def test_penalty_is_the_mean_over_the_network_with_its_exact_gradient(mode):
    logits, weights = _network((6, 4), (10,), seed=3)
    logits = [x.requires_grad_(True) for x in logits]
    _, _, penalty = ops.sample(logits, weights, _state(), _tau(0.5), mode=mode, thresholds=[0.2, 0.2])
    penalty.backward()
    flat = torch.cat([x.detach().double().flatten() for x in logits])
    grad = torch.cat([x.grad.double().flatten() for x in logits])
    if mode in (Mode.GUMBEL_HARD, Mode.GUMBEL_SOFT):
        keep = torch.sigmoid(flat)
        expected, slope = keep.mean(), keep * (1 - keep) / 34
    elif mode == Mode.EDIT:
        keep = torch.exp(-flat.abs())
        expected, slope = keep.mean(), -flat.sign() * keep / 34
    else:
        expected, slope = torch.zeros((), dtype=torch.float64), torch.zeros(34, dtype=torch.float64)
    assert penalty.dtype == torch.float32
    assert penalty.shape == ()
    torch.testing.assert_close(penalty.detach().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, slope, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("mode", list(Mode))
def test_penalty_alone_equals_the_drawn_one(mode):
    logits, weights = _network((6, 4), (10,), seed=3)
    drawn = ops.sample(logits, weights, _state(), _tau(), mode=mode)[2]
    assert torch.equal(ops.penalty(logits, mode), drawn)


def test_gradients_of_outputs_and_penalty_add_up():
    def gradient(use_masked: bool, use_penalty: bool) -> torch.Tensor:
        (x,), (w,) = _network((50,))
        x.requires_grad_(True)
        masked, _, penalty = ops.sample([x], [w], _state(), _tau())
        loss = (masked[0].square().sum() if use_masked else 0) + (10 * penalty if use_penalty else 0)
        loss.backward()
        return x.grad

    both = gradient(True, True)
    torch.testing.assert_close(both, gradient(True, False) + gradient(False, True))


# --- form


@pytest.mark.parametrize("mode", list(Mode))
def test_bits_are_the_packed_keep_masks(mode):
    logits, weights = _network(*SHAPES)
    weights = [torch.ones_like(w) for w in weights]
    _, bits, _ = ops.sample(logits, weights, _state(), _tau(), mode=mode, thresholds=[0.1] * 7, pack=True)
    hard = Mode.GUMBEL_HARD if mode == Mode.GUMBEL_SOFT else mode
    masked, _, _ = ops.sample(logits, weights, _state(), _tau(), mode=hard, thresholds=[0.1] * 7)
    expected = b""
    for scores, m in zip(logits, masked, strict=True):
        keep = scores.abs() <= 1 if mode == Mode.EDIT else m != 0
        packed = np.packbits(keep.flatten().numpy(), bitorder="little").tobytes()
        expected += packed + bytes(-len(packed) % 16)
    assert bytes(bits.numpy()) == expected
    assert bits.numel() == sum(ops.packed_nbytes(w.numel()) for w in weights)


def test_no_bits_unless_asked():
    logits, weights = _network((9,))
    assert ops.sample(logits, weights, _state(), _tau())[1].shape == (0,)


@pytest.mark.parametrize("mode", list(Mode))
def test_memory_format_changes_nothing_but_strides(mode):
    def run(weight_format, logits_format, grad_format):
        (x,), (w,) = _network((6, 5, 3, 3))
        x = x.to(memory_format=logits_format).requires_grad_(True)
        w = w.to(memory_format=weight_format).requires_grad_(True)
        masked, bits, penalty = ops.sample([x], [w], _state(), _tau(), mode=mode, thresholds=[0.3], pack=True)
        grad = _network((6, 5, 3, 3), seed=8)[0][0].to(memory_format=grad_format)
        torch.autograd.backward([masked[0], penalty], [grad, torch.tensor(5.0)])
        assert masked[0].stride() == w.stride()
        assert x.grad.stride() == x.stride()
        assert w.grad.stride() == w.stride()
        return masked[0], bits, penalty, x.grad, w.grad

    formats = (torch.contiguous_format, torch.channels_last)
    expected = run(*[torch.contiguous_format] * 3)
    for a in formats:
        for b in formats:
            for c in formats:
                got = run(a, b, c)
                assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))


def test_sliced_and_transposed_tensors_are_read_in_logical_order():
    (x,), (w,) = _network((6, 8))
    expected = ops.sample([x], [w], _state(), _tau())[0][0]
    wide = torch.full((6, 16), math.nan)
    wide[:, ::2] = w
    got = ops.sample([x.t().contiguous().t()], [wide[:, ::2]], _state(), _tau())[0][0]
    assert torch.equal(got, expected)
    gradient = torch.ones(1).expand(6, 8)
    y = x.clone().requires_grad_(True)
    ops.sample([y], [w], _state(), _tau())[0][0].backward(gradient)
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", list(Mode))
def test_masked_weight_is_computed_in_fp32_and_rounded_once(mode, dtype):
    (x,), (w,) = _network((500,))
    low = w.to(dtype)
    args = ([x], [low], _state(), _tau())
    got = ops.sample(*args, mode=mode, thresholds=[0.3])[0][0]
    full = ops.sample([x], [low.float()], _state(), _tau(), mode=mode, thresholds=[0.3])[0][0]
    assert got.dtype == dtype
    assert torch.equal(got, full.to(dtype))
    cast = ops.sample([x], [w], _state(), _tau(), mode=mode, thresholds=[0.3], dtype=dtype)[0][0]
    assert cast.dtype == dtype
    assert torch.equal(cast, ops.sample([x], [w], _state(), _tau(), mode=mode, thresholds=[0.3])[0][0].to(dtype))


def test_gradients_keep_the_dtype_of_what_they_belong_to():
    (x,), (w,) = _network((64,))
    x.requires_grad_(True)
    w = w.bfloat16().requires_grad_(True)
    ops.sample([x], [w], _state(), _tau(), dtype=torch.float16)[0][0].sum().backward()
    assert x.grad.dtype == torch.float32
    assert w.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", list(Mode))
def test_empty_and_one_element_tensors(mode):
    logits, weights = _network(*SHAPES)
    logits = [x.requires_grad_(True) for x in logits]
    masked, _, penalty = ops.sample(logits, weights, _state(), _tau(), mode=mode)
    assert [tuple(m.shape) for m in masked] == SHAPES
    torch.autograd.backward([*(m.sum() for m in masked), penalty])
    assert [tuple(x.grad.shape) for x in logits] == SHAPES
    assert all(x.grad.isfinite().all() for x in logits)


def test_an_empty_network_is_no_error():
    masked, bits, penalty = ops.sample([], [], _state(), _tau(), pack=True)
    assert masked == []
    assert bits.shape == (0,)
    assert penalty.item() == 0
    nothing = torch.zeros(0, requires_grad=True)
    _, _, penalty = ops.sample([nothing], [torch.zeros(0)], _state(), _tau())
    penalty.backward()
    assert penalty.item() == 0


def test_layers_that_the_loss_does_not_reach_get_zero_gradients():
    logits, weights = _network((5,), (6,))
    logits = [x.requires_grad_(True) for x in logits]
    masked, _, _ = ops.sample(logits, weights, _state(), _tau())
    masked[1].sum().backward()
    assert logits[0].grad is None or not logits[0].grad.any()
    assert logits[1].grad.any()


def test_only_what_asks_for_gradients_gets_them():
    (x,), (w,) = _network((20,))
    out = ops.sample([x], [w], _state(), _tau())[0][0]
    assert not out.requires_grad
    w.requires_grad_(True)
    ops.sample([x], [w], _state(), _tau())[0][0].sum().backward()
    assert x.grad is None
    assert w.grad is not None


def test_noise_changed_between_forward_and_backward_is_an_error_not_another_mask():
    (x,), (w,) = _network((20,))
    state = _state()
    out = ops.sample([x.requires_grad_(True)], [w], state, _tau())[0][0]
    ops.advance(state)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_wrong_arguments_are_named():
    (x,), (w,) = _network((4, 2))
    with pytest.raises(InputError, match=r"logits\[0\] has shape \(2, 4\)"):
        ops.sample([x.t()], [w], _state(), _tau())
    with pytest.raises(InputError, match="2 logits, 1 weights"):
        ops.sample([x, x], [w], _state(), _tau())
    with pytest.raises(InputError, match=r"rng_state is torch\.int32"):
        ops.sample([x], [w], _state().int(), _tau())
    with pytest.raises(InputError, match=r"tau is torch\.int64"):
        ops.sample([x], [w], _state(), torch.tensor(1))
    with pytest.raises(ValueError, match="9 is not a valid Mode"):
        ops.sample([x], [w], _state(), _tau(), mode=9)


@pytest.mark.parametrize("mode", list(Mode))
def test_sample_and_its_backward_are_well_formed_operations(mode):
    logits, weights = _network((5, 3), (2, 3, 2, 2))
    logits[1] = logits[1].to(memory_format=torch.channels_last)
    logits = [x.requires_grad_(True) for x in logits]
    rule = ([0, 1], [0.1, 0.2], int(mode), 1)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if mode not in (Mode.GUMBEL_HARD, Mode.EDIT):
        checks = checks[:3]
    torch.library.opcheck(
        torch.ops.dwm_fast.sample.default,
        (logits, weights, _state(), _tau(), *rule, torch.bfloat16, True),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.dwm_fast.sample_backward.default,
        (
            [torch.ones_like(w) for w in weights],
            torch.tensor(1.0),
            [x.detach() for x in logits],
            weights,
            _state(),
            _tau(),
            *rule,
            True,
            mode != Mode.KEEP,
        ),
        test_utils=checks,
    )
