"""One launch samples a network: exact bits, exact noise, gradients within budgets taken from fp64."""

import itertools
import math

import numpy as np
import pytest
import torch

import dwm_fast
from dwm_fast.kernels import _pointers, _tables
from dwm_fast.kernels._launch import Launch, override_launch
from dwm_fast.kernels.sample import sample, sample_backward
from dwm_fast.ops.coding import FIXED_NAN, decoded, encoded
from dwm_fast.ops.draw import Draw

HARD, SOFT, KEEP, THRESHOLD, TERNARY, EDIT = range(6)
SEED, STEP, OFFSET = -(2**62) + 12345678901, 2**32 - 2, 3
SMALL = {"block": 128, "strided": 128, "groups": 32}

FAMILIES = {
    "odd sizes": [(1,), (3,), (5, 7), (127,), (129,), (1, 1, 1, 1), (33, 31)],
    "rows of four": [(64,), (12, 40), (130, 4)],
    "3x3 channels_last": [(8, 16, 3, 3), (5, 4, 3, 3), (3, 48, 3, 3), (1, 8, 3, 3)],
    "other channels_last": [(4, 3, 7, 7), (6, 5, 3, 3), (16, 8, 1, 1), (2, 4, 5, 5)],
}


class Network:
    """Random logits, weights and gradients; `layout` is applied to every 4-D tensor."""

    def __init__(self, shapes, device, dtype=torch.float32, layout=torch.channels_last):
        generator = torch.Generator().manual_seed(len(shapes))
        self.layers = [7 * i + 1 for i in range(len(shapes))]
        self.thresholds = [0.25 + 0.125 * (i % 3) for i in range(len(shapes))]
        self.logits, self.weights, self.grads = [], [], []
        for shape in shapes:
            draw = [torch.randn(shape, generator=generator) * 2 for _ in range(3)]
            if len(shape) == 4:
                draw = [x.contiguous(memory_format=layout) for x in draw]
            self.logits.append(draw[0].to(device))
            self.weights.append(draw[1].to(device, dtype))
            self.grads.append(draw[2].to(device, dtype))
        self.rng = torch.tensor([SEED, STEP], device=device)
        self.tau = torch.tensor(0.7, device=device)

    def draw(self, mode):
        return Draw(self.rng, self.tau, self.layers, self.thresholds, mode, OFFSET)

    def sample(self, mode, dtype=None, pack=True):
        return sample(self.logits, self.weights, self.draw(mode), dtype, pack)

    def backward(self, mode, penalty=3.0, need_logits=True, need_weights=True):
        grad_penalty = torch.tensor(penalty, device=self.rng.device)
        return sample_backward(
            self.grads, grad_penalty, self.logits, self.weights, self.draw(mode), need_logits, need_weights
        )

    def logical(self, tensors):
        """fp64 in logical order."""
        return [t.detach().double().cpu().reshape(-1) for t in tensors]

    def uniforms(self, oracle):
        return [
            torch.from_numpy(oracle.uniform(0, x.numel(), SEED, STEP + OFFSET, k))
            for x, k in zip(self.logits, self.layers, strict=True)
        ]


def sure_keep(logit, u):
    """The contract's hard mask, and where rounding cannot turn it."""
    drop = torch.sigmoid(-logit)
    return u > drop, (u - drop).abs() > 2.0**-20


def rule(bounded, mode, logit, weight, u, threshold, tau=0.7):
    """Keep flag, masked weight, d(mask or edit)/d(logit), d(masked)/d(weight): `Bounded` where they are not exact."""
    if mode in (HARD, SOFT):
        keep, _ = sure_keep(logit, u)
        argument = bounded.gumbel(logit, u, tau)
        chain = weight * (argument.slope() * bounded.inverse(tau))
        if mode == SOFT:
            return keep, weight * argument.sigmoid(), chain, argument.sigmoid()
        return keep, weight * keep, chain, keep
    if mode == KEEP:
        keep = logit >= 0
        return keep, weight * keep, 0 * logit, keep
    if mode == THRESHOLD:
        keep = logit > threshold
        return keep, weight * keep, weight, keep
    if mode == TERNARY:
        sign = (logit > threshold).double() - (logit < 0).double()
        return sign != 0, weight * sign, weight, sign
    return logit.abs() <= 1, weight + threshold * bounded(logit), threshold + 0 * logit, 1 + 0 * logit


