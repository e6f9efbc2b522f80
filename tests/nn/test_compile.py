"""torch.compile(fullgraph=True): the same numbers, new noise at every call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dwm_fast as dwm

pytestmark = pytest.mark.usefixtures("reference")

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _masked(kind: dwm.MaskKind | None = None, **settings) -> dwm.MaskedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    return dwm.mask_model(net, kind or dwm.GumbelSigmoid(init=0.3), seed=2, **settings).train()


def _compare(masked: dwm.MaskedModel, backend: str = "aot_eager", calls: int = 2, exact: bool = True) -> None:
    """Loss, gradients and noise of a compiled training step against the same steps run eagerly."""
    twin = copy.deepcopy(masked)

    def step(model, x):
        return model(x).square().mean() + 3 * model.sparsity_penalty()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(calls):
        got, expected = compiled(masked, X), step(twin, X)
        got.backward()
        expected.backward()
        torch.testing.assert_close(got, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    for a, b in zip(masked.mask_parameters(), twin.mask_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
    assert masked.rng_state.tolist() == twin.rng_state.tolist() == [2, calls * masked.mask_samples]


@pytest.mark.parametrize(
    "kind",
    [
        dwm.GumbelSigmoid(tau=dwm.TauSchedule(2.0, 0.5, 4), init=0.3),
        dwm.GumbelSigmoid(init=0.3, hard=False),
        dwm.Threshold(),
        dwm.Edit(),
        dwm.KernelSoft(),
        dwm.KernelSoft(noisy=True),
    ],
    ids=repr,
)
def test_a_compiled_training_step_equals_the_eager_one(kind):
    _compare(_masked(kind))


def test_a_compiled_step_with_several_mask_samples_and_batch_norm_equals_the_eager_one():
    _compare(_masked(mask_samples=3, batch_norm="train"))


def test_inductor_gives_the_eager_numbers():
    _compare(_masked(), backend="inductor", exact=False)


def test_compiling_the_model_alone_draws_new_noise_at_every_call():
    masked = _masked()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    a, b = compiled(X), compiled(X)
    assert not torch.equal(a, b)
    assert masked.rng_state.tolist() == [2, 2]
    (a.sum() + b.sum() + masked.sparsity_penalty()).backward()
    assert all(p.grad.any() for p in masked.mask_parameters())


def test_the_penalty_outside_a_compiled_model_is_never_stale():
    masked = _masked()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    opt = torch.optim.SGD(masked.mask_parameters(), lr=50.0)
    for _ in range(2):
        compiled(X).sum().backward()
        opt.step()
        opt.zero_grad()
        penalty = masked.sparsity_penalty()
        flat = torch.cat([p.detach().flatten() for p in masked.mask_parameters()])
        torch.testing.assert_close(penalty.detach(), torch.sigmoid(flat).mean())
        penalty.backward()
        opt.step()


def test_evaluation_compiles_and_train_and_eval_may_alternate():
    masked = _masked()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(X)
        masked.eval()
        assert torch.equal(compiled(X), masked(X))
        masked.train()
        assert not torch.equal(compiled(X), compiled(X))


def test_autocast_and_weights_read_without_a_call_compile_too():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(nn.functional.linear(x, self.a.weight))

    torch.manual_seed(0)
    masked = dwm.mask_model(Reader(), dwm.GumbelSigmoid(init=0.0), seed=1).train()
    twin = copy.deepcopy(masked)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), twin(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    got.float().sum().backward()
    assert all(p.grad.any() for p in masked.mask_parameters())


@pytest.mark.parametrize("make", [lambda: dwm.MaskedLinear(6, 5, seed=1), lambda: dwm.MaskedConv2d(3, 5, 3, seed=1)])
def test_single_layers_compile(make):
    torch.manual_seed(0)
    layer = make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(X), twin(X))
    compiled(X).sum().backward()
    twin(X).sum().backward()
    assert torch.equal(layer.mask_logits.grad, twin.mask_logits.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_packed_network_compiles_in_one_graph_for_batches_of_any_size(backend):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    packed = dwm.pack(dwm.mask_model(net, dwm.Threshold()))
    with torch.no_grad():
        packed[0].bits.random_(0, 256)
        packed[3].bits.random_(0, 256)
        compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=backend)
        for batch in (2, 20):
            x = torch.randn(batch, 3, 6, 6)
            torch.testing.assert_close(compiled(x), packed(x))
