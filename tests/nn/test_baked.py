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
from dwm_fast.ops.filters import Blocked

X = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
LAST = X.contiguous(memory_format=torch.channels_last)


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


@pytest.mark.parametrize("x", [X, LAST], ids=["contiguous", "channels_last"])
def test_the_weight_is_unpacked_at_the_first_call_alone_and_the_output_is_the_same(unpacked, x):
    layer = packed().requires_grad_(False)
    expected = reference(layer, x)
    unpacked.clear()
    for _ in range(3):
        assert torch.equal(layer(x), expected)
        assert layer(x).stride() == expected.stride()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert len(unpacked) == 1


def _in_place(layer):
    layer.backbone_weight.mul_(2)


def _through_data(layer):
    layer.backbone_weight.data.mul_(2)


def _bits_through_data(layer):
    layer.bits.data.zero_()


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


@pytest.mark.parametrize("x", [X, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "change", [_in_place, _through_data, _bits_through_data, _other_weight, _other_bits, _loaded, _channels_last]
)
def test_every_change_is_noticed(change, x):
    layer = packed().requires_grad_(False)
    before = layer(x)
    change(layer)
    y = layer(x)
    assert torch.equal(y, reference(layer, x))
    assert not torch.equal(y, before)


def test_blocks_of_channels_are_laid_out_once_and_padding_and_stride_are_those_of_the_call(unpacked):
    torch.manual_seed(0)
    layer = dwm.MaskedConv2d(32, 48, 3, kind=dwm.Threshold(), padding=1, bias=False).eval()
    with torch.no_grad():
        layer.mask_logits.normal_()
    layer = dwm.PackedConv2d.from_masked(layer)
    weight, x = layer.weight, torch.randn(3, 32, 6, 5)
    unpacked.clear()
    for rows in (3, 3, 2, 7):
        x = torch.randn(rows, 32, 6, 5)
        assert torch.equal(layer(x), nn.functional.conv2d(x, weight, padding=1))
    assert list(layer._kept._baked) == [Blocked]
    assert len(unpacked) == 1
    layer.stride = (2, 2)
    assert torch.equal(layer(x), nn.functional.conv2d(x, weight, padding=1, stride=2))
    assert len(unpacked) == 2
    alone = torch.randn(1, 32, 6, 5)  # torch itself gives that to another library
    assert torch.equal(layer(alone), nn.functional.conv2d(alone, weight, padding=1, stride=2))
    before = baked.kept_bytes()
    del layer
    gc.collect()
    assert before - baked.kept_bytes() == 2 * 4 * weight.numel()


def test_dtypes_autocast_moves_and_copies():
    layer = packed()
    layer(X)
    twin = copy.deepcopy(layer)
    assert twin._kept is None
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


@pytest.mark.parametrize("x", [X, LAST], ids=["contiguous", "channels_last"])
def test_bytes_stay_under_the_budget_and_come_back(monkeypatch, unpacked, x):
    before = baked.kept_bytes()
    layer, other = packed().requires_grad_(False), packed().requires_grad_(False)
    layer(x)
    needed = baked.kept_bytes() - before
    assert needed >= 4 * 6 * 4 * 9
    monkeypatch.setattr(baked, "BUDGET", before + needed)
    assert torch.equal(other(x), layer(x))
    assert baked.kept_bytes() == before + needed
    unpacked.clear()
    layer.backbone_weight.mul_(2)
    layer(x)  # the new one takes the place of the old
    layer(x)
    assert len(unpacked) == 1
    assert baked.kept_bytes() == before + needed
    del layer
    gc.collect()
    assert baked.kept_bytes() == before


def test_laid_out_filters_and_a_plain_weight_are_kept_side_by_side_and_a_gradient_takes_the_plain_one(unpacked):
    layer = packed().requires_grad_(False)
    x = LAST.clone().requires_grad_(True)
    for _ in range(2):
        layer(LAST)
        layer(X)
        layer(x).sum().backward()
    assert len(unpacked) == 2
    assert torch.equal(layer(x), reference(layer, x))


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0), "bias": False},
    {"kernel_size": (3, 1), "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 2, "groups": 4},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", GEOMETRIES, ids=str)
