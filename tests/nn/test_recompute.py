"""Activation checkpointing sees the masks of the forward pass: outputs and gradients are those without it."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.nn import recompute
from dwm_fast.optim import MaskAdam

pytestmark = pytest.mark.usefixtures("reference")

BOTH = pytest.mark.parametrize("reentrant", [True, False])


class Lone(nn.Module):
    """Layers that draw for themselves; `shared` runs three times, dropout consumes torch's own noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        kind = dwm.GumbelSigmoid(init=0.0)
        self.first = dwm.MaskedLinear(6, 6, kind=kind, seed=1)
        self.shared = dwm.MaskedLinear(6, 6, kind=kind, seed=2)
        self.conv = dwm.MaskedConv2d(1, 1, 3, padding=1, kind=kind, seed=3)
        self.drop = nn.Dropout(0.3)

    def block(self, x):
        x = self.drop(self.shared(x)).tanh()
        return self.conv(self.shared(x)[None, None])[0, 0] + self.first(x)


def _x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()


def _results(module, run, x=None):
    """Output, gradients and noise states after a forward and a backward pass."""
    torch.manual_seed(9)
    x = _x() if x is None else x
    out = run(module, x)
    out.square().sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return [out.detach(), x.grad, *grads.values(), *(b for n, b in module.named_buffers() if "rng" in n)]


def _alike(module, plain, checkpointed):
    expected, found = _results(copy.deepcopy(module), plain), _results(copy.deepcopy(module), checkpointed)
    assert len(expected) == len(found)
    assert torch.equal(expected[0], found[0])
    for a, b in zip(expected, found, strict=True):
        # A reentrant checkpoint adds gradients up in another order: at most eight terms, a few eps each. One mask bit
        # drawn otherwise moves a gradient by 1e-2 and more.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@BOTH
def test_a_layer_alone_draws_the_same_mask_again(reentrant):
    layer = Lone().first
    _alike(layer, lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=reentrant))


@BOTH
def test_layers_that_run_several_times_in_several_segments_keep_each_mask(reentrant):
    def run(m, x, call):
        x = m.shared(x)  # in no checkpoint
        x = call(m.block, x)
        x = call(m.block, m.first(x))
        return call(m.shared, x) + call(m.first, x)

    _alike(
        Lone(),
        lambda m, x: run(m, x, lambda f, *a: f(*a)),
        lambda m, x: run(m, x, lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)),
    )


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_checkpoints_inside_checkpoints_keep_each_mask(outer, inner):
    def part(m, x, call):
        return call(m.block, m.shared(x)) + call(m.block, x)

    def run(m, x, outside, inside):
        y = outside(lambda z: part(m, z, inside), x)
        return outside(lambda z: part(m, z, inside), y)

    def call(reentrant):
        return lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)

    def plain(f, *a):
        return f(*a)

    _alike(Lone(), lambda m, x: run(m, x, plain, plain), lambda m, x: run(m, x, call(outer), call(inner)))


@BOTH
def test_a_second_backward_pass_and_a_later_step_keep_their_own_masks(reentrant):
    def twice(m, x, call):
        first, second = call(m.block, x), call(m.block, 2 * x)
        for _ in range(2):
            second.sum().backward(retain_graph=True)
            first.sum().backward(retain_graph=True)
        return first + second

    _alike(
        Lone(),
        lambda m, x: twice(m, x, lambda f, *a: f(*a)),
        lambda m, x: twice(m, x, lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)),
    )


@BOTH
def test_checkpoint_sequential_keeps_each_mask(reentrant):
    kind = dwm.GumbelSigmoid(init=0.0)
    layers = nn.Sequential(*(m for i in range(4) for m in (dwm.MaskedLinear(6, 6, kind=kind, seed=i), nn.Tanh())))
    _alike(layers, lambda m, x: m(x), lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=reentrant))


# --- masked models


