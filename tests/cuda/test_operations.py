"""Every operation on a GPU's tensors: computed by Triton, guarded, and what the reference gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import filters
from dwm_fast.ops.kept import weight_like
from dwm_fast.ops.update import free_ranks
from dwm_fast.ops.ways import ONE_PASS, STAGED, choose_for

pytestmark = pytest.mark.filterwarnings("ignore:dwm_fast. backend 'cuda' is not used")

SHAPES = ((8, 4, 3, 3), (5, 7), (2, 3))
Case = Callable[[Callable[[Tensor], Tensor]], list[Tensor]]


class Draws:
    """Random tensors from one seed, put on a device."""

    def __init__(self, put: Callable[[Tensor], Tensor]) -> None:
        self.put, self.generator = put, torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        return self.put(torch.randn(shape, generator=self.generator))

    def leaf(self, *shape: int) -> Tensor:
        return self.randn(*shape).requires_grad_()

    def each(self, leaf: bool = False) -> list[Tensor]:
        return [self.leaf(*s) if leaf else self.randn(*s) for s in SHAPES]

    def zeros(self) -> list[Tensor]:
        return [self.put(torch.zeros(s)) for s in SHAPES]

    def noise(self) -> tuple[Tensor, Tensor]:
        return self.put(torch.tensor([5, 2])), self.put(torch.tensor(0.7))

    def bits(self, domains: int = 0, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Tensor:
        def one() -> Tensor:
            return ops.pack([torch.randn(s, generator=self.generator) > 0 for s in shapes])

        return self.put(torch.stack([one() for _ in range(domains)]) if domains else one())


def sample(d: Draws) -> list[Tensor]:
    logits, weights = d.each(leaf=True), d.each(leaf=True)
    masked, bits, penalty = ops.sample(logits, weights, *d.noise(), pack=True)
    (sum(m.square().sum() for m in masked) + penalty).backward()
    return [*masked, bits, penalty, *(x.grad for x in (*logits, *weights))]


def kernel_soft(d: Draws) -> list[Tensor]:
    weights = [d.randn(8, 4, 3, 3), d.randn(6, 4, 1, 1)]
    reals = [d.leaf(8, 4, 1, 1), d.leaf(6, 4, 1, 1)]
    masked = ops.kernel_soft(reals, weights, d.noise()[0], noisy=True)
    sum(m.square().sum() for m in masked).backward()
    return [*masked, *(r.grad for r in reals)]


def mask_adam(d: Draws) -> list[Tensor]:
    state = d.each(), d.each(), d.each(), d.zeros(), d.zeros()
    one = d.put(torch.ones(()))
    ops.mask_adam(
        *state,
        *d.noise(),
        one / 100,
        one.expand(3).contiguous(),
        one.double() / 10,
        mode=0,
        layers=[0, 1, 2],
        thresholds=[0.0] * 3,
        weight_decay=0.01,
    )
    return [*state[0], *state[3], *state[4]]


def coded_adam(d: Draws) -> list[Tensor]:
    codes = [(1000 * x).to(torch.int16) for x in d.each()]
    moments = [[x.to(dtype) for x in d.zeros()] for dtype in (torch.int8, torch.uint8)]
    scales = [[d.put(torch.zeros(-(-x.numel() // 128))) for x in codes] for _ in moments]
    one = d.put(torch.ones(3))
    ops.coded_adam(codes, d.each(), *moments, *scales, d.noise()[0], one, one[0].double() / 10, layers=[0, 1, 2])
    return [*codes, *moments[0], *moments[1], *scales[0], *scales[1]]


def pattern_mask(d: Draws) -> list[Tensor]:
    logits, weights = [d.leaf(5, 2, 6), d.leaf(3, 1, 6)], [d.randn(5, 8), d.randn(3, 4)]
    masked = ops.pattern_mask(logits, weights, d.noise()[0], d.put(torch.tensor([0.7, 3.0])))
    sum(m.square().sum() for m in masked).backward()
    return [*masked, *(x.grad for x in logits)]


def frozen(d: Draws, compact: bool, step: Callable[..., None], states: int) -> list[Tensor]:
    weights, grads, bits = d.each(), d.each(), d.bits()
    steps, lr = d.put(torch.ones(3)), d.put(torch.tensor(0.1, dtype=torch.float64))
    numels = [w.numel() for w in weights]
    ranks = free_ranks(bits, numels) if compact else bits.new_empty(0, dtype=torch.int64)
    free = [n - int(c) for n, c in zip(numels, ops.count(bits, numels).tolist(), strict=True)]
    state = [[d.put(torch.zeros(n)) for n in free] if compact else d.zeros() for _ in range(states)]
    step(weights, grads, *state, bits, ranks, steps, lr)
    return [*weights, *(s for column in state for s in column)]


def frozen_sgd(d: Draws) -> list[Tensor]:
    return frozen(d, True, lambda *a: ops.frozen_sgd(*a, momentum=0.9, nesterov=True), 1)


def soft_masked_sgd(d: Draws) -> list[Tensor]:
    weights = d.each()
    gammas = [g.sigmoid() for g in d.each()]
    ops.soft_masked_sgd(weights, d.each(), gammas, d.put(torch.tensor(0.1)))
    return weights


def raise_importance(d: Draws) -> list[Tensor]:
    gammas = d.zeros()
    ops.raise_importance(gammas, d.each())
    return gammas


def packed_bits(d: Draws) -> list[Tensor]:
    masks = [x > 0 for x in d.each()]
    numels = [m.numel() for m in masks]
    a, b, weights = ops.pack(masks), d.bits(), d.each(leaf=True)
    kept = ops.apply(a, weights)
    sum(k.square().sum() for k in kept).backward()
    found = [
        a,
        *ops.unpack(b, numels),
        *kept,
        *(w.grad for w in weights),
        ops.count(a, numels),
        ops.overlap(a, b, numels),
    ]
    return [*found, *(ops.combine(a, b, op) for op in ("and", "or", "xor", "andnot"))]


def linear(d: Draws) -> list[Tensor]:
    x, weight, logits, bias = d.leaf(6, 20), d.leaf(9, 20), d.leaf(9, 20), d.leaf(9)
    y = ops.linear(x, weight, logits, bias, *d.noise(), layer=3)
    y.square().sum().backward()
    return [y, x.grad, weight.grad, logits.grad, bias.grad]


def linear_packed(d: Draws) -> list[Tensor]:
    x, weight, bias = d.leaf(6, 20), d.leaf(9, 20), d.leaf(9)
    y = ops.linear_packed(x, weight, d.bits(shapes=((9, 20),)), bias)
    y.square().sum().backward()
    return [y, x.grad, weight.grad, bias.grad]


def conv2d(d: Draws) -> list[Tensor]:
    x, weight, logits, bias = d.leaf(2, 4, 5, 5), d.leaf(6, 4, 3, 3), d.leaf(6, 4, 3, 3), d.leaf(6)
    y = ops.conv2d(x, weight, logits, bias, *d.noise(), padding=(1, 1))
    y.square().sum().backward()
    return [y, x.grad, weight.grad, logits.grad, bias.grad]


def conv2d_packed(d: Draws) -> list[Tensor]:
    x, weight = d.leaf(2, 4, 5, 5), d.leaf(6, 4, 3, 3)
    y = ops.conv2d_packed(x, weight, d.bits(shapes=((6, 4, 3, 3),)), stride=(2, 2))
    y.square().sum().backward()
    return [y, x.grad, weight.grad]


def bank(d: Draws) -> list[Tensor]:
    offsets = d.put(torch.tensor([0, 2, 2, 5]))
    x, weight, bias = d.leaf(5, 12), d.leaf(7, 12), d.leaf(7)
    y = ops.bank_linear(x, weight, d.bits(3, ((7, 12),)), bias, offsets, 5)
    images, filters = d.randn(5, 4, 5, 5), d.randn(6, 4, 3, 3)
    z = ops.bank_conv2d(images, filters, d.bits(3, ((6, 4, 3, 3),)), None, offsets, 5)
    y.square().sum().backward()
    return [y, z, x.grad, weight.grad, bias.grad]


CASES: dict[str, Case] = {
    "sample": sample,
    "kernel_soft": kernel_soft,
    "mask_adam": mask_adam,
    "coded_adam": coded_adam,
    "pattern_mask": pattern_mask,
    "frozen_adamw": lambda d: frozen(d, False, ops.frozen_adamw, 2),
    "frozen_sgd": frozen_sgd,
    "soft_masked_sgd": soft_masked_sgd,
    "raise_importance": raise_importance,
    "bits": packed_bits,
    "linear": linear,
    "linear_packed": linear_packed,
    "conv2d": conv2d,
    "conv2d_packed": conv2d_packed,
    "bank": bank,
}


def expected(case: Case) -> list[Tensor]:
    with dwm_fast.use_backend("reference"):
        return case(Draws(lambda t: t.clone()))


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Equal but for sums rounded in another order: of at most 64 terms here, in two products behind each other."""
    found, exact = found.detach(), exact.detach()
    assert found.dtype == exact.dtype
    if not exact.is_floating_point():
        assert torch.equal(found, exact)
        return
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(found, exact, rtol=0, atol=2 * 64 * 2.0**-23 * largest)


