"""The update operations keep torch.optim's formulas on free lanes and never write a kept one."""

import itertools

import pytest
import torch

from dwm_fast.ops import Mode, pack, random_words, uniform, use_backend
from dwm_fast.ops.update import free_ranks, frozen_adamw, frozen_sgd, mask_adam

SHAPES = [(1,), (127,), (128,), (129,), (5, 67), (8, 3, 3, 3)]
NOTHING = torch.empty(0, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def _case(dtype=torch.float32, fraction=0.4, channels_last=False):
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    if channels_last:
        weights = [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
    keeps = [torch.rand(s, generator=generator) < fraction for s in SHAPES]
    grads = [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(6)]
    return weights, keeps, grads


def _lr(value=1e-2):
    return torch.tensor(value, dtype=torch.float64)


def _states(weights):
    return [torch.zeros_like(w, dtype=torch.float32) for w in weights]


def _run_adamw(weights, keeps, grads, compact=False, **options):
    bits, ranks = pack(keeps), NOTHING
    m, v = _states(weights), _states(weights)
    if compact:
        ranks = free_ranks(bits, [w.numel() for w in weights])
        free = [int((~k).sum()) for k in keeps]
        m, v = [torch.zeros(n) for n in free], [torch.zeros(n) for n in free]
    steps = torch.zeros(len(weights))
    for g in grads:
        steps += 1
        frozen_adamw(weights, g, m, v, bits, ranks, steps, _lr(), **options)
    return m, v


def test_ranks_count_the_free_lanes_before_each_block():
    _, keeps, _ = _case()
    ranks = iter(free_ranks(pack(keeps), [k.numel() for k in keeps]).tolist())
    for keep in keeps:
        flat = keep.flatten().tolist()
        for start in range(0, len(flat), 128):
            assert next(ranks) == flat[:start].count(False)
    assert next(ranks, None) is None


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_lanes_stay_bit_identical_whatever_their_gradient(dtype, compact):
    weights, keeps, grads = _case(dtype)
    before = [w.clone() for w in weights]
    for step, keep in itertools.product(grads, range(len(keeps))):
        step[keep][keeps[keep]] = float("nan")
    m, _ = _run_adamw(weights, keeps, grads, compact, weight_decay=0.1)
    for w, old, keep, moment in zip(weights, before, keeps, m, strict=True):
        assert torch.equal(w[keep], old[keep])
        assert not torch.equal(w, old) or keep.all()
        assert torch.isfinite(w).all()
        assert torch.isfinite(moment).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_compact_state_gives_the_same_weights_as_dense_state(channels_last):
    weights, keeps, grads = _case(channels_last=channels_last)
    dense = [w.clone() for w in weights]
    m, _ = _run_adamw(weights, keeps, grads, compact=True, weight_decay=0.1)
    dense_m, _ = _run_adamw(dense, keeps, grads, compact=False, weight_decay=0.1)
    for a, b, x, y, keep in zip(weights, dense, m, dense_m, keeps, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert torch.equal(x, y[~keep])
        assert not y[keep].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_the_fp64_step_within_one_rounding(dtype):
    weights, keeps, grads = _case(dtype)
    exact = [w.double() for w in weights]
    parameters = [torch.nn.Parameter(w) for w in exact]
    _run_adamw(weights, keeps, grads[:1], eps=1e-3)
    for p, g in zip(parameters, grads[0], strict=True):
        p.grad = g.double()
    torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, weight_decay=0.0).step()
    for w, p, keep in zip(weights, parameters, keeps, strict=True):
        rounded = p.detach().to(dtype).double()
        budget = 2 * ((rounded - p).abs().max() + torch.finfo(torch.float32).eps * p.abs().max())
        assert ((w.double() - p)[~keep].abs() <= budget).all()


def test_sgd_starts_its_buffer_with_the_gradient_and_dampens_later():
    weight, buffer = [torch.zeros(3)], [torch.full((3,), 9.0)]
    for step in (1.0, 2.0):
        frozen_sgd(
            weight,
            [torch.ones(3)],
            buffer,
            NOTHING.byte(),
            NOTHING,
            torch.tensor([step]),
            _lr(1.0),
            momentum=0.5,
            dampening=0.75,
        )
    assert buffer[0].tolist() == [0.75] * 3  # 1, then 0.5 * 1 + 0.25 * 1
    assert weight[0].tolist() == [-1.75] * 3


def test_autograd_learns_that_weights_were_written():
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    frozen_sgd([w], [torch.ones(3)], [], NOTHING.byte(), NOTHING, torch.ones(1), _lr())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["frozen_adamw", "frozen_sgd", "mask_adam"])
def test_schema_fake_and_mutation_agree(op):
    lists = [[torch.rand(4), torch.rand(2, 3)] for _ in range(5)]
    no_bits, steps, lr = torch.empty(0, dtype=torch.uint8), torch.ones(2), _lr()
    arguments = {
        "frozen_adamw": (*lists[:4], no_bits, NOTHING, steps, lr, 0.9, 0.99, 1e-8, 0.1, True, False),
        "frozen_sgd": (*lists[:3], no_bits, NOTHING, steps, lr, 0.9, 0.0, 0.1, False, False, False),
        "mask_adam": (
            *lists,
            torch.tensor([3, 0]),
            torch.tensor(1.0),
            [0, 1],
            [0.0, 0.0],
            0,
            0,
            torch.tensor(0.1),
            steps,
            lr,
            0.9,
            0.99,
            1e-15,
            0.0,
            True,
        ),
    }
    torch.library.opcheck(getattr(torch.ops.dwm_fast, op), arguments[op])


def _oracle_loss(logits, weights, grads, mode, rng, tau, thresholds, coefficient):
    """sum(G * masked weight) + coefficient * penalty, by autograd, from the formulas of the mask rules."""
    dtype = logits[0].dtype
    loss, terms = torch.zeros((), dtype=dtype), []
    for layer, (x, w, g, t) in enumerate(zip(logits, weights, grads, thresholds, strict=True)):
        w, g = w.to(dtype), g.to(dtype)
        if mode in (Mode.GUMBEL_HARD, Mode.GUMBEL_SOFT):
            u = uniform(random_words(x.numel(), rng, layer, 2)).view(x.shape).to(dtype)
            soft = torch.sigmoid((x + torch.log(u) - torch.log1p(-u)) / tau)
            mask = soft if mode == Mode.GUMBEL_SOFT else soft + ((soft > 0.5).to(dtype) - soft).detach()
            terms.append(torch.sigmoid(x).flatten())
        elif mode == Mode.EDIT:
            loss = loss + (g * t * x).sum()
            terms.append(torch.exp(-x.abs()).flatten())
            continue
        else:
            mask = (x > t).to(dtype)
            if mode == Mode.TERNARY:
                mask = mask - (x < 0).to(dtype)
            mask = x + (mask - x).detach()
        loss = loss + (g * w * mask).sum()
    return loss + coefficient * torch.cat(terms).mean() if terms else loss


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode != Mode.KEEP])
def test_mask_adam_follows_autograd_and_adamw_in_fp64(mode):
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(s, generator=generator) for s in SHAPES]
    weights = [torch.randn(s, generator=generator) for s in SHAPES]
    thresholds = [0.1 * i for i in range(len(SHAPES))]
    total, coefficient, tau = sum(x.numel() for x in logits), 3.0, 0.7
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    copies = {d: [x.to(d).requires_grad_() for x in logits] for d in (torch.float64, torch.float32)}
    adams = {d: torch.optim.AdamW(x, **options) for d, x in copies.items()}
    m, v, steps = _states(logits), _states(logits), torch.zeros(len(logits))
    for step in range(5):
        rng = torch.tensor([99, step])
        grads = [torch.randn(s, generator=generator) for s in SHAPES]
        steps += 1
        mask_adam(
            logits,
            weights,
            grads,
            m,
            v,
            rng,
            torch.tensor(tau),
            torch.tensor(coefficient / total),
            steps,
            _lr(),
            mode=mode,
            layers=range(len(SHAPES)),
            thresholds=thresholds,
            step_offset=2,
            eps=1e-6,
            weight_decay=0.1,
        )
        for dtype, learned in copies.items():
            adams[dtype].zero_grad()
            _oracle_loss(learned, weights, grads, mode, rng, tau, thresholds, coefficient).backward()
            adams[dtype].step()
    for ours, low, exact in zip(logits, copies[torch.float32], copies[torch.float64], strict=True):
        eps = torch.finfo(torch.float32).eps
        budget = 2 * ((low.double() - exact).abs().max() + eps * exact.abs().max())
        assert (ours.double() - exact).abs().max() <= budget


def test_mask_adam_leaves_logits_alone_where_the_rule_gives_them_no_gradient():
    logits, before = [torch.randn(5)], torch.zeros(5)
    before.copy_(logits[0])
    mask_adam(
        logits,
        [torch.randn(5)],
        [torch.randn(5)],
        _states(logits),
        _states(logits),
        torch.tensor([1, 2]),
        torch.tensor(1.0),
        torch.tensor(1.0),
        torch.ones(1),
        _lr(),
        mode=Mode.KEEP,
        layers=[0],
        thresholds=[0.0],
    )
    assert torch.equal(logits[0], before)
