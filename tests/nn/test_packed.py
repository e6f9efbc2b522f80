"""pack: a network of weights and bits gives what the masked network gives in eval()."""

from __future__ import annotations

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import backends

KINDS = [dwm.GumbelSigmoid(), dwm.GumbelSigmoid(hard=False), dwm.Threshold()]
X = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["reference", None], ids=["reference", "default"], autouse=True)
def _backend(request):
    with dwm.use_backend(request.param):
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(432, 7)
    )


def masked(kind: dwm.MaskKind = KINDS[0], model: nn.Module | None = None) -> dwm.MaskedModel:
    result = dwm.mask_model(model or network(), kind, seed=1)
    with torch.no_grad():
        for p in result.mask_parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return result.eval()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_output_is_that_of_the_masked_network_bit_for_bit_when_the_mask_is_applied_first(kind, dtype):
    model = masked(kind).to(dtype)
    packed, x = dwm.pack(model), X.to(dtype)
    with dwm.use_way("staged"):
        y = packed(x)
    assert torch.equal(y, model(x))
    assert y.dtype == dtype


def test_the_default_way_gives_the_same_but_for_rounding_and_integers_exactly():
    model = masked()
    packed = dwm.pack(model)
    exact = copy.deepcopy(model).double()(X.double())
    own, y = model(X).double(), packed(X).double()
    budget = 2 * ((own - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max())
    assert (y - exact).abs().max() <= budget
    layer = dwm.MaskedLinear(100, 9, kind=KINDS[2])
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, (9, 100)))
        layer.bias.copy_(torch.arange(9))
        layer.mask_logits.normal_()
    x = torch.randint(-3, 4, (5, 100)).float()
    assert torch.equal(dwm.PackedLinear.from_masked(layer.eval())(x), layer(x))


convolutions = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 3, (3, 2)]),
        "stride": st.sampled_from([1, 2, (2, 1)]),
        "padding": st.sampled_from([0, (1, 0), "same", "valid"]),
        "dilation": st.sampled_from([1, 2]),
        "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    }
)


@settings(deadline=None, max_examples=25)
@given(convolutions, st.booleans(), st.booleans())
def test_every_geometry_of_a_convolution_survives_packing(options, channels_last, batched):
    if options["padding"] == "same":
        options["stride"] = 1
    torch.manual_seed(0)
    layer = dwm.MaskedConv2d(4, 8, kind=dwm.Threshold(), **options).eval()
    x = X
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer.mask_logits.normal_()
    packed = dwm.PackedConv2d.from_masked(layer)
    assert packed.backbone_weight.stride() == layer.weight.stride()
    x = x if batched else x[0]
    expected, got = layer(x), packed(x)
    assert torch.equal(got, expected)
    if batched:
        assert got.stride() == expected.stride()


def test_it_holds_weights_shared_with_the_backbone_and_one_bit_each_and_nothing_else():
    model = network()
    packed = dwm.pack(masked(model=model))
    names = set(packed.state_dict())
    assert not any("logit" in n or "rng" in n or "tau" in n for n in names)
    assert [type(packed[i]).__name__ for i in (0, 3, 5)] == ["PackedConv2d", "PackedConv2d", "PackedLinear"]
    for i in (0, 3, 5):
        assert packed[i].backbone_weight.data_ptr() == model[i].weight.data_ptr()
        assert packed[i].bias.data_ptr() != model[i].bias.data_ptr()
        assert packed[i].bits.numel() == ops.packed_nbytes(model[i].weight.numel())
    assert not any(p.requires_grad for p in packed.parameters())
    assert not packed.training


def test_the_masked_network_is_left_as_it_is():
    model = masked().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    dwm.pack(model)
    assert model.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_hooks_stay_and_code_that_reads_a_weight_sees_the_mask():
    calls = []
    plain = nn.Sequential(nn.Linear(6, 5))
    plain[0].register_forward_hook(lambda *_: calls.append(1))
    model = masked(model=plain)
    packed = dwm.pack(model)
    packed(torch.ones(1, 6))
    assert calls == [1]
    assert torch.equal(packed[0].weight, plain[0].weight * model.keep_masks()["0"])
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = masked(model=attention)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(dwm.pack(model)(x, x, x)[0], model(x, x, x)[0])


def test_state_dicts_copies_and_moves_keep_the_bits():
    first, second = masked(), masked(model=network())
    with torch.no_grad():
        for p in second.mask_parameters():
            p.neg_()
    packed, other = dwm.pack(first), copy.deepcopy(dwm.pack(second))
    assert not torch.equal(packed(X), other(X))
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(packed(X), other(X))
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half[0].bits.dtype == torch.uint8
    assert torch.equal(half[0].bits, packed[0].bits)
    with dwm.use_way("staged"):
        assert torch.equal(half(X.bfloat16()), copy.deepcopy(first).to(torch.bfloat16)(X.bfloat16()))


def test_autocast_is_respected():
    model = masked()
    packed = dwm.pack(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = packed(X), model(X)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_gradients_reach_the_input_through_the_mask():
    model = masked()
    packed, x, twin = dwm.pack(model), X.clone().requires_grad_(True), X.clone().requires_grad_(True)
    packed(x).square().sum().backward()
    model(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [dwm.Threshold(ternary=True), dwm.Edit(), dwm.nn.KernelSoft()], ids=repr)
def test_masks_of_more_than_a_bit_are_refused_with_the_way_out(kind):
    with pytest.raises(InputError, match=r"more than one bit per weight.*merge"):
        dwm.pack(dwm.mask_model(nn.Linear(4, 3), kind))


def test_what_is_no_masked_model_is_named():
    with pytest.raises(InputError, match="pack got Linear; expected a MaskedModel"):
        dwm.pack(nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"PackedLinear\.from_masked got Linear"):
        dwm.PackedLinear.from_masked(nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"PackedConv2d\.from_masked got MaskedLinear"):
        dwm.PackedConv2d.from_masked(dwm.MaskedLinear(3, 2))


def test_it_says_which_way_runs_and_why():
    model = masked()
    packed = dwm.pack(model)
    few, many = dwm.explain(packed[5], (4, 432)).forward, dwm.explain(packed[5], (99, 432))
    backend = backends.chosen("linear_packed", "cpu")
    assert few.way == ("one-pass" if backend == "cpp" else "staged")
    assert ("M=4" in few.why) == (backend == "cpp")
    assert many.forward.way == "staged"
    assert str(many).splitlines()[0] == f"forward: {many.forward}"
    assert dwm.explain(packed[0], (2, 4, 9, 8)).forward.way == "staged"
    assert "all layers at once" in dwm.explain(model.model[5], (4, 432)).forward.why
    assert "masked weight first" in dwm.explain(dwm.MaskedLinear(3, 2), (4, 3)).forward.why
    with pytest.raises(InputError, match=r"expected \(\.\.\., 432\)"):
        dwm.explain(packed[5], (4, 431))
    with pytest.raises(InputError, match=r"expected \(B, 4, H, W\)"):
        dwm.explain(packed[0], (4, 9, 8))
    with pytest.raises(InputError, match="explain got ReLU"):
        dwm.explain(nn.ReLU(), (4,))