def test_filters_laid_out_once_give_the_bits_of_torchs_convolution_for_every_input(how, threads, unpacked):
    torch.manual_seed(0)
    layer = dwm.MaskedConv2d(4, 8, **how, kind=dwm.Threshold())
    with torch.no_grad():
        layer.mask_logits.normal_()
    layer = dwm.PackedConv2d.from_masked(layer.eval()).requires_grad_(False)
    plain = dwm.merge(nn.Sequential(layer)).requires_grad_(False)[0]
    unpacked.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # by which torch chooses who computes small images
    try:
        for shape in ((3, 4, 9, 8), (1, 4, 7, 7), (2, 4, 20, 31), (17, 4, 6, 6)):
            x = torch.randn(shape)
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                y, expected = layer(given), plain(given)
                assert torch.equal(y, expected)
                assert y.stride() == expected.stride()
    finally:
        torch.set_num_threads(before)
    assert len(unpacked) <= 2  # once for each format; a circular pad gives one alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_plain_weight_turns_into_the_format_of_the_images_and_back(dtype, unpacked):
    layer = packed(dtype).requires_grad_(False)
    plain, first = dwm.merge(nn.Sequential(layer)).requires_grad_(False)[0], X[:1].to(dtype)
    last = first.contiguous(memory_format=torch.channels_last)
    unpacked.clear()
    for x, turned in ((first, False), (last, True), (last, True), (first, False)):
        y = layer(x)
        assert torch.equal(y, plain(x))
        assert y.stride() == plain(x).stride()
        assert layer._kept._baked[None].plain().is_contiguous() is not turned
    assert len(unpacked) == 1


def test_what_torch_refuses_is_refused_in_its_words_and_an_empty_batch_is_none_of_it():
    layer = packed().requires_grad_(False)
    plain = dwm.merge(nn.Sequential(layer)).requires_grad_(False)[0]
    for shape in ((2, 3, 9, 8), (2, 4, 0, 8)):
        x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError) as expected:
            plain(x)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(expected.value)
    assert layer(torch.zeros(0, 4, 9, 8)).shape == (0, 6, 9, 8)
    for x in (X[..., ::2], LAST[..., ::2], LAST[:1], LAST[:, :, ::2]):
        assert torch.equal(layer(x), plain(x))


def test_a_forced_backend_or_way_and_a_compiler_see_the_operation(unpacked):
    layer = packed()
    before = baked.kept_bytes()
    with dwm.use_backend("reference"):
        assert torch.equal(layer(X), reference(layer, X))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), reference(layer, X))
    assert baked.kept_bytes() == before


def test_explain_tells_of_the_bytes():
    told = dwm.explain(packed(), (2, 4, 9, 8))
    assert told.forward.way == "staged"
    assert f"kept from the first call on, {4 * 6 * 4 * 9} bytes of a budget of {baked.BUDGET:,}" in told.forward.why
    assert "kept from the first" not in told.input_gradient.why


def test_explain_tells_where_there_is_no_room_and_what_is_kept_stays(monkeypatch):
    kept, other = packed().requires_grad_(False), packed().requires_grad_(False)
    kept(X)
    monkeypatch.setattr(baked, "BUDGET", baked.kept_bytes())
    other(X)
    why = dwm.explain(other, (2, 4, 9, 8)).forward.why
    assert f"864 bytes, is not kept: the process keeps {baked.kept_bytes():,} of {baked.kept_bytes():,}" in why
    assert "kept from the first call on" not in why
    assert "kept from the first call on" in dwm.explain(kept, (2, 4, 9, 8)).forward.why


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
