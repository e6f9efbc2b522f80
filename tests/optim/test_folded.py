"""Whoever looks at the logits' gradient under MaskAdam sees what autograd gives; who looks too late is told so."""

import copy
import gc
import io
import os
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.optim import FrozenAdamW, MaskAdam

COEFFICIENT = 0.5


@pytest.fixture(autouse=True)
def _reference():
    with dwm.use_backend("reference"):
        yield


def _masked(kind=None, **options):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    masked = dwm.mask_model(plain, kind or dwm.GumbelSigmoid(init=0.5), seed=3, **options).train()
    with torch.no_grad():
        for p in masked.mask_parameters():
            p.add_(torch.randn(p.shape))
    return masked


def _x(seed=0):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def _loss(masked, x):
    return masked(x).square().mean() + 0.1 * masked.sparsity_penalty()


def _logits(masked):
    return [p.detach().clone() for p in masked.mask_parameters()]


def _twins(train):
    """Logits after `train(masked, optimizer)`, folded and not."""
    found = []
    for fold in (True, False):
        masked = _masked()
        train(masked, MaskAdam(masked, lr=0.05, fold=fold))
        found.append(_logits(masked))
    return found


def _moved_alike(train):
    ours, theirs = _twins(train)
    start = _logits(_masked())
    for a, b in zip(ours, theirs, strict=True):
        # A step on some of the layers rounds the penalty's slope once more: a few eps of steps of 0.05.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(ours, start, strict=True))


def _steps(between=lambda masked, optimizer: None, before=lambda masked, optimizer: None, count=3):
    def train(masked, optimizer):
        for i in range(count):
            optimizer.zero_grad()
            before(masked, optimizer)
            _loss(masked, _x(i)).backward()
            between(masked, optimizer)
            optimizer.step()

    return train


def _clip_norm(masked, optimizer):
    norm = clip_grad_norm_(masked.mask_parameters(), 1e-4)
    assert 1e-4 < norm < 10


def _scale_by_data(masked, optimizer):
    for p in masked.mask_parameters():
        p.grad.data.mul_(0.5)


def _replace(masked, optimizer):
    for p in masked.mask_parameters():
        p.grad = p.grad.sign()


def _forget_one(masked, optimizer):
    next(masked.mask_parameters()).grad = None


def _zero_by_the_module(masked, optimizer):
    masked.zero_grad()
    _loss(masked, _x(9)).backward()


def _zero_in_place(masked, optimizer):
    optimizer.zero_grad(set_to_none=False)
    _loss(masked, _x(9)).backward()


def _zero_in_place_by_the_module(masked, optimizer):
    masked.zero_grad(set_to_none=False)
    _loss(masked, _x(9)).backward()


def _another_backward(masked, optimizer):
    _loss(masked, _x(9)).backward()


def _look_then_another_backward(masked, optimizer):
    assert all(p.grad.abs().sum() > 0 for p in masked.mask_parameters())
    _loss(masked, _x(9)).backward()


def _another_way_in(masked, optimizer):
    sum(p.square().sum() for p in masked.mask_parameters()).backward()


def _another_optimizer(masked, optimizer):
    torch.optim.Adam(masked.mask_parameters(), lr=0.1).step()


def _own_optimizer(masked, optimizer):
    FrozenAdamW(masked.mask_parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "between",
    [
        _clip_norm,
        lambda masked, _: clip_grad_value_(masked.mask_parameters(), 1e-4),
        _scale_by_data,
        _replace,
        _forget_one,
        _zero_by_the_module,
        _zero_in_place,
        _zero_in_place_by_the_module,
        _another_backward,
        _look_then_another_backward,
        _another_way_in,
        lambda masked, _: next(masked.mask_parameters()).requires_grad_(False),
    ],
)
def test_what_acts_on_the_gradient_before_the_step_acts(between):
    _moved_alike(_steps(between))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", [dwm.GumbelSigmoid(init=0.5), dwm.Edit(), dwm.Threshold(ternary=True)])
def test_the_gradient_is_that_of_autograd_bit_for_bit(samples, kind):
    found = []
    for fold in (True, False):
        masked = _masked(kind, mask_samples=samples)
        MaskAdam(masked, fold=fold)
        _loss(masked, _x()).backward()
        found.append([p.grad.clone() for p in masked.mask_parameters()])
    for a, b in zip(*found, strict=True):
        assert type(a) is torch.Tensor
        assert torch.equal(a, b)
        assert b.abs().sum() > 0


def test_a_frozen_layer_stays_and_the_others_learn():
    def train(masked, optimizer):
        next(masked.mask_parameters()).requires_grad_(False)
        _steps()(masked, optimizer)

    _moved_alike(train)
    start, (ours, _) = _logits(_masked()), _twins(train)
    assert torch.equal(ours[0], start[0])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, FrozenAdamW])
def test_another_optimiser_steps_on_the_gradient(optimizer):
    def train(masked, _):
        other = optimizer(masked.mask_parameters(), lr=0.05)
        for i in range(3):
            other.zero_grad()
            _loss(masked, _x(i)).backward()
            other.step()

    _moved_alike(train)


