"""A call that finds tables gives what it would give without any, whatever was done to its tensors in between."""

import gc
import weakref

import pytest
import torch
from torch import nn

import dwm_fast
from dwm_fast import ops
from dwm_fast.kernels import _pointers, _tables
from dwm_fast.optim import MaskAdam


@pytest.fixture(autouse=True)
def triton(device):
    with dwm_fast.use_backend("triton"):
        yield


def network(device):
    generator = torch.Generator().manual_seed(3)
    shapes = [(8, 8, 3, 3), (6, 10), (5,)]
    logits, weights = ([torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(2))
    return [x.requires_grad_() for x in logits], weights


def draw(logits, weights):
    """Masked weights and the logits' gradients, by two launches."""
    device = logits[0].device
    state, tau = torch.tensor([7, 2], device=device), torch.tensor(0.5, device=device)
    masked, _, penalty = ops.sample(logits, weights, state, tau)
    wanted = [x for x in logits if x.requires_grad]
    loss = sum((m.float() ** 2).sum() for m in masked) + penalty
    return [m.detach().clone() for m in masked], list(torch.autograd.grad(loss, wanted)) if wanted else []


def resized(logits, weights):
    weights[1].resize_(4, 5)
    logits[1].data = logits[1].data[:4, :5].clone()


def set_to_another_storage(logits, weights):
    source = torch.randn(100, device=weights[1].device)
    weights[1].set_(source.untyped_storage(), 0, (6, 10), (1, 6))


def set_one_element_on(logits, weights):
    source = torch.randn(100, device=weights[1].device)
    weights[1].set_(source.untyped_storage(), 1, (6, 10), (10, 1))


def data_of_another_layout(logits, weights):
    logits[0].data = logits[0].data.to(memory_format=torch.channels_last)
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)


def data_of_the_same_layout(logits, weights):
    weights[0].data = -2 * weights[0].data


def a_logit_that_no_longer_trains(logits, weights):
    logits[1].requires_grad_(False)


def other_dtypes(logits, weights):
    weights[:] = [w.bfloat16() for w in weights]


def storage_that_another_tensor_had(logits, weights):
    """The allocator hands out the address of a tensor that is gone, for values of its own."""
    shape, device = weights[1].shape, weights[1].device
    weights[1] = None
    gc.collect()
    weights[1] = torch.full(shape, 3.0, device=device)


CHANGES = (
    resized,
    set_to_another_storage,
    set_one_element_on,
    data_of_another_layout,
    data_of_the_same_layout,
    a_logit_that_no_longer_trains,
    other_dtypes,
    storage_that_another_tensor_had,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_after_a_change_of_its_tensors_is_what_it_is_without_known_tables(device, change):
    logits, weights = network(device)
    draw(logits, weights)
    draw(logits, weights)
    change(logits, weights)
    found = draw(logits, weights)
    _tables._plans.clear()
    _pointers._entries.clear()
    expected = draw(logits, weights)
    for got, want in zip(found, expected, strict=True):
        assert len(got) == len(want) > 0
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with dwm_fast.use_backend("reference"):
        reference = draw(logits, weights)
    for got, want in zip(found[0], reference[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)  # a hard mask keeps a weight or drops it


def test_the_same_tensors_take_the_table_that_is_there_and_others_a_new_one(device):
    logits, weights = network(device)
    state, tau = torch.tensor([7, 2], device=device), torch.tensor(0.5, device=device)
    _pointers._entries.clear()
    for _ in range(2):
        ops.sample(logits, weights, state, tau)
        assert len(_pointers._entries) == 1
    weights[0] = weights[0].clone()
    ops.sample(logits, weights, state, tau)
    assert len(_pointers._entries) == 2


def test_a_tensor_off_the_16_byte_grid_is_walked_another_way(device):
    """Wide loads of a plan that was made for aligned tensors would fault on a GPU."""
    logits, weights = network(device)
    draw(logits, weights)
    _tables._plans.clear()
    draw(logits, weights)
    aligned = {*_tables._plans}
    set_one_element_on(logits, weights)
    assert weights[1].data_ptr() % 16
    draw(logits, weights)
    later = {*_tables._plans} - aligned
    assert len(later) == len(aligned)

    def kinds(keys):
        """How the second tensor is walked."""
        entries = [entry for key in keys for entry in _tables._plans[key].blocks[:, 0].tolist()]
        return {entry & 3 for entry in entries if entry >> 2 == 1}

    assert _tables.STRIDED.value not in kinds(aligned)
    assert kinds(later) == {_tables.STRIDED.value}


def test_tables_keep_no_tensor_alive(device):
    logits, weights = network(device)
    draw(logits, weights)
    refs = [weakref.ref(x) for x in (*logits, *weights)]
    del logits, weights
    gc.collect()
    assert all(ref() is None for ref in refs)


def masked_model(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).to(device)
    return dwm_fast.mask_model(net, dwm_fast.GumbelSigmoid(), seed=1).train()


def steps(masked, optimizer, count, between=None):
    x = torch.linspace(-1, 1, 24, device=masked.rng_state.device).view(3, 8)
    for i in range(count):
        optimizer.zero_grad()
        loss = masked(x).square().mean()
        if between is not None and i == count - 1:
            between(masked)
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in masked.mask_parameters()]


def swap_logits(masked):
    for p in masked.mask_parameters():
        p.data = p.data.clone().mul_(1)


@pytest.mark.parametrize("between", [None, swap_logits])
def test_a_folded_step_is_the_step_on_gradients(device, between):
    found = []
    for fold in (True, False):
        masked = masked_model(device)
        found.append(steps(masked, MaskAdam(masked, lr=0.1, fold=fold), 3, between))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["mask_logits", "weight"])
def test_logits_or_weights_changed_in_place_between_a_draw_and_backward_are_an_error(device, which):
    masked = masked_model(device)

    def change(model):
        with torch.no_grad():
            next(iter(model.mask_layers().values()))._parameters[which].add_(0.5)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(masked, MaskAdam(masked, lr=0.1), 2, change)


def test_a_second_backward_through_a_draw_is_torchs_error(device):
    masked = masked_model(device)
    MaskAdam(masked, lr=0.1)
    loss = masked(torch.ones(2, 8, device=device)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_draw_without_gradients_is_the_one_with_them(device):
    found = []
    for grad in (True, False):
        masked = masked_model(device)
        MaskAdam(masked, lr=0.1)
        with torch.set_grad_enabled(grad):
            found.append(masked(torch.ones(2, 8, device=device)))
    assert found[0].requires_grad
    assert not found[1].requires_grad
    assert torch.equal(found[0].detach(), found[1])


def test_weights_made_in_inference_mode_are_drawn_where_no_gradient_is_wanted(device):
    masked = masked_model(device)
    MaskAdam(masked, lr=0.1)
    with torch.inference_mode():
        for layer in masked.mask_layers().values():
            layer._parameters["weight"] = nn.Parameter(layer.frozen_weight.clone(), requires_grad=False)
        assert masked(torch.ones(2, 8, device=device)).isfinite().all()
    with torch.no_grad():
        assert masked(torch.ones(2, 8, device=device)).isfinite().all()