@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_what_the_reference_gives(gpu, name):
    found = CASES[name](Draws(lambda t: t.to("cuda:1")))
    for a, b in zip(found, expected(CASES[name]), strict=True):
        assert a.device == torch.device("cuda:1")
        assert_near(a.cpu(), b)
    assert gpu.launches
    assert {x.device.index for x in gpu.launches} == {1}
    assert gpu.device == 0


@pytest.mark.parametrize("name", ["linear", "linear_packed", "conv2d", "conv2d_packed"])
@pytest.mark.parametrize("way", ops.WAYS)
def test_a_product_is_the_reference_in_either_way(gpu, name, way):
    with ops.use_way(way):
        found = CASES[name](Draws(lambda t: t.to("cuda:1")))
    for a, b in zip(found, expected(CASES[name]), strict=True):
        assert_near(a.cpu(), b)
    assert any("product" in x.kernel for x in gpu.launches) == (way == "one-pass")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_product_in_another_precision_is_the_reference(gpu, packed, dtype):
    """bfloat16 has rows enough for a tile in one pass; fp64 is beyond the kernels and staged."""

    def product(d: Draws) -> Tensor:
        x, weight = d.randn(6, 20).to(dtype), d.randn(9, 20).to(dtype)
        if packed:
            return ops.linear_packed(x, weight, d.bits(shapes=((9, 20),)))
        return ops.linear(x, weight, d.randn(9, 20), None, *d.noise())

    found = product(Draws(lambda t: t.to("cuda:1")))
    with dwm_fast.use_backend("reference"):
        wanted = product(Draws(lambda t: t.clone()))
    assert found.dtype == dtype
    largest = float(wanted.abs().max())
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=64 * torch.finfo(dtype).eps * largest)
    assert any("product" in x.kernel for x in gpu.launches) == (dtype == torch.bfloat16)