def test_a_grad_scaler_unscales_checks_and_skips():
    scales = []

    def train(masked, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for i in range(4):
            optimizer.zero_grad()
            x = _x(i) * (float("inf") if i == 1 else 1.0)
            scaler.scale(_loss(masked, x)).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(masked.mask_parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())

    _moved_alike(train)
    assert scales == [2.0**9] * 2


def _sign(p):
    p.grad.sign_()


def test_hooks_on_the_logits_see_and_change_their_gradient():
    seen = []

    def train(masked, optimizer):
        first, second = masked.mask_parameters()
        first.register_hook(lambda grad: 0.5 * grad)
        second.register_post_accumulate_grad_hook(_sign)
        torch.autograd.graph.register_multi_grad_hook(
            (first, second), lambda grads: seen.append(sum(g.abs().sum() for g in grads))
        )
        _steps()(masked, optimizer)

    _moved_alike(train)
    assert len(seen) == 6
    assert min(seen) > 0
    assert seen[:3] == seen[3:]


def test_saved_tensor_hooks_leave_the_steps_as_they_are():
    def train(masked, optimizer):
        for i in range(3):
            optimizer.zero_grad()
            with torch.autograd.graph.save_on_cpu():
                loss = _loss(masked, _x(i))
            loss.backward()
            optimizer.step()

    _moved_alike(train)


def test_saved_tensor_hooks_get_what_a_backward_of_the_draw_reads_and_it_reads_what_they_give_back():
    def gradients(*hooks):
        masked = _masked()
        MaskAdam(masked)
        weights = [layer.frozen_weight.data_ptr() for layer in masked.mask_layers().values()]
        seen = []

        def pack(tensor):
            seen.append(tensor.data_ptr())
            return 2 * tensor.detach() if seen[-1] in weights else tensor.detach().clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor) if hooks else nullcontext():
            loss = masked(_x()).square().mean()
        loss.backward()
        logits = [*masked.mask_parameters()]
        assert not hooks or {*weights, *(x.data_ptr() for x in logits)} <= {*seen}
        return [x.grad.clone() for x in logits]

    for doubled, plain in zip(gradients("hooks"), gradients(), strict=True):
        assert torch.equal(doubled, 2 * plain)  # a product with a power of two is exact