class Net(nn.Module):
    def __init__(self, call=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.call = call

    def mix(self, x):
        y = self.block(x)
        return y + self.attention(y[None], y[None], y[None], need_weights=False)[0][0]

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = self.call(self.mix, x) if self.call else self.mix(x)
        return self.head(x)


def _masked(call=None, **options):
    return dwm.mask_model(Net(call), dwm.GumbelSigmoid(init=0.0), seed=1, **options).train()


def _inside(f, *args):
    return checkpoint(f, *args, use_reentrant=False)


@BOTH
@pytest.mark.parametrize("samples", [1, 2])
def test_a_whole_masked_model_draws_the_same_masks_again(reentrant, samples):
    _alike(
        _masked(mask_samples=samples),
        lambda m, x: m(x),
        lambda m, x: checkpoint(m, x, use_reentrant=reentrant),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
def test_checkpoints_inside_a_masked_model_keep_its_masks(samples, training):
    expected = _results(_masked(mask_samples=samples).train(training), lambda m, x: m(x))
    found = _results(_masked(_inside, mask_samples=samples).train(training), lambda m, x: m(x))
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _let_stand_alone(masked):
    for layer in masked.mask_layers().values():
        if isinstance(layer, (dwm.MaskedLinear, dwm.MaskedConv2d)):  # a mask on attention's parameter cannot
            layer.stand_alone(seed=99)


def test_a_layer_that_stands_alone_too_keeps_the_mask_of_its_model():
    expected = _results(_masked(), lambda m, x: m(x))
    masked = _masked(_inside)
    _let_stand_alone(masked)
    found = _results(masked, lambda m, x: m(x))
    assert all(torch.equal(a, b) for a, b in zip(expected[:-1], found[: len(expected) - 1], strict=True))


@pytest.mark.parametrize("around", [None, True, False])
def test_mask_adam_steps_the_same_under_checkpoints(around):
    found = []
    for checkpointed in (False, True):
        masked = _masked(_inside if checkpointed and around is None else None)
        optimizer = MaskAdam(masked, lr=0.05, coefficient=1.0)
        for i in range(3):
            optimizer.zero_grad()
            x = _x() + i
            out = checkpoint(masked, x, use_reentrant=around) if checkpointed and around is not None else masked(x)
            (out.square().mean() + 0.1 * masked.sparsity_penalty()).backward()
            optimizer.step()
        found.append([p.detach() for p in masked.mask_parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # the penalty's slope may be rounded in another place
        assert a.abs().max() > 0.05


def test_a_reentrant_checkpoint_inside_a_masked_model_is_refused_with_the_way_out():
    x = _x()
    for alone in (False, True):
        masked = _masked(lambda f, *args: checkpoint(f, *args, use_reentrant=True))
        if alone:
            _let_stand_alone(masked)
        with pytest.raises(InputError, match="use_reentrant=False"):
            masked(x).sum().backward()


def test_a_weight_that_is_read_without_its_layer_is_refused_where_it_is_not_known():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return checkpoint(lambda z: z @ self.layer.weight.mT, x, use_reentrant=True)

    masked = dwm.mask_model(Reader(), dwm.GumbelSigmoid(init=0.0)).train()
    with pytest.raises(InputError, match="use_reentrant=False"):
        masked(_x()).sum().backward()


def test_a_forward_in_a_backward_pass_of_another_sort_is_refused():
    for module in (Lone().first, _masked()):
        x = _x()
        y = 2 * x
        y.register_hook(lambda grad, module=module: module(grad.detach()).sum() * 0 + grad)
        with pytest.raises(InputError, match=r"during a backward pass.*use_reentrant=False"):
            y.sum().backward()
        module.eval()
        y = 2 * x
        y.register_hook(lambda grad, module=module: module(grad.detach()).sum() * 0 + grad)
        y.sum().backward()


@BOTH
def test_what_was_drawn_goes_when_the_graph_goes(reentrant):
    layer = Lone().first
    gc.collect()
    before = len(recompute._calls)
    out = checkpoint(layer, _x(), use_reentrant=reentrant)
    assert len(recompute._calls) == before + 1
    out.sum().backward()
    del out
    gc.collect()
    assert len(recompute._calls) == before
