"""MaskedLinear and MaskedConv2d: drop-in layers, alone."""

from __future__ import annotations

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("reference", "poison")

ALL = dwm.GumbelSigmoid(init=60.0)  # sigmoid(60) is 1 in fp32: every draw keeps everything


def _same(plain: nn.Module, masked: nn.Module, x: torch.Tensor) -> None:
    """Equal outputs, strides and gradients of the input and the bias, in train() and eval()."""
    for mode in (True, False):
        plain.train(mode)
        masked.train(mode)
        a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        expected, got = plain(a), masked(b)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
        assert got.dtype == expected.dtype
        grad = torch.ones_like(expected)
        expected.backward(grad)
        got.backward(grad)
        assert torch.equal(a.grad, b.grad)


convolutions = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 3, (3, 2)]),
        "stride": st.sampled_from([1, 2, (2, 1)]),
        "padding": st.sampled_from([0, 1, (1, 0), "same", "valid"]),
        "dilation": st.sampled_from([1, 2]),
        "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    }
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@settings(deadline=None, max_examples=60)
@given(convolutions, DTYPES, st.booleans(), st.booleans())
def test_conv2d_with_everything_kept_is_nn_conv2d(options, dtype, channels_last, from_scratch):
    if options["padding"] == "same":
        options = {**options, "stride": 1}
    torch.manual_seed(0)
    with dwm.use_backend("reference"):
        plain = nn.Conv2d(4, 8, dtype=dtype, **options)
        x = torch.randn(2, 4, 8, 7, dtype=dtype)
        if channels_last:
            plain, x = plain.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        if from_scratch:
            masked = dwm.MaskedConv2d(4, 8, dtype=dtype, kind=ALL, **options)
            masked.load_state_dict(plain.state_dict(), strict=False)
            masked = masked.to(memory_format=torch.channels_last) if channels_last else masked
        else:
            masked = dwm.MaskedConv2d.from_conv(plain, ALL)
            assert masked.weight.stride() == plain.weight.stride()
        assert masked.mask_logits.stride() == masked.weight.stride()
        _same(plain, masked, x)


@settings(deadline=None, max_examples=20)
@given(st.booleans(), DTYPES, st.sampled_from([(), (3,), (2, 3), (0,)]), st.booleans())
def test_linear_with_everything_kept_is_nn_linear(bias, dtype, rows, from_scratch):
    torch.manual_seed(0)
    with dwm.use_backend("reference"):
        plain = nn.Linear(5, 4, bias=bias, dtype=dtype)
        if from_scratch:
            masked = dwm.MaskedLinear(5, 4, bias=bias, dtype=dtype, kind=ALL)
            masked.load_state_dict(plain.state_dict(), strict=False)
        else:
            masked = dwm.MaskedLinear.from_linear(plain, ALL)
        _same(plain, masked, torch.randn(*rows, 5, dtype=dtype))


def test_the_weight_is_shared_and_frozen_and_the_bias_is_not_shared():
    for plain, masked in (
        (linear := nn.Linear(3, 2), dwm.MaskedLinear.from_linear(linear)),
        (conv := nn.Conv2d(3, 2, 3), dwm.MaskedConv2d.from_conv(conv)),
    ):
        assert masked.weight.data_ptr() == plain.weight.data_ptr()
        assert masked.bias.data_ptr() != plain.bias.data_ptr()
        assert plain.weight.requires_grad
        assert not masked.weight.requires_grad
        assert masked.bias.requires_grad
        assert isinstance(masked, type(plain))
        names = {name for name, p in masked.named_parameters() if p.requires_grad}
        assert names == {"mask_logits", "bias"}


def test_from_a_layer_keeps_hooks_state_and_attributes_apart():
    plain = nn.Linear(3, 2).eval()
    plain.label = "head"
    calls = []
    plain.register_forward_hook(lambda *args: calls.append(1))
    masked = dwm.MaskedLinear.from_linear(plain, dwm.Threshold())
    assert not masked.training
    assert masked.label == "head"
    masked(torch.ones(1, 3))
    assert calls == [1]
    masked.register_forward_hook(lambda *args: calls.append(2))
    masked.extra = nn.ReLU()
    plain(torch.ones(1, 3))
    assert calls == [1, 1]
    assert not list(plain.children())
    assert [n for n, _ in plain.named_parameters()] == ["weight", "bias"]
    assert not dict(plain.named_buffers())


def test_training_draws_new_masks_and_evaluation_uses_the_keep_mask():
    layer = dwm.MaskedLinear(20, 20, bias=False, kind=dwm.GumbelSigmoid(init=0.0), seed=3)
    with torch.no_grad():
        layer.mask_logits.uniform_(-1, 1)
    eye = torch.eye(20)
    a, b = layer(eye), layer(eye)
    assert not torch.equal(a, b)
    assert layer.rng_state.tolist() == [3, 2]
    for out in (a, b):
        drawn = out.t()
        assert torch.equal(drawn, layer.weight * (drawn != 0))
    layer.eval()
    assert torch.equal(layer(eye).t(), layer.weight * (layer.mask_logits >= 0))
    assert torch.equal(layer(eye), layer(eye))
    assert torch.equal(layer.keep_mask(), layer.mask_logits >= 0)
    assert layer.rng_state.tolist() == [3, 2]