def test_gradients_can_be_asked_for_by_name():
    found = []
    for fold in (True, False):
        masked = _masked()
        MaskAdam(masked, fold=fold)
        first, second = masked.mask_parameters()
        asked = torch.autograd.grad(_loss(masked, _x()), [first, second])
        assert first.grad is None
        _loss(masked, _x()).backward(inputs=[second])
        assert first.grad is None
        found.append([*asked, second.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_that_train_along_may_step_first():
    def train(masked, optimizer):
        weights = [layer.frozen_weight.requires_grad_() for layer in masked.mask_layers().values()]
        other = torch.optim.SGD(weights, lr=0.5)
        for i in range(3):
            optimizer.zero_grad()
            other.zero_grad()
            _loss(masked, _x(i)).backward()
            other.step()
            optimizer.step()

    _moved_alike(train)


def test_the_coefficient_is_felt_whether_somebody_looks_or_not():
    found = []
    for between in (lambda masked, _: None, lambda masked, _: [p.grad.sum() for p in masked.mask_parameters()]):
        masked = _masked()
        _steps(between)(masked, MaskAdam(masked, lr=0.05, coefficient=20.0))
        found.append(_logits(masked))
    plain = _masked()
    _steps()(plain, MaskAdam(plain, lr=0.05))
    for a, b, c in zip(*found, _logits(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # six steps of 0.05 * (1 +- some eps)
        assert (a - c).abs().max() > 0.01


def test_looking_costs_one_operation_for_the_whole_network(monkeypatch):
    calls = []
    whole = torch.ops.dwm_fast.sample_backward
    monkeypatch.setattr(torch.ops.dwm_fast, "sample_backward", lambda *args: calls.append(1) or whole(*args))
    masked = _masked()
    optimizer = MaskAdam(masked)
    for look in (False, True):
        optimizer.zero_grad()
        _loss(masked, _x()).backward()
        if look:
            clip_grad_norm_(masked.mask_parameters(), 1.0)
        optimizer.step()
        assert len(calls) == look


READS = {
    "numpy": lambda g: torch.from_numpy(g.numpy()),
    "array": lambda g: torch.from_numpy(np.asarray(g)),
    "tolist": lambda g: torch.tensor(g.tolist()),
    "detach": lambda g: g.detach() + 0,
    "data": lambda g: g.data + 0,
    "deepcopy": copy.deepcopy,
    "to": lambda g: g.to(torch.float64).to(torch.float32),
    "view": lambda g: g.view(-1).view(g.shape),
    "index": lambda g: torch.stack([g[i] for i in range(len(g))]),
    "dlpack": torch.from_dlpack,
    "pickle": lambda g: _through_a_file(g),
    "clone": torch.clone,
}


def _through_a_file(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("read", READS)
def test_every_way_to_read_a_tensor_gives_the_values(read):
    masked, plain = _masked(), _masked()
    MaskAdam(masked)
    for net in (masked, plain):
        _loss(net, _x()).backward()
    ours, theirs = next(masked.mask_parameters()), next(plain.mask_parameters())
    found = READS[read](ours.grad)
    assert torch.equal(found, theirs.grad)
    assert repr(ours.grad) == repr(theirs.grad)
    assert f"{ours.grad.sum():.6f}" == f"{theirs.grad.sum():.6f}"
    assert ours.grad.data_ptr() != 0


def test_shape_and_place_are_known_without_forming_the_values():
    masked = _masked()
    MaskAdam(masked)
    _loss(masked, _x()).backward()
    p = next(masked.mask_parameters())
    assert (p.grad.shape, p.grad.stride(), p.grad.dtype, p.grad.device) == (p.shape, p.stride(), p.dtype, p.device)
    assert not p.grad.requires_grad
    assert not p.grad.is_sparse
    assert p.grad.share.value is None


def test_a_gradient_kept_from_an_earlier_step_keeps_its_values():
    masked = _masked()
    optimizer = MaskAdam(masked)
    _loss(masked, _x()).backward()
    kept = next(masked.mask_parameters()).grad
    before = kept.clone()
    optimizer.step()
    optimizer.zero_grad()
    _loss(masked, _x(1)).backward()
    assert torch.equal(kept, before)
    assert not torch.equal(next(masked.mask_parameters()).grad, before)


def _trained():
    masked = _masked()
    optimizer = MaskAdam(masked)
    _loss(masked, _x()).backward()
    optimizer.step()
    return masked, optimizer


@pytest.mark.parametrize(
    "late",
    [
        lambda masked, _: next(masked.mask_parameters()).grad.norm(),
        lambda masked, _: clip_grad_norm_(masked.mask_parameters(), 1.0),
        lambda masked, optimizer: optimizer.step(),
        lambda masked, _: _loss(masked, _x()).backward(),
        lambda masked, _: repr(next(masked.mask_parameters()).grad),
    ],
)
def test_what_comes_after_a_folded_step_is_told_the_way_out(late):
    masked, optimizer = _trained()
    after = _logits(masked)
    with pytest.raises(InputError, match=r"between backward\(\) and step\(\).*zero_grad\(\).*fold=False"):
        late(masked, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(_logits(masked), after, strict=True))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in masked.mask_parameters())
    _loss(masked, _x()).backward()
    optimizer.step()


@pytest.mark.parametrize("changed", ["logits", "weight", "tau"])
@pytest.mark.parametrize("use", ["step", "look"])
def test_a_gradient_whose_sources_have_changed_is_refused(changed, use):
    masked = _masked()
    optimizer = MaskAdam(masked)
    _loss(masked, _x()).backward()
    layer = next(iter(masked.mask_layers().values()))
    with torch.no_grad():
        {"logits": layer.mask_logits, "weight": layer.frozen_weight, "tau": masked.tau}[changed].mul_(0.5)
    after = _logits(masked)
    with pytest.raises(InputError, match=r"changed in place between.*fold=False"):
        optimizer.step() if use == "step" else layer.mask_logits.grad.sum()
    assert all(torch.equal(a, b) for a, b in zip(_logits(masked), after, strict=True))


def test_compiled_code_learns_the_same():
    torch._dynamo.reset()
    ours, theirs = [], []
    for found, fold in ((ours, True), (theirs, False)):
        masked = _masked()
        compiled = torch.compile(masked, backend="aot_eager")
        optimizer = MaskAdam(masked, lr=0.05, fold=fold)
        for i in range(2):
            optimizer.zero_grad()
            compiled(_x(i)).square().mean().backward()
            optimizer.step()
        found += _logits(masked)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], _logits(_masked())[0])


def test_a_network_that_is_dropped_with_its_gradient_is_freed():
    masked = _masked()
    MaskAdam(masked)
    _loss(masked, _x()).backward()
    alive = [weakref.ref(p) for p in masked.mask_parameters()]
    gradient = next(masked.mask_parameters()).grad
    del masked
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    with pytest.raises(InputError, match="the network is gone"):
        gradient.sum()


# --- two processes


OPTIONS = [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}]


def _train_in_parallel(rank, fold, options):
    masked = _masked()
    optimizer = MaskAdam(masked, lr=0.05, coefficient=1.0 if fold else 0.0, fold=fold)
    parallel = DistributedDataParallel(masked, **options)
    for i in range(4):
        optimizer.zero_grad()
        loss = parallel(_x(2 * i + rank)).square().mean()
        if not fold:
            loss = loss + masked.sparsity_penalty()
        loss.backward()
        optimizer.step()
    return _logits(masked)


def _rank(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        with dwm.use_backend("reference"):
            found = [[_train_in_parallel(rank, fold, options) for fold in (True, False)] for options in OPTIONS]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_under_ddp_stay_one_and_step_on_the_mean_gradient(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    start = _logits(_masked())
    for (mine, _), (theirs, plain) in zip(*ranks, strict=True):
        for a, b, c, d in zip(mine, theirs, plain, start, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=0, atol=1e-5)
            assert (a - d).abs().max() > 0.1
