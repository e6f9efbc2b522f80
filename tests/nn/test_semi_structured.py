"""SemiStructured: N:M masks learned in a network, exported exactly, stored as bits like any other mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import dwm_fast as dwm
from dwm_fast.errors import InputError

KIND = dwm.SemiStructured(tau=dwm.LinearSchedule(4.0, 0.5, 20), kappa=dwm.LinearSchedule(5.0, 50.0, 20), spread=0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def learned(kind=KIND, steps=20, seed=0):
    model = network()
    masked = dwm.mask_model(model, kind, seed=seed)
    optimizer = dwm.optim.MaskAdam(masked, lr=0.05)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 16, generator=generator)
    wanted = model(x).detach()
    losses = []
    for _ in range(steps):
        loss = (masked(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, masked, x, losses


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_what_was_learned_keeps_n_of_m_everywhere_in_every_export(n, m, tmp_path):
    kind = dwm.SemiStructured(n, m, spread=0.1)
    model, masked, x, _ = learned(kind)
    with torch.no_grad():
        assert dwm.mask_model(model, kind, seed=0).keep_masks()["0"].shape == (24, 16)
    keep = masked.keep_masks()
    assert all((mask.reshape(-1, m).sum(1) == n).all() for mask in keep.values())
    assert masked.fraction_kept() == n / m
    expected = masked.eval()(x)

    dwm.save_masked(masked, tmp_path / "masked.safetensors")
    again = dwm.load_masked(model, tmp_path / "masked.safetensors").eval()
    assert again.kind == kind
    assert torch.equal(again(x), expected)

    plain = dwm.merge(again)
    assert torch.equal(plain(x), expected)
    for name in ("0", "2"):
        zero = (plain.get_submodule(name).weight == 0).reshape(-1, m).sum(1)
        assert (zero == m - n).all()
    with dwm.use_way("staged"):
        assert torch.equal(dwm.pack(masked)(x), expected)

    bank = dwm.MaskBank(model)
    bank.add("pruned", masked)
    bank.save(tmp_path / "bank")
    loaded = dwm.MaskBank.load(tmp_path / "bank", model)
    loaded.activate("pruned")
    assert torch.equal(loaded(x), expected)


def merged_weight(device):
    masked = dwm.mask_model(nn.Linear(128, 64, dtype=torch.bfloat16, device=device), dwm.SemiStructured(spread=0.1))
    return dwm.merge(masked).weight.detach()


def test_the_merged_2_of_4_network_is_what_pytorchs_sparse_format_holds():
    weight = merged_weight("cpu")
    kept, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert kept.numel() * 2 == weight.numel()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(kept, places), weight)


@pytest.mark.gpu
def test_pytorchs_sparse_tensors_take_the_merged_network():
    weight = merged_weight("cuda")
    assert torch.equal(torch.sparse.to_sparse_semi_structured(weight).to_dense(), weight)


def test_learning_lowers_the_loss_and_resumes_exactly():
    _, masked, x, losses = learned()
    assert losses[-1] < 0.5 * losses[0]
    _, half, _, _ = learned(steps=10)
    assert half.rng_state.tolist()[1] == 10
    _, other, _, _ = learned(seed=1)
    assert not torch.equal(other.eval()(x), masked.eval()(x))


def test_tau_and_kappa_follow_the_step_on_the_device():
    state = torch.tensor([0, 10])
    assert KIND.current_tau(torch.tensor(1.0), state).tolist() == pytest.approx([2.25, 27.5])
    assert KIND.current_tau(torch.tensor(1.0), state, samples=2).tolist() == pytest.approx([3.125, 16.25])
    fixed = dwm.SemiStructured(tau=0.5, kappa=3.0)
    assert fixed.current_tau(torch.tensor(1.0), state).tolist() == [0.5, 3.0]


def test_a_start_from_a_mask_is_that_mask():
    kind = dwm.SemiStructured(spread=0.01)
    weight = torch.randn(12, 32)
    keep = torch.zeros(12, 8, 4, dtype=torch.bool).scatter(2, weight.abs().view(12, 8, 4).topk(2, 2).indices, True)
    # the chosen pattern leads the next ones by 3 spreads; ten make sure of it
    start = kind.lean(kind.initial(weight), keep.view(12, 32), 10.0)
    assert torch.equal(kind.keep(start), keep.view(12, 32))
    shift = kind.lean(torch.zeros(1, 1, 6), torch.tensor([[True, True, False, False]]), 3.0)
    # the mask's own pattern shares 2 weights with it, four share 1, one none; the mean is 1
    assert shift.flatten().tolist() == pytest.approx([0.03, 0, 0, 0, 0, -0.03])


def test_layers_without_whole_groups_are_named():
    with pytest.raises(InputError, match=r"layer '0': a weight of shape \(8, 18\) has no whole groups of 4"):
        dwm.mask_model(nn.Sequential(nn.Linear(18, 8)), dwm.SemiStructured())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dwm.SemiStructured(5, 4), "n=5 of m=4 is no known pattern"),
        (lambda: dwm.SemiStructured(2.0, 4), "n=2.0 of m=4"),
        (lambda: dwm.SemiStructured(tau=0.0), "tau=0.0; expected a number above 0"),
        (lambda: dwm.SemiStructured(kappa=dwm.LinearSchedule(1.0, 0.0, 5)), "kappa=LinearSchedule"),
        (lambda: dwm.SemiStructured(spread=-1.0), "spread=-1.0"),
        (lambda: dwm.SemiStructured(hard=1), "hard=1"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_masks_shape_is_the_patterns_of_every_group():
    layer = dwm.MaskedLinear(16, 3, kind=dwm.SemiStructured(4, 8), seed=0)
    assert layer.mask_logits.shape == (3, 2, 70)
    layer(torch.randn(2, 16)).sum().backward()
    assert layer.mask_logits.grad.abs().sum() > 0
