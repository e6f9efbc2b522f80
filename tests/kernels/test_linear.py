"""One pass equals mask first, multiply then: masks bit for bit, integers exactly, values within fp64's budget."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import BackendUnavailable
from dwm_fast.kernels._launch import Tiles, override_launch
from dwm_fast.ops import Mode
from dwm_fast.ops.ways import use_way

FAMILY = settings(
    deadline=None, max_examples=6, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
TILES = [Tiles(32, 64, 16), Tiles(16, 32, 16, splits=2), Tiles(64, 32, 64)]
ROW_TILES = [Tiles(32, 64, 1), Tiles(16, 32, 1, splits=2)]
SIZE = st.integers(1, 40)
LAYER, THRESHOLD, OFFSET = 3, 0.25, 2


@pytest.fixture(autouse=True)
def _in_one_pass():
    with dwm_fast.use_backend("triton"), use_way("one-pass"):
        yield


def rule(device, mode):
    return (
        torch.tensor([-(2**40) + 7, 2**32 - 1], device=device),
        torch.tensor(0.7, device=device),
        LAYER,
        THRESHOLD,
        int(mode),
        OFFSET,
    )


def randn(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def integers(device, *shape, seed=0):
    """Small integers: every product and sum is exact in any of the dtypes."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().to(device)


def assert_within_budget(y, exact, low):
    """DESIGN's budget: twice the error of an independent low-precision result plus eps times the maximum."""
    bound = 2 * ((low.double() - exact).abs().max() + torch.finfo(y.dtype).eps * exact.abs().max())
    assert y.isfinite().all()
    assert (y.double() - exact).abs().max() <= bound


@FAMILY
@given(SIZE, SIZE, st.sampled_from(list(Mode)), st.sampled_from(TILES))
def test_the_drawn_mask_is_the_staged_one_bit_for_bit_in_both_directions(n, k, mode, tiles):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, logits = randn(device, n, k, seed=1), randn(device, n, k, seed=2)
    state, tau, *arguments = rule(device, mode)
    with use_way("staged"):
        staged = ops.sample(
            [logits], [weight], state, tau, mode=mode, layers=[LAYER], thresholds=[THRESHOLD], step_offset=OFFSET
        )[0][0]
    with override_launch(tiles):
        eye = torch.eye(k, device=device)
        forward = torch.ops.dwm_fast.linear(eye, weight, logits, None, state, tau, *arguments)
        eye = torch.eye(n, device=device)
        backward = torch.ops.dwm_fast.linear_input_grad(eye, weight, logits, state, tau, *arguments)
    assert torch.equal(forward.t(), staged)
    assert torch.equal(backward, staged)


@FAMILY
@given(SIZE, SIZE, st.sampled_from([(m, t) for m in (1, 5, 17) for t in TILES] + [(2, t) for t in ROW_TILES]))
def test_products_from_bits_are_exact_on_integers_in_every_direction(n, k, rows):
    m, tiles = rows
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", (torch.float32, torch.bfloat16)[n % 2]
    x, weight, grad = (integers(device, *s, seed=i).to(dtype) for i, s in enumerate([(m, k), (n, k), (m, n)]))
    bias, keep = integers(device, n, seed=4).to(dtype), randn(device, n, k, seed=3) > 0
    bits, masked = ops.pack([keep]), weight * keep
    with override_launch(tiles):
        y = ops.linear_packed(x, weight, bits, bias)
        dx = torch.ops.dwm_fast.linear_packed_input_grad(grad, weight, bits)
        dw = torch.ops.dwm_fast.linear_packed_weight_grad(grad, x, weight, bits)
    assert torch.equal(y, F.linear(x.float(), masked.float(), bias.float()).to(dtype))
    assert torch.equal(dx, (grad.float() @ masked.float()).to(dtype))
    assert torch.equal(dw, (grad.float().t() @ x.float() * keep).to(dtype))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 17, 40), (19, 33, 64), (3, 40, 35)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_stay_within_the_budget_of_fp64(device, m, n, k, dtype):
    x, weight, grad = (randn(device, *s, seed=i).to(dtype) for i, s in enumerate([(m, k), (n, k), (m, n)]))
    keep = randn(device, n, k, seed=3) > 0
    bits, masked = ops.pack([keep]), torch.where(keep, weight, 0)
    with override_launch(Tiles(32, 64, 16)):
        y = ops.linear_packed(x, weight, bits)
        dx = torch.ops.dwm_fast.linear_packed_input_grad(grad, weight, bits)
    assert y.dtype == dx.dtype == dtype
    assert_within_budget(y, x.double() @ masked.double().t(), (x.float() @ masked.float().t()).to(dtype))
    assert_within_budget(dx, grad.double() @ masked.double(), (grad.float() @ masked.float()).to(dtype))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("m", "n", "k", "dtype"), [(5, 17, 36, torch.float32), (18, 33, 30, torch.bfloat16)])