def test_a_depthwise_convolution_is_staged(gpu):
    def depthwise(d: Draws) -> Tensor:
        return ops.conv2d(d.randn(2, 4, 5, 5), d.randn(4, 1, 3, 3), d.randn(4, 1, 3, 3), None, *d.noise(), groups=4)

    found = depthwise(Draws(lambda t: t.to("cuda:1")))
    with dwm_fast.use_backend("reference"):
        assert_near(found.cpu(), depthwise(Draws(lambda t: t.clone())))
    assert not any("product" in x.kernel for x in gpu.launches)


def test_no_filters_are_laid_out_for_onednn_on_a_gpu(gpu, monkeypatch):
    x, weight = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last), torch.randn(6, 4, 3, 3)
    on_gpu = x.to("cuda:0"), weight.to("cuda:0")
    for name, answer in (("_has_vendor", True), ("_somebody_listens", False)):
        monkeypatch.setattr(filters, name, lambda answer=answer: answer)
    monkeypatch.setattr(filters, "_PLAIN", (Tensor, type(on_gpu[0])))
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *args: torch._C._ConvBackend.Mkldnn)
    how = ((1, 1), (0, 0), (1, 1), 1)
    assert filters.fit(x, weight, None, how)  # the device alone decides
    assert not any(filters.fit(*where, None, how) for where in (on_gpu, (x, on_gpu[1]), (on_gpu[0], weight)))
    x, weight = torch.randn(2, 16, 5, 5), torch.randn(16, 16, 3, 3)
    on_gpu = x.to("cuda:0"), weight.to("cuda:0")
    monkeypatch.setattr(filters, "_has_prepacked", lambda: True)
    assert filters.fit_blocked(x, weight, None, how)
    assert not any(filters.fit_blocked(*where, None, how) for where in (on_gpu, (x, on_gpu[1]), (on_gpu[0], weight)))


def test_a_product_from_kept_weights_has_a_way_on_a_gpu(gpu):
    x, values = torch.randn(3, 64, device="cuda:0").bfloat16(), torch.zeros(40, device="cuda:0").bfloat16()
    starts = torch.zeros(9, dtype=torch.int64, device="cuda:0")

    def way(x: Tensor) -> str:
        return choose_for("linear_kept", "cuda", x, weight_like(values, starts, x.shape[-1])).way

    assert way(x) == ONE_PASS
    for other in (x.float(), x[:, :40], x.expand(99, 3, 64)):
        assert way(other) == STAGED
