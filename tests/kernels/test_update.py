"""One launch steps a network: torch.optim's result on free lanes, untouched kept lanes, the chain rule on logits."""

import itertools

import numpy as np
import pytest
import torch

from dwm_fast.kernels import update as kernels
from dwm_fast.kernels._launch import override_launch
from dwm_fast.ops.draw import Draw

SHAPES = [(1,), (131,), (12, 40), (3, 48, 3, 3), (2, 3, 3, 3), (16, 12)]
NOTHING = torch.empty(0, dtype=torch.int64)
SMALL = {"block": 256, "strided": 256, "groups": 32}


class Weights:
    """Weights in mixed layouts, keep masks, gradients of two steps; kept lanes' gradients are NaN."""

    def __init__(self, device, oracle, dtype=torch.float32, fraction=0.4):
        generator = torch.Generator().manual_seed(5)
        self.device, self.dtype = device, dtype
        self.weights = self._layout([torch.randn(s, generator=generator) for s in SHAPES])
        self.keeps = [(torch.rand(s, generator=generator) < fraction).to(device) for s in SHAPES]
        self.grads = []
        for _ in range(2):
            grads = self._layout([torch.randn(s, generator=generator) for s in SHAPES])
            self.grads.append([g.masked_fill(k, float("nan")) for g, k in zip(grads, self.keeps, strict=True)])
        self.bits = torch.from_numpy(oracle.bits([k.cpu().numpy().reshape(-1) for k in self.keeps])).to(device)
        self.before = [w.clone() for w in self.weights]
        self.steps = torch.zeros(len(SHAPES), device=device)
        self.lr = torch.tensor(1e-2, dtype=torch.float64, device=device)

    def _layout(self, tensors):
        tensors = [t.to(self.device, self.dtype) for t in tensors]
        tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        tensors[-1] = tensors[-1].t().contiguous().t()
        return tensors

    def state(self, compact=False):
        """Poisoned on kept lanes, zero on free ones."""
        wide = torch.promote_types(self.dtype, torch.float32)
        if compact:
            return [torch.zeros(int((~k).sum()), dtype=wide, device=self.device) for k in self.keeps]
        zeros = [torch.zeros_like(w, dtype=wide) for w in self.weights]
        return [z.masked_fill(k, float("nan")) for z, k in zip(zeros, self.keeps, strict=True)]

    def ranks(self):
        parts = []
        for keep in self.keeps:
            free = np.zeros(-(-keep.numel() // 128) * 128, dtype=np.int64)
            free[: keep.numel()] = ~keep.cpu().numpy().reshape(-1)
            counts = free.reshape(-1, 128).sum(1)
            parts.append(np.cumsum(counts) - counts)
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def run(self, step):
        with override_launch(**SMALL):
            for grads in self.grads:
                self.steps += 1
                step(grads)

    def expect(self, optimizer_class, **options):
        """fp64 results of torch.optim and those of the same optimiser in fp32, for the budget."""
        results = []
        for dtype in (torch.float64, torch.promote_types(self.dtype, torch.float32)):
            parameters = [torch.nn.Parameter(w.to(dtype, copy=True)) for w in self.before]
            optimizer = optimizer_class(parameters, lr=1e-2, foreach=False, **options)
            for grads in self.grads:
                for p, g in zip(parameters, grads, strict=True):
                    p.grad = g.to(dtype).nan_to_num()
                optimizer.step()
            results.append([p.detach() for p in parameters])
        return results

    def check(self, exact, reference):
        for w, e, r, old, keep in zip(self.weights, exact, reference, self.before, self.keeps, strict=True):
            assert torch.equal(w[keep], old[keep])
            if (~keep).any():
                budget = 2 * ((r.to(self.dtype).double() - e).abs().max() + torch.finfo(self.dtype).eps * e.abs().max())
                assert (w.double() - e)[~keep].abs().max() <= budget
                assert not torch.equal(w, old)


ADAM = [
    (torch.optim.AdamW, {"weight_decay": 0.1}, {"decoupled": True, "maximize": False}),
    (torch.optim.Adam, {"weight_decay": 0.1}, {"decoupled": False, "maximize": False}),
    (torch.optim.Adam, {"maximize": True, "betas": (0.3, 0.9)}, {"decoupled": False, "maximize": True}),
]


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize(("optimizer", "options", "flags"), ADAM, ids=["adamw", "adam", "maximize"])
def test_frozen_adamw_is_torch_optim_on_free_lanes(device, oracle, optimizer, options, flags, compact):
    case = Weights(device, oracle)
    m, v = case.state(compact), case.state(compact)
    ranks = case.ranks() if compact else NOTHING.to(device)
    betas = options.get("betas", (0.9, 0.999))
    case.run(
        lambda grads: kernels.frozen_adamw(
            case.weights,
            grads,
            m,
            v,
            case.bits,
            ranks,
            case.steps,
            case.lr,
            *betas,
            1e-8,
            options.get("weight_decay", 0.0),
            flags["decoupled"],
            flags["maximize"],
        )
    )
    case.check(*case.expect(optimizer, eps=1e-8, **options))
    for moment, keep in zip((*m, *v), case.keeps * 2, strict=True):
        assert moment.isnan().sum() == (0 if compact else keep.sum())  # kept lanes still hold their poison


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frozen_adamw_in_other_dtypes(device, oracle, dtype):
    case = Weights(device, oracle, dtype)
    case.grads = case.grads[:1]
    m, v = case.state(), case.state()
    case.run(
        lambda grads: kernels.frozen_adamw(
            case.weights,
            grads,
            m,
            v,
            case.bits,
            NOTHING.to(device),
            case.steps,
            case.lr,
            0.9,
            0.999,
            1e-3,
            0.1,
            True,
            False,
        )
    )
    case.check(*case.expect(torch.optim.AdamW, eps=1e-3, weight_decay=0.1))


SGD = [
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.25, "maximize": True},
    {"weight_decay": 0.1},
]


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("options", SGD, ids=["nesterov", "dampening", "plain"])
def test_frozen_sgd_is_torch_optim_on_free_lanes(device, oracle, options, compact):
    case = Weights(device, oracle)
    momentum = options.get("momentum", 0.0)
    buffers = case.state(compact) if momentum else []
    ranks = case.ranks() if compact else NOTHING.to(device)
    case.run(
        lambda grads: kernels.frozen_sgd(
            case.weights,
            grads,
            buffers,
            case.bits,
            ranks,
            case.steps,
            case.lr,
            momentum,
            options.get("dampening", 0.0),
            options.get("weight_decay", 0.0),
            options.get("nesterov", False),
            False,
            options.get("maximize", False),
        )
    )
    case.check(*case.expect(torch.optim.SGD, **options))


def test_without_bits_every_lane_moves(device, oracle):
    case = Weights(device, oracle, fraction=0.0)
    m, v = case.state(), case.state()
    no_bits = torch.empty(0, dtype=torch.uint8, device=device)
    case.run(
        lambda grads: kernels.frozen_adamw(
            case.weights,
            grads,
            m,
            v,
            no_bits,
            NOTHING.to(device),
            case.steps,
            case.lr,
            0.9,
            0.999,
            1e-8,
            0.1,
            True,
            False,
        )
    )
    case.check(*case.expect(torch.optim.AdamW, eps=1e-8, weight_decay=0.1))


def test_many_steps_keep_the_bias_correction(device):
    """At step 12345 the corrections come from powers by squaring; torch.optim takes them from Python floats."""
    results = []
    for dtype in (torch.float32, torch.float64):
        w = torch.nn.Parameter(torch.ones(64, dtype=dtype, device=device))
        optimizer = torch.optim.Adam([w], lr=1e-2, foreach=False)
        w.grad = torch.full_like(w, 0.5)
        optimizer.step()
        optimizer.state[w]["step"].fill_(12344.0)
        moments = [optimizer.state[w][name].clone() for name in ("exp_avg", "exp_avg_sq")]
        start = w.detach().clone()
        optimizer.step()
        results.append((start, moments, w.detach()))
    w, (m, v), reference = results[0]
    kernels.frozen_adamw(
        [w],
        [torch.full_like(w, 0.5)],
        [m],
        [v],
        torch.empty(0, dtype=torch.uint8, device=device),
        NOTHING.to(device),
        torch.full((1,), 12345.0, device=device),
        torch.tensor(1e-2, dtype=torch.float64, device=device),
        0.9,
        0.999,
        1e-8,
        0.0,
        True,
        False,
    )
    exact = results[1][2]
    budget = 2 * ((reference.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max())
    assert (w.double() - exact).abs().max() <= budget


def _soft_gradient(bounded, logits, weights, grads, u, scale):
    """d(sum G W soft)/dl + scale * sigmoid'(l)."""
    x = logits.double().cpu()
    soft = bounded.gumbel(x, u, 0.7).slope() * bounded.inverse(0.7)
    return bounded(grads.double()) * weights.double().cpu() * soft + scale * bounded(x).slope()


@pytest.mark.parametrize("mode", [0, 1])
def test_mask_adam_is_the_chain_rule_and_then_adamw(device, oracle, bounded, mode):
    case = Weights(device, oracle, fraction=0.0)
    logits = [2 * w.flip(0).contiguous() for w in case.weights]
    logits = [torch.empty_like(w).copy_(x) for w, x in zip(case.weights, logits, strict=True)]
    weights = [w.bfloat16() for w in case.weights]
    rng, scale = torch.tensor([77, 8], device=device), torch.tensor(0.01, device=device)
    layers = list(range(3, 3 + len(SHAPES)))

    def adamw(dtype, signs):
        """AdamW of torch in `dtype`, its gradient of step i at `signs[i]` times the bound of its error."""
        parameters = [torch.nn.Parameter(x.to(dtype, copy=True)) for x in logits]
        optimizer = torch.optim.AdamW(
            parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01, foreach=False
        )
        for step, (grads, sign) in enumerate(zip(case.grads, signs, strict=True)):
            for i, p in enumerate(parameters):
                u = torch.from_numpy(oracle.uniform(0, p.numel(), 77, 8 + step + 2, layers[i])).view(p.shape)
                gradient = _soft_gradient(bounded, p.detach(), weights[i], grads[i].bfloat16(), u, 0.01)
                p.grad = torch.empty_like(p).copy_(gradient.value + sign * gradient.error)
            optimizer.step()
        return [p.detach().double() for p in parameters]

    exact = adamw(torch.float64, (0, 0))
    rough = [adamw(torch.float32, signs) for signs in itertools.product((-1, 1), repeat=2)]
    m, v = [torch.zeros_like(x) for x in logits], [torch.zeros_like(x) for x in logits]

    def step(grads):
        kernels.mask_adam(
            logits,
            weights,
            [g.bfloat16() for g in grads],
            m,
            v,
            Draw(rng, torch.tensor(0.7, device=device), layers, [0.0] * len(SHAPES), mode, 2),
            scale,
            case.steps,
            case.lr,
            0.9,
            0.99,
            1e-6,
            0.01,
            True,
        )
        rng[1] += 1

    case.run(step)
    for x, e, *others in zip(logits, exact, *rough, strict=True):
        budget = 2 * (max((r - e).abs().max() for r in others) + torch.finfo(torch.float32).eps * e.abs().max())
        assert (x.double() - e).abs().max() <= budget


def test_other_modes_take_their_own_gradient(device):
    """THRESHOLD: G * W; EDIT: G * threshold - scale * sign(e) exp(-|e|); KEEP: none. Adam's first step is its sign."""
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0] * 8, device=device)
    w, g = torch.linspace(-1, 1, 32, device=device), torch.linspace(1, -2, 32, device=device)
    gradients = {2: torch.zeros_like(x), 3: g * w, 4: g * w, 5: g * 0.5 - 0.25 * x.sign() * (-x.abs()).exp()}
    for mode, gradient in gradients.items():
        logits, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        kernels.mask_adam(
            [logits],
            [w],
            [g],
            [m],
            [v],
            Draw(torch.tensor([1, 0], device=device), torch.tensor(1.0, device=device), [0], [0.5], mode),
            torch.tensor(0.25, device=device),
            torch.ones(1, device=device),
            torch.tensor(1e-2, dtype=torch.float64, device=device),
            0.9,
            0.99,
            1e-15,
            0.0,
            True,
        )
        torch.testing.assert_close(m, 0.1 * gradient, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(logits, x - 1e-2 * gradient.sign(), rtol=1e-5, atol=1e-6)


def test_mixed_dtypes_are_refused(device):
    from dwm_fast.errors import InputError

    w = [torch.ones(4, device=device), torch.ones(4, device=device).half()]
    with pytest.raises(InputError, match="once per dtype"):
        kernels.frozen_sgd(
            w,
            w,
            [],
            NOTHING.byte(),
            NOTHING,
            torch.ones(2),
            torch.tensor(0.1).double(),
            0.0,
            0.0,
            0.0,
            False,
            False,
            False,
        )