def test_gradients_of_logits_and_weight_follow_the_chain_rule(device, oracle, bounded, mode, m, n, k, dtype):
    state, tau, *arguments = rule(device, mode)
    x, grad, logits = (randn(device, *s, seed=i) for i, s in enumerate([(m, k), (m, n), (n, k)]))
    x, grad, weight = x.to(dtype), grad.to(dtype), randn(device, n, k, seed=5)
    with override_launch(Tiles(32, 64, 16)):
        dl, dw = torch.ops.dwm_fast.linear_mask_grad(grad, x, weight, logits, state, tau, *arguments, True, True)
        only = torch.ops.dwm_fast.linear_mask_grad(grad, x, weight, logits, state, tau, *arguments, False, True)
    u = torch.from_numpy(oracle.uniform(0, n * k, -(2**40) + 7, 2**32 - 1 + OFFSET, LAYER)).reshape(n, k)
    score, w = logits.double().cpu(), weight.double().cpu()
    argument = bounded.gumbel(score, u, 0.7)
    chain = w * (argument.slope() * bounded.inverse(0.7))
    sure = (u - torch.sigmoid(-score)).abs() > 2.0**-20
    slope, value = {
        Mode.GUMBEL_HARD: (chain, (u > torch.sigmoid(-score)).double()),
        Mode.GUMBEL_SOFT: (chain, argument.sigmoid()),
        Mode.KEEP: (0 * w, (score >= 0).double()),
        Mode.THRESHOLD: (w, (score > THRESHOLD).double()),
        Mode.TERNARY: (w, (score > THRESHOLD).double() - (score < 0).double()),
        Mode.EDIT: (torch.full_like(w, THRESHOLD), torch.ones_like(w)),
    }[mode]
    dense = bounded.matmul(grad.t(), x)
    (dense * slope).assert_holds(dl)
    (dense * value * sure).assert_holds(dw.cpu() * sure)
    assert dl.dtype == dw.dtype == torch.float32
    assert only[0].numel() == 0
    assert torch.equal(only[1], dw)


def test_strides_are_arguments_and_wide_offsets_change_nothing(device):
    m, n, k = 5, 24, 40
    weight, logits = integers(device, k, n, seed=1).t(), randn(device, 2 * n, k, seed=2)[::2]
    x, grad = integers(device, k, m, seed=3).t(), integers(device, 1, n, seed=4).expand(m, n)
    state, tau, *arguments = rule(device, Mode.THRESHOLD)
    keep = logits > THRESHOLD
    bits = ops.pack([keep])
    results = []
    for wide in (False, True):
        with override_launch(Tiles(32, 32, 16), wide=wide):
            dl, dw = torch.ops.dwm_fast.linear_mask_grad(grad, x, weight, logits, state, tau, *arguments, True, True)
            results.append(
                [
                    torch.ops.dwm_fast.linear(x, weight, logits, None, state, tau, *arguments),
                    torch.ops.dwm_fast.linear_input_grad(grad, weight, logits, state, tau, *arguments),
                    dl,
                    dw,
                    ops.linear_packed(x, weight, bits),
                ]
            )
    dense = grad.t() @ x
    expected = [x @ (weight * keep).t(), grad @ (weight * keep), dense * weight, dense * keep, x @ (weight * keep).t()]
    for narrow, wide, exact in zip(*results, expected, strict=True):
        assert torch.equal(narrow, exact)
        assert torch.equal(wide, exact)
    assert dw.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("splits", [1, 2])