def penalty_of(bounded, mode, logit):
    """Each element's term of the penalty, and its slope."""
    if mode in (HARD, SOFT):
        return bounded(logit).sigmoid(), bounded(logit).slope()
    if mode == EDIT:
        term = (-bounded(logit.abs())).exp()
        return term, -logit.sign() * term
    return 0 * logit, 0 * logit


@pytest.mark.parametrize("mode", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_bits_follow_the_rules(device, oracle, bounded, family, mode):
    net = Network(FAMILIES[family], device)
    with override_launch(**SMALL):
        masked, bits, _ = net.sample(mode)
    keeps, u = [], net.uniforms(oracle)
    flags = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), bitorder="little")).bool()
    start = 0
    for i, (logit, weight) in enumerate(zip(net.logical(net.logits), net.logical(net.weights), strict=True)):
        keep, value, _, _ = rule(bounded, mode, logit, weight, u[i], net.thresholds[i])
        sure = sure_keep(logit, u[i])[1] if mode in (HARD, SOFT) else torch.ones_like(keep)
        given = flags[start : start + logit.numel()]
        start += -(-logit.numel() // 128) * 128
        assert torch.equal(given[sure], keep[sure])
        keeps.append(given.numpy())
        if mode in (SOFT, EDIT):
            value.assert_holds(masked[i])
        else:
            assert torch.equal(net.logical(masked)[i][sure], value[sure])
        assert masked[i].stride() == net.weights[i].stride()
    np.testing.assert_array_equal(bits.cpu().numpy(), oracle.bits(keeps))  # padding bits are zero


@pytest.mark.parametrize("mode", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_penalty_is_the_mean_over_the_network(device, bounded, family, mode):
    net = Network(FAMILIES[family], device)
    with override_launch(**SMALL):
        _, _, penalty = net.sample(mode)
    terms = bounded.of(penalty_of(bounded, mode, torch.cat(net.logical(net.logits)))[0])
    # No term goes through more than 64 fp32 additions (9 taps, 4 channels, a tree) before fp64 takes over.
    mean = bounded.made(terms.value.mean(), terms.error.mean(), 65)
    assert penalty.shape == ()
    assert penalty.dtype == torch.float32
    mean.assert_holds(penalty)


def test_a_network_of_one_weight_is_sampled_too(device):
    masked, _, _ = Network([(1, 1)], device).sample(EDIT)
    assert masked[0].isfinite().all()


@pytest.mark.parametrize("mode", range(6))
@pytest.mark.parametrize("family", ["odd sizes", "3x3 channels_last", "other channels_last"])
def test_gradients_are_the_reference_rule_in_fp64(device, oracle, bounded, family, mode):
    net = Network(FAMILIES[family], device)
    with override_launch(**SMALL):
        dlogits, dweights = net.backward(mode)
    logits, weights, grads = net.logical(net.logits), net.logical(net.weights), net.logical(net.grads)
    scale = bounded(3.0) * bounded.inverse(float(sum(x.numel() for x in logits)))
    for i, u in enumerate(net.uniforms(oracle)):
        _, _, chain, value = rule(bounded, mode, logits[i], weights[i], u, net.thresholds[i])
        _, slope = penalty_of(bounded, mode, logits[i])
        (bounded.of(grads[i]) * chain + scale * slope).assert_holds(dlogits[i])
        dweight = net.logical(dweights)[i]
        if mode == SOFT:
            (grads[i] * value).assert_holds(dweight)
        else:
            sure = sure_keep(logits[i], u)[1] if mode == HARD else slice(None)
            assert torch.equal(dweight[sure], (grads[i] * value)[sure])
        assert dlogits[i].stride() == net.logits[i].stride()
        assert dweights[i].stride() == net.weights[i].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [None, torch.bfloat16])
def test_weight_dtypes_are_rounded_once(device, dtype, out):
    net = Network([(40,), (7, 5), (4, 4, 3, 3)], device, dtype)
    soft, bits, _ = net.sample(SOFT, out)
    wide = Network([(40,), (7, 5), (4, 4, 3, 3)], device)
    wide.weights = [w.float() for w in net.weights]
    exact, same_bits, _ = wide.sample(SOFT)
    assert torch.equal(bits, same_bits)
    for a, b in zip(soft, exact, strict=True):
        assert a.dtype == (out or dtype)
        assert torch.equal(a, b.to(a.dtype))
    hard, _, _ = net.sample(HARD, out)
    for a, w in zip(hard, net.weights, strict=True):
        assert torch.equal(a[a != 0], w.to(a.dtype)[a != 0])
    _, dweights = net.backward(HARD)
    assert all(d.dtype == dtype for d in dweights)


def test_results_do_not_depend_on_tile_sizes(device):
    net = Network([(300,), (33, 31), (3, 48, 3, 3), (6, 5, 3, 3)], device)
    results = []
    for fields in ({}, {"block": 256, "strided": 128, "groups": 32, "num_warps": 2}):
        with override_launch(**fields):
            masked, bits, _ = net.sample(HARD)
            dlogits, dweights = net.backward(SOFT)
            results.append([bits, *masked, *dlogits, *dweights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_formats_draw_the_same_masks(device):
    shapes = FAMILIES["3x3 channels_last"] + FAMILIES["other channels_last"]
    last, plain = Network(shapes, device), Network(shapes, device, layout=torch.contiguous_format)
    mixed = Network(shapes, device)
    mixed.logits = [x.contiguous() for x in mixed.logits]
    mixed.grads = [x.contiguous() for x in mixed.grads]
    results = [(n.sample(HARD), n.backward(HARD)) for n in (plain, last, mixed)]
    for forward, backward in results[1:]:
        assert torch.equal(forward[1], results[0][0][1])
        assert all(torch.equal(a, b) for a, b in zip(forward[0], results[0][0][0], strict=True))
        for mine, first in zip(backward, results[0][1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
    assert all(a.stride() == x.stride() for a, x in zip(results[2][1][0], mixed.logits, strict=True))


def test_transposed_expanded_and_unaligned_tensors(device):
    net, plain = Network([(24, 20), (64,)], device), Network([(24, 20), (64,)], device)
    net.weights[0] = net.weights[0].t().contiguous().t()
    net.grads = [torch.ones((), device=device).expand(24, 20), net.grads[1]]
    plain.grads[0] = torch.ones(24, 20, device=device)
    net.logits[1] = torch.cat([torch.zeros(1, device=device), net.logits[1]])[1:]
    results = [[*n.sample(HARD)[0], *itertools.chain(*n.backward(SOFT))] for n in (net, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_hundred_layers_of_mixed_sizes_are_one_launch(device, oracle, monkeypatch):
    shapes = [(1 + 13 * i % 37,) for i in range(97)] + [(4, 4, 3, 3)] * 10 + [(3, 3, 3, 3)] * 5
    net = Network(shapes, device)
    launches = []
    kernel = sample.__globals__["sample_fwd_kernel"]

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setitem(sample.__globals__, "sample_fwd_kernel", Counted())
    _, bits, _ = net.sample(HARD)
    assert len(launches) == 1
    keeps = [sure_keep(x, u)[0].numpy() for x, u in zip(net.logical(net.logits), net.uniforms(oracle), strict=True)]
    np.testing.assert_array_equal(bits.cpu().numpy(), oracle.bits(keeps))


def test_mixed_dtypes_and_empty_tensors(device):
    net = Network([(8,), (0,), (5,), (0, 4)], device)
    net.weights[2] = net.weights[2].half()
    masked, bits, penalty = net.sample(KEEP)
    assert [m.shape for m in masked] == [w.shape for w in net.weights]
    assert [m.dtype for m in masked] == [w.dtype for w in net.weights]
    assert bits.numel() == 32
    assert penalty.item() == 0
    assert torch.equal(masked[2], torch.where(net.logits[2] >= 0, net.weights[2], 0))
    dlogits, _ = net.backward(THRESHOLD)
    assert torch.equal(dlogits[2], net.grads[2] * net.weights[2].float())


def test_gradients_that_nobody_needs_are_not_made(device):
    net = Network([(8,), (4, 4, 3, 3)], device)
    both = net.backward(HARD)
    assert net.backward(HARD, need_logits=False)[0] == []
    assert net.backward(HARD, need_weights=False)[1] == []
    assert net.backward(HARD, need_logits=False, need_weights=False) == ([], [])
    one = [*net.backward(HARD, need_weights=False)[0], *net.backward(HARD, need_logits=False)[1]]
    assert all(torch.equal(a, b) for a, b in zip(one, itertools.chain(*both), strict=True))


def test_extreme_logits(device):
    net = Network([(8,)], device)
    net.logits[0] = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4, float("inf")], device=device)
    masked, _, penalty = net.sample(HARD)
    assert (masked[0][:3] == 0).all()
    assert torch.equal(masked[0][4:], net.weights[0][4:])
    assert penalty.item() == pytest.approx(4.5 / 8, rel=1e-6)
    dlogits, _ = net.backward(HARD)
    assert dlogits[0].isfinite().all()
    assert net.sample(SOFT)[0][0].isfinite().all()


def test_infinite_logits_keep_or_drop_for_good(device, infinite_logits):
    with dwm_fast.use_backend("triton"):
        infinite_logits(device)


@pytest.mark.parametrize(
    ("shape", "chunk", "size"),
    [((128,), 2**26 + 5, 128), ((8, 16, 3, 3), 2**24 + 32, 36 * 32), ((25,), 2**26 + 3, 128)],
    ids=["flat", "taps", "strided"],
)
def test_elements_beyond_int32(device, oracle, monkeypatch, shape, chunk, size):
    """A chunk past element 2**33 of a network whose addresses are moved back, so that it falls on a small tensor."""
    net, first = Network([shape], device), chunk * size
    build, pointers = _tables._build, _pointers.pointers

    def moved(*arguments):
        plan = build(*arguments)
        plan.blocks[:, 1] += chunk
        plan.rows[:, _tables.NUMEL.value] += first
        plan.rows[:, _tables.OUTPUT.value] -= first
        return plan

    monkeypatch.setattr(_tables, "_build", moved)
    monkeypatch.setattr(_tables, "_plans", type(_tables._plans)())
    monkeypatch.setitem(sample.__globals__, "pointers", lambda roles: pointers(roles) - 4 * first)
    with override_launch(**SMALL):
        masked, _, _ = net.sample(HARD, pack=False)
    u = oracle.uniform(first, masked[0].numel(), SEED, STEP + OFFSET, net.layers[0])
    keep, _ = sure_keep(net.logical(net.logits)[0], torch.from_numpy(u))
    assert torch.equal(net.logical(masked)[0], net.logical(net.weights)[0] * keep)
    assert 0 < keep.sum() < keep.numel()


def test_tables_are_built_once(device, monkeypatch):
    net = Network([(8,), (4, 4, 3, 3)], device)
    net.sample(HARD)
    monkeypatch.setattr(_tables, "_build", lambda *_: pytest.fail("the tables were built again"))
    net.sample(SOFT)
    net.rng += 1
    net.sample(HARD)


def test_pointer_writer_fills_a_table(device):
    values = tuple(2**40 + 16 * i for i in range(_pointers.POINTERS_PER_LAUNCH + 3))
    table = _pointers._write(values, device)
    assert table[: len(values)].tolist() == list(values)


def test_launch_fields_are_checked():
    for fields in ({"block": 100}, {"groups": 16}, {"num_warps": 3}, {"block": 256, "strided": 512}):
        with pytest.raises(ValueError, match="expected"):
            Launch(**fields)


def test_steps_layers_and_seeds_give_other_masks(device):
    net = Network([(512,), (512,)], device)
    net.logits = [torch.zeros(512, device=device)] * 2
    net.weights = [torch.ones(512, device=device)] * 2
    first, _, _ = net.sample(HARD)
    draws = [first[0], first[1]]
    for change in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        net.rng += change.to(device)
        draws.append(net.sample(HARD)[0][0])
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(512)


@pytest.mark.parametrize("name", ["odd sizes", "3x3 channels_last"])
def test_logits_in_few_bits_are_read_as_what_they_stand_for(device, name):
    """Formats side by side in one network give what their decoded values give, to the last bit; NaN is never kept."""
    net = Network(FAMILIES[name], device)
    formats = itertools.cycle((torch.int16, torch.bfloat16, torch.float32))
    stored = [torch.empty_like(x, dtype=f).copy_(encoded(x, f)) for x, f in zip(net.logits, formats, strict=False)]
    first = (0,) * stored[0].dim()
    stored[0][first] = FIXED_NAN
    found = []
    with override_launch(**(SMALL if name == "odd sizes" else {})):
        for net.logits in (stored, [torch.empty_like(x, dtype=torch.float32).copy_(decoded(x)) for x in stored]):
            masked, bits, penalty = net.sample(HARD)
            found.append([*masked, bits, penalty.nan_to_num(7.0), *itertools.chain(*net.backward(HARD))])
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*found, strict=True))
    assert all(a.stride() == x.stride() for a, x in zip(net.backward(HARD)[0], stored, strict=True))
    assert found[0][0][first] == 0
    assert not torch.equal(found[0][1], net.weights[1])
