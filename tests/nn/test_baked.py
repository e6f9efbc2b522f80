"""Packed convolutions on a CPU unpack their weight once, notice every change, and stay under a bound."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.nn import baked

X = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _none_kept_before():
    gc.collect()


def packed(dtype: torch.dtype = torch.float32, **options) -> dwm.PackedConv2d:
    torch.manual_seed(0)
    layer = dwm.MaskedConv2d(4, 6, 3, kind=dwm.Threshold(), padding=1, **options).eval().to(dtype)
    with torch.no_grad():
        layer.mask_logits.normal_()
    return dwm.PackedConv2d.from_masked(layer)


def reference(layer: dwm.PackedConv2d, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype), padding=1)


@pytest.fixture
def unpacked(monkeypatch):
    """Counts how often a packed weight is put under its bits."""
    calls = []
    apply = ops.apply

    def counted(bits, weights):
        calls.append(1)
        return apply(bits, weights)

    monkeypatch.setattr(ops, "apply", counted)
    return calls


def test_the_weight_is_unpacked_at_the_first_call_alone_and_the_output_is_the_same(unpacked):
    layer = packed()
    expected = reference(layer, X)
    unpacked.clear()
    for _ in range(3):
        assert torch.equal(layer(X), expected)
    with torch.inference_mode():
        assert torch.equal(layer(X), expected)
    assert len(unpacked) == 1


def _in_place(layer):
    layer.backbone_weight.mul_(2)


def _through_data(layer):
    layer.backbone_weight.data.mul_(2)


def _other_weight(layer):
    layer.backbone_weight = nn.Parameter(torch.randn(6, 4, 3, 3), requires_grad=False)


def _other_bits(layer):
    layer.bits.copy_(ops.pack([torch.ones(6, 4, 3, 3)]))


def _loaded(layer):
    state = {**layer.state_dict(), "bits": ops.pack([torch.zeros(6, 4, 3, 3)])}
    layer.load_state_dict(state)


def _channels_last(layer):
    layer.to(memory_format=torch.channels_last)
    layer.backbone_weight.mul_(3)


@pytest.mark.parametrize("change", [_in_place, _through_data, _other_weight, _other_bits, _loaded, _channels_last])
def test_every_change_is_noticed(change):
    layer = packed()
    before = layer(X)
    change(layer)
    y = layer(X)
    assert torch.equal(y, reference(layer, X))
    assert not torch.equal(y, before)


def test_dtypes_autocast_moves_and_copies():
    layer = packed()
    layer(X)
    twin = copy.deepcopy(layer)
    assert twin._baked is None
    assert torch.equal(twin(X), layer(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(X), reference(layer, X.bfloat16()))
    layer.to(torch.bfloat16)
    assert torch.equal(layer(X.bfloat16()), reference(layer, X.bfloat16()))


def test_gradients_reach_the_input_and_a_weight_that_asks_for_one():
    layer = packed()
    with torch.inference_mode():
        layer(X)
    x, twin = X.clone().requires_grad_(True), X.clone().requires_grad_(True)
    layer(x).square().sum().backward()
    reference(layer, twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    layer.backbone_weight.requires_grad_(True)
    layer(X).sum().backward()
    assert layer.backbone_weight.grad is not None


def test_bytes_stay_under_the_budget_and_come_back(monkeypatch, unpacked):
    before = baked.kept_bytes()
    layer, other = packed(), packed()
    monkeypatch.setattr(baked, "BUDGET", before + 4 * 6 * 4 * 9)
    layer(X)
    assert baked.kept_bytes() == before + 4 * 6 * 4 * 9
    assert torch.equal(other(X), layer(X))
    assert other._baked is None
    layer.backbone_weight.mul_(2)
    layer(X)  # the new one takes the place of the old
    assert baked.kept_bytes() == before + 4 * 6 * 4 * 9
    del layer
    gc.collect()
    assert baked.kept_bytes() == before


def test_a_forced_backend_or_way_and_a_compiler_see_the_operation(unpacked):
    layer = packed()
    with dwm.use_backend("reference"):
        assert torch.equal(layer(X), reference(layer, X))
    assert layer._baked is None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), reference(layer, X))
    assert layer._baked is None


def test_explain_tells_of_the_bytes():
    told = dwm.explain(packed(), (2, 4, 9, 8))
    assert told.forward.way == "staged"
    assert f"kept from the first call on, {4 * 6 * 4 * 9} bytes of a budget of {baked.BUDGET:,}" in told.forward.why
    assert "kept from the first" not in told.input_gradient.why


def test_a_weight_that_could_not_be_made_takes_no_room(monkeypatch):
    def fails(*args):
        raise MemoryError

    layer = packed().requires_grad_(False)
    before = baked.kept_bytes()
    monkeypatch.setattr(baked, "Baked", fails)
    with pytest.raises(MemoryError):
        layer(X)
    assert baked.kept_bytes() == before


def test_a_finalizer_that_runs_where_room_is_counted_does_not_wait_for_itself():
    before = baked.kept_bytes()
    with baked._lock:
        baked._give_back(0)
    assert baked.kept_bytes() == before