def test_bias_and_activation_are_applied_once(device, bounded, activation, splits):
    x, weight, bias = randn(device, 3, 64, seed=1), randn(device, 16, 64, seed=2), randn(device, 16, seed=3)
    keep = randn(device, 16, 64, seed=4) > 0
    with override_launch(Tiles(16, 32, 16, splits=splits)):
        y = ops.linear_packed(x, weight, ops.pack([keep]), bias, activation=activation)
        broken = ops.linear_packed(x * float("nan"), weight, ops.pack([keep]), bias, activation=activation)
    linear = bounded.matmul(x, torch.where(keep, weight, 0).t()) + bias.double().cpu()
    exact = {
        "relu": lambda: bounded(linear.value.relu(), linear.error),
        "gelu": lambda: 0.5 * linear * (1 + (linear * math.sqrt(0.5)).erf()),
        "silu": lambda: linear * linear.sigmoid(),
    }[activation]()
    torch.testing.assert_close(exact.value, getattr(F, activation)(linear.value))
    exact.assert_holds(y)
    assert broken.isnan().all()


@pytest.mark.parametrize(("n", "k", "tiles"), [(33, 70, ROW_TILES[0]), (18, 36, ROW_TILES[1])])
def test_a_single_row_is_multiplied_under_the_same_mask(device, n, k, tiles):
    x, grad, weight = integers(device, 1, k), integers(device, 1, n, seed=1), integers(device, n, k, seed=2)
    logits, (state, tau, *arguments) = randn(device, n, k, seed=3), rule(device, Mode.GUMBEL_HARD)
    results = []
    for way in ("one-pass", "staged"):
        with use_way(way), override_launch(tiles):
            y = torch.ops.dwm_fast.linear(x, weight, logits, None, state, tau, *arguments)
            results.append([y, torch.ops.dwm_fast.linear_input_grad(grad, weight, logits, state, tau, *arguments)])
    assert all(torch.equal(one, staged) for one, staged in zip(*results, strict=True))
    assert results[0][0].any()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_sum_or_to_write_is_no_special_case(device, m, n, k):
    x, weight = torch.ones(m, k, device=device), torch.ones(n, k, device=device)
    bits, bias = ops.pack([weight > 0]), torch.arange(n, device=device).float()
    y = ops.linear_packed(x, weight, bits, bias)
    assert torch.equal(y, F.linear(x, weight, bias))
    grad = torch.ones(m, n, device=device)
    assert torch.equal(torch.ops.dwm_fast.linear_packed_input_grad(grad, weight, bits), grad @ weight)
    assert torch.equal(torch.ops.dwm_fast.linear_packed_weight_grad(grad, x, weight, bits), grad.t() @ x)


def test_the_whole_backward_runs_in_one_pass_and_keeps_leading_dimensions(device):
    state, tau, *_ = rule(device, Mode.KEEP)
    inputs = [integers(device, *s, seed=i) for i, s in enumerate([(2, 3, 20), (17, 20)])]
    inputs += [randn(device, 17, 20, seed=2), integers(device, 17, seed=3)]
    results = []
    for way in ("one-pass", "staged"):
        x, weight, logits, bias = (t.clone().requires_grad_(True) for t in inputs)
        with use_way(way), override_launch(Tiles(32, 32, 16)):
            y = ops.linear(x, weight, logits, bias, state, tau, mode=Mode.THRESHOLD)
            y.backward(integers(device, *y.shape, seed=9))
        results.append([y.detach(), x.grad, weight.grad, logits.grad, bias.grad])
    for one, staged in zip(*results, strict=True):
        assert torch.equal(one, staged)
    assert results[0][0].shape == (2, 3, 17)


def test_what_no_kernel_knows_says_so_when_forced_and_is_staged_otherwise(device):
    x, weight = torch.randn(2, 8, dtype=torch.float64, device=device), torch.randn(3, 8, device=device).double()
    bits = ops.pack([weight > 0])
    with pytest.raises(BackendUnavailable, match=r"linear_packed cannot: one-pass kernels take .* not torch\.float64"):
        ops.linear_packed(x, weight, bits)
    with use_way(None):
        assert torch.equal(ops.linear_packed(x, weight, bits), F.linear(x, weight * (weight > 0)))


def test_words_of_bits_that_straddle_rows_are_read_where_numpy_puts_them(device, oracle):
    keep = np.random.default_rng(0).random((7, 45)) < 0.5
    bits = torch.from_numpy(oracle.bits([keep])).to(device)
    with override_launch(Tiles(16, 64, 16)):
        y = ops.linear_packed(torch.eye(45, device=device), torch.ones(7, 45, device=device), bits)
    assert torch.equal(y.t().cpu(), torch.from_numpy(keep).float())