def test_the_seed_decides_the_masks_and_torch_decides_the_seed():
    def masks(seed):
        layer = dwm.MaskedLinear(30, 30, kind=dwm.GumbelSigmoid(init=0.0), seed=seed)
        return layer.rng_state[0].item(), layer.masked_weight() != 0

    assert torch.equal(masks(5)[1], masks(5)[1])
    assert not torch.equal(masks(5)[1], masks(6)[1])
    torch.manual_seed(1)
    first = masks(None)
    torch.manual_seed(1)
    again = masks(None)
    assert first[0] == again[0] != masks(None)[0]
    assert masks(2**64 - 1)[0] == -1
    assert masks(-(2**63))[0] == -(2**63)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(InputError, match="expected a 64-bit number"):
            dwm.MaskedLinear(2, 2, seed=seed)


def test_gradients_reach_logits_and_never_the_frozen_weight():
    layer = dwm.MaskedConv2d(3, 4, 3, kind=dwm.GumbelSigmoid(init=0.0))
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert layer.mask_logits.grad.any()
    assert layer.weight.grad is None
    layer.weight.requires_grad_(True)
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert layer.weight.grad.any()


def test_an_evaluation_forward_survives_a_training_forward_before_its_backward():
    layer = dwm.MaskedLinear(4, 4, kind=dwm.Edit())
    late = layer.eval()(torch.ones(1, 4)).sum()
    layer.train()(torch.ones(1, 4))
    late.backward()
    assert layer.mask_logits.grad is not None


@pytest.mark.parametrize("kind", [dwm.GumbelSigmoid(init=0.0), dwm.Threshold(), dwm.Edit()], ids=repr)
def test_state_dict_restores_masks_edits_and_noise(kind):
    torch.manual_seed(0)
    a = dwm.MaskedConv2d(3, 4, 3, kind=kind, seed=1)
    with torch.no_grad():
        a.mask_logits.normal_()
    x = torch.randn(2, 3, 6, 6)
    a(x)
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    b = dwm.MaskedConv2d(3, 4, 3, kind=kind, seed=99)
    b.load_state_dict(torch.load(buffer, weights_only=True))
    assert b.unit == a.unit
    assert torch.equal(a(x), b(x))
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_a_deep_copy_taken_mid_training_goes_on_alike_and_apart():
    layer = dwm.MaskedLinear(6, 5, kind=dwm.GumbelSigmoid(init=0.0), seed=4)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x), twin(x))
    with torch.no_grad():
        twin.mask_logits.fill_(-9.0)
    assert not torch.equal(layer(x), twin(x))
    assert layer.mask_logits.max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_leaves_mask_parameters_in_fp32(dtype):
    layer = dwm.MaskedConv2d(3, 4, 3, kind=dwm.GumbelSigmoid(tau=0.1, init=1 / 3), seed=0)
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    logits = layer.mask_logits.detach().clone()
    layer.to(dtype, memory_format=torch.channels_last)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.mask_logits.is_contiguous(memory_format=torch.channels_last)
    assert layer.mask_logits.dtype == layer.mask_logits.grad.dtype == layer.tau.dtype == torch.float32
    assert torch.equal(layer.mask_logits, logits)
    assert layer.rng_state.dtype == torch.int64
    y = layer(torch.randn(1, 3, 5, 5, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()


def test_the_meta_device_holds_shapes_alone():
    for kind in (dwm.GumbelSigmoid(), dwm.Edit()):
        layer = dwm.MaskedLinear(4, 3, kind=kind, device="meta")
        assert layer(torch.ones(2, 4, device="meta")).shape == (2, 3)
        moved = dwm.MaskedConv2d(3, 2, 3, kind=kind).to("meta")
        assert moved(torch.ones(1, 3, 4, 4, device="meta")).shape == (1, 2, 2, 2)
        real = dwm.MaskedLinear(4, 3, kind=kind)
        layer.to_empty(device="cpu").load_state_dict(real.state_dict())
        assert torch.equal(layer.eval()(torch.ones(1, 4)), real.eval()(torch.ones(1, 4)))


def test_a_whole_number_is_a_temperature_too():
    layer = dwm.MaskedLinear(4, 3, kind=dwm.GumbelSigmoid(tau=2))
    assert layer.tau.dtype == torch.float32
    layer(torch.ones(1, 4)).sum().backward()


def test_autocast_gives_the_dtype_and_value_of_the_plain_layer():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    masked = dwm.MaskedConv2d.from_conv(plain, ALL)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked.masked_weight().dtype == torch.bfloat16
        expected, got = plain(x), masked(x)
        assert torch.equal(got, expected)
        assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert masked.mask_logits.grad.dtype == torch.float32
    double = dwm.MaskedLinear(3, 2, kind=ALL, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert double(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64


def test_repr_shows_the_layer_and_its_mask():
    text = repr(dwm.MaskedConv2d(3, 8, 3, stride=2, kind=dwm.GumbelSigmoid(tau=0.5)))
    assert text == (
        "MaskedConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), "
        "mask=(kind=gumbel-sigmoid, tau=0.5, init=2.0, hard=True))"
    )
    assert repr(dwm.MaskedLinear(4, 2, bias=False, kind=dwm.Threshold())) == (
        "MaskedLinear(in_features=4, out_features=2, bias=False, "
        "mask=(kind=threshold, threshold=0.005, init=0.01, ternary=False, scheme=1s))"
    )


def test_other_layers_are_refused_by_name():
    with pytest.raises(InputError, match=r"from_linear got Conv2d; expected a torch\.nn\.Linear"):
        dwm.MaskedLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(InputError, match=r"from_conv got Linear; expected a torch\.nn\.Conv2d"):
        dwm.MaskedConv2d.from_conv(nn.Linear(1, 1))
