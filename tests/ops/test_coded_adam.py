"""Numbers in few bits: what the formats can say, that rounding loses nothing on average, and Adam on them."""

import math

import numpy as np
import pytest
import torch

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import coding

STATE = torch.tensor([0x1234_5678_9ABC, 3])


def words(numel, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**32, numel))


@pytest.mark.parametrize("code", [0, 1, -1, 77, -2048, 32767, -32767])
def test_a_fixed_point_logit_is_a_whole_number_of_2048ths(code):
    value = torch.tensor([code / 2048])
    stored = coding.encoded(value, torch.int16, words(1))
    assert stored.tolist() == [code]
    assert torch.equal(coding.decoded(stored), value)


def test_fixed_point_logits_end_at_16_and_show_what_is_no_number():
    values = torch.tensor([math.inf, 20.0, -math.inf, -20.0, math.nan])
    found = coding.decoded(coding.encoded(values, torch.int16, words(5)))
    largest = 32767 / 2048
    assert found[:4].tolist() == [largest, largest, -largest, -largest]
    assert found[4].isnan()


@pytest.mark.parametrize("dtype", [torch.int16, torch.bfloat16])
def test_logits_round_to_a_neighbour_and_on_average_to_themselves(dtype):
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(64, generator=generator)
    rounds = 4096
    found = coding.decoded(coding.encoded(exact.repeat(rounds, 1), dtype, words(64 * rounds).view(rounds, 64)))
    step = 2.0**-11 if dtype == torch.int16 else exact.abs().log2().floor().exp2() * 2.0**-7
    assert ((found - exact).abs() < step).all()
    # each is a choice of two at most `step` apart, so of a variance of at most step^2 / 4
    assert ((found.double().mean(0) - exact).abs() < 5 * step / 2 / rounds**0.5).all()
    nearest = coding.decoded(coding.encoded(exact, dtype))
    assert ((nearest - exact).abs() <= step / 2).all()


def grid(dtype, scale):
    """All values of an 8-bit moment in fp64."""
    codes = torch.arange(-127, 128) if dtype == torch.int8 else torch.arange(256)
    roots = codes.double() * scale.double()
    return roots * roots.abs() if dtype == torch.int8 else roots**4


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_moments_round_to_a_neighbour_and_on_average_to_themselves(dtype):
    generator = torch.Generator().manual_seed(2)
    exact = torch.randn(128, generator=generator) * torch.logspace(-6, 0, 128)
    exact = exact if dtype == torch.int8 else exact.square()
    rounds = 4096
    codes, scales = coding.encoded_moment(exact.repeat(rounds), dtype, words(128 * rounds))
    assert codes.dtype == dtype
    assert scales.shape == (rounds,)
    found = coding.decoded_moment(codes, scales).view(rounds, 128).double()
    values = grid(dtype, scales[0])
    above = torch.searchsorted(values, exact.double()).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    room = 1e-6 * exact.abs().max()  # a value on the grid within rounding may take the next
    assert ((found >= low - room) & (found <= high + room)).all()
    mean, spread = found.mean(0), (high - low) / 2 / rounds**0.5
    unbiased = exact > values[1] if dtype == torch.uint8 else exact.abs() >= 0
    assert ((mean - exact)[unbiased].abs() <= (5 * spread + 2e-6 * exact.abs())[unbiased]).all()
    if dtype == torch.uint8:
        assert (found[:, exact > 0] >= values[1] * (1 - 1e-6)).all()  # never lost: a step divides by it


def test_a_block_of_128_shares_a_scale_and_the_next_does_not():
    values = torch.cat([torch.full((128,), 4.0), torch.full((3,), 1e-12)])
    codes, scales = coding.encoded_moment(values, torch.int8, words(131))
    assert codes.tolist() == [127] * 131
    assert torch.allclose(scales, torch.tensor([2.0, 1e-6]) / 127)
    assert torch.allclose(coding.decoded_moment(codes, scales), values)


def test_nothing_that_is_not_finite_hides_in_a_moment():
    for bad in (math.nan, math.inf):
        values = torch.zeros(200)
        values[5] = bad
        for dtype in (torch.int8, torch.uint8):
            codes, scales = coding.encoded_moment(values, dtype, words(200))
            assert coding.decoded_moment(codes, scales)[:128].isnan().all()
            assert (coding.decoded_moment(codes, scales)[128:] == 0).all()


def case(logits, moments, shape=(3, 131), seed=0):
    """Arguments of `coded_adam` with zero moments, and gradients for several steps."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    exp_avg, exp_avg_sq = (torch.zeros(shape, dtype=dtype) for dtype in coding.MOMENTS[moments])
    coded = moments == "8bit"
    scales = [[torch.zeros(coding.scales_of(values.numel()))] if coded else [] for _ in range(2)]
    lists = [[coding.encoded(values, coding.LOGITS[logits])], [exp_avg], [exp_avg_sq], *scales]
    return lists, [torch.randn(shape, generator=generator) * 10.0 ** (-i) for i in range(4)]


def run(lists, grads, layer=4, **options):
    logits, *state = lists
    steps, lr = torch.zeros(1), torch.tensor(0.01, dtype=torch.float64)
    for grad in grads:
        steps += 1
        ops.coded_adam(logits, [grad], *state, STATE, steps, lr, layers=[layer], **options)


FORMATS = pytest.mark.parametrize("moments", coding.MOMENTS)
LOGITS = pytest.mark.parametrize("logits", coding.LOGITS)
BACKENDS = pytest.mark.parametrize("backend", ["cpp"])


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": False, "betas": (0.3, 0.9)}]
)
def test_without_coding_it_is_adam(options):
    lists, grads = case("fp32", "fp32")
    exact = torch.nn.Parameter(lists[0][0].double())
    single = torch.nn.Parameter(lists[0][0].clone())
    with ops.use_backend("reference"):
        run(lists, grads, eps=1e-8, **options)
    algorithm = torch.optim.AdamW if options.pop("decoupled", True) else torch.optim.Adam
    options = {"weight_decay": 0.0, **options}
    for p in (exact, single):
        opt = algorithm([p], lr=0.01, eps=1e-8, foreach=False, **options)
        for grad in grads:
            p.grad = grad.to(p.dtype)
            opt.step()
    budget = 2 * ((single - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max())
    assert (lists[0][0] - exact).abs().max() <= budget


@FORMATS
@LOGITS
def test_rounding_has_noise_of_its_own_for_each_step_and_layer(logits, moments):
    def codes(layer, repeats):
        lists, grads = case(logits, moments)
        run(lists, grads[:1] * repeats, layer)
        return [t for role in lists for t in role]

    with ops.use_backend("reference"):
        first, again, other = codes(4, 1), codes(4, 1), codes(5, 1)
    assert all(map(torch.equal, first, again))
    coded = (logits, moments) != ("fp32", "fp32")
    assert all(map(torch.equal, first, other)) != coded


def test_the_streams_of_rounding_are_not_those_of_masks():
    drawn = [ops.random_words(4096, STATE, 7, stream=stream) for stream in range(3)]
    assert all((a != b).float().mean() > 0.99 for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), drawn[1:]))


@pytest.mark.parametrize(("logits", "works"), [("fixed16", True), ("bf16", True)])
def test_steps_far_below_the_grid_add_up_and_by_nearest_rounding_are_lost(logits, works):
    """One unit in two hundred a step: stochastic rounding moves on average, rounding to nearest never does."""
    numel, steps, dtype = 20000, 64, coding.LOGITS[logits]
    unit = 2.0**-11 if logits == "fixed16" else 2.0**-7
    start, rate = 1.5, unit / 200
    codes = [coding.encoded(torch.full((numel,), start), dtype)]
    state = [[torch.zeros(numel)], [torch.zeros(numel)], [], []]
    lr = torch.tensor(rate, dtype=torch.float64)
    nearest = codes[0].clone()
    for step in range(1, steps + 1):
        with ops.use_backend("reference"):
            ops.coded_adam(codes, [-torch.ones(numel)], *state, STATE, torch.tensor([float(step)]), lr, layers=[0])
        nearest = coding.encoded(coding.decoded(nearest) + rate, dtype)
    moved = coding.decoded(codes[0]).double().mean() - start
    # each step is a choice of two `unit` apart, so of a variance of at most unit * rate
    budget = 5 * (steps * unit * rate / numel) ** 0.5
    assert abs(moved - steps * rate) < budget
    assert (coding.decoded(nearest) == start).all()


WRONG = {
    "float16 logits": lambda c: c[0].__setitem__(0, c[0][0].half()),
    "moments of two formats": lambda c: c[2].__setitem__(0, c[2][0].float()),
    "no scales": lambda c: c[3].clear(),
    "scales of another length": lambda c: c[4].__setitem__(0, torch.zeros(3)),
    "a transposed moment": lambda c: c[1].__setitem__(0, torch.zeros(131, 3, dtype=torch.int8).t()),
    "another shape": lambda c: c[1].__setitem__(0, torch.zeros(393, dtype=torch.int8)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(what):
    lists, grads = case("fp32", "8bit")
    WRONG[what](lists)
    before = [[t.clone() for t in role] for role in lists]
    with pytest.raises(InputError, match="coded_adam"):
        run(lists, grads[:1])
    assert all(torch.equal(a, b) for old, new in zip(before, lists, strict=True) for a, b in zip(old, new, strict=True))


@LOGITS
def test_masks_are_drawn_from_logits_of_any_format(logits):
    generator = torch.Generator().manual_seed(3)
    values = 2 * torch.randn((40, 33), generator=generator)
    weight = torch.randn((40, 33), generator=generator)
    stored = coding.encoded(values, coding.LOGITS[logits])
    tau = torch.tensor(0.7)
    with ops.use_backend("reference"):
        found = ops.sample([stored], [weight], STATE, tau, pack=True)
        expected = ops.sample([coding.decoded(stored)], [weight], STATE, tau, pack=True)
    assert torch.equal(found[0][0], expected[0][0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert torch.equal(ops.penalty([stored], ops.Mode.GUMBEL_HARD), found[2])


@BACKENDS
@FORMATS
@LOGITS
@pytest.mark.parametrize("shape", [(1,), (127,), (3, 131), (5, 7, 3, 3), (70, 1000)])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": False, "betas": (0.3, 0.9)}]
)
def test_backends_agree_with_the_reference_to_the_last_bit(logits, moments, shape, options, backend):
    found = []
    for who in ("reference", backend):
        lists, grads = case(logits, moments, shape)
        grads[2].view(-1)[::5] = 0
        with ops.use_backend(who):
            run(lists, grads, **options)
        found.append([t for role in lists for t in role])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], case(logits, moments, shape)[0][0][0])


@BACKENDS
@FORMATS
@LOGITS
def test_backends_agree_on_what_is_not_finite_or_has_no_size(logits, moments, backend):
    found = []
    for who in ("reference", backend):
        lists, grads = case(logits, moments, (300,))
        grads[0][140], grads[0][290] = math.nan, math.inf
        grads[1].zero_()
        grads[3] *= 1e-38  # subnormal in part
        lists[0].append(lists[0][0].new_empty(0))
        for role in lists[1:]:
            role.extend([role[0].new_empty(0)] if role else [])
        with ops.use_backend(who):
            for step, grad in enumerate(grads, 1):
                steps, lr = torch.full((2,), float(step)), torch.tensor(0.01, dtype=torch.float64)
                logit, *state = lists
                ops.coded_adam(logit, [grad, grad[:0]], *state, STATE, steps, lr, layers=[4, 5])
        found.append([t for role in lists for t in role])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        assert not a.is_floating_point() or torch.equal(a.isnan(), b.isnan())


@BACKENDS
@LOGITS
@pytest.mark.parametrize("shape", [(12, 40), (16, 8, 3, 3), (131,)])
def test_backends_draw_masks_from_logits_of_any_format(logits, shape, backend):
    generator = torch.Generator().manual_seed(3)
    values, weight, grad = (2 * torch.randn(shape, generator=generator) for _ in range(3))
    weight = weight.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else weight
    stored = coding.encoded(values, coding.LOGITS[logits])
    tau, one = torch.tensor(0.7), torch.ones(())
    rule = (STATE, tau, [2], [0.0], 0, 0)
    with ops.use_backend(backend):
        found = [ops.sample([x], [weight], STATE, tau, layers=[2], pack=True) for x in (stored, coding.decoded(stored))]
        gradients = [
            torch.ops.dwm_fast.sample_backward([grad], one, [x], [weight], *rule, True, True)
            for x in (stored, coding.decoded(stored))
        ]
    assert torch.equal(found[0][0][0], found[1][0][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0][0].dtype == torch.float32
