"""One-pass convolutions equal mask first, convolve then: masks bit for bit, integers exactly, in every geometry."""

import contextlib

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import BackendUnavailable
from dwm_fast.kernels._launch import Tiles, override_launch
from dwm_fast.ops import Mode
from dwm_fast.ops.ways import use_way

FAMILY = settings(
    deadline=None, max_examples=5, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
TILES = Tiles(16, 32, 64)


@pytest.fixture(autouse=True)
def _in_one_pass():
    with dwm_fast.use_backend("triton"), use_way("one-pass"), override_launch(TILES):
        yield


@contextlib.contextmanager
def fp32_products(setting):
    """torch's own setting for fp32 convolutions: "ieee" or "tf32", which is the default on a GPU."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = setting
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def tf32(t):
    """fp32 operands as a matrix unit reads them: 10 bits behind the point, the rest cut off."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def integers(device, *shape, seed=0):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().to(device)


def randn(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rule(device, mode=Mode.GUMBEL_HARD):
    return torch.tensor([3, 2**33], device=device), torch.tensor(0.7, device=device), 5, 0.25, int(mode), 1


geometries = st.tuples(
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2]),
)


@FAMILY
@given(geometries, st.sampled_from([(2, 3), (3, 1), (1, 1)]), st.booleans())
def test_products_from_bits_are_exact_on_integers_in_every_direction(geometry, window, last):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, fmt = (torch.bfloat16, torch.channels_last) if last else (torch.float32, torch.contiguous_format)
    x = integers(device, 2, 4, 4, 5, seed=1).to(dtype).contiguous(memory_format=fmt)
    weight = integers(device, 6, 4 // geometry[3], *window, seed=2).to(dtype).contiguous(memory_format=fmt)
    bias, keep = integers(device, 6, seed=3).to(dtype), randn(device, *weight.shape, seed=4) > 0
    bits, masked = ops.pack([keep]), (weight * keep).float()
    lists = [list(pair) for pair in geometry[:3]]
    expected = F.conv2d(x.float(), masked, bias.float(), *geometry)
    with override_launch(TILES, wide=last):
        y = torch.ops.dwm_fast.conv2d_packed(x, weight, bits, bias, *lists, geometry[3])
        grad = integers(device, *y.shape, seed=5).to(dtype)
        arguments = (grad, x, weight, bits, *lists, geometry[3])
        dx = torch.ops.dwm_fast.conv2d_packed_input_grad(*arguments)
        dw = torch.ops.dwm_fast.conv2d_packed_weight_grad(*arguments)
    exact = torch.ops.aten.convolution_backward(
        grad.float(), x.float(), masked, None, *lists, False, [0, 0], geometry[3], [True, True, False]
    )
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(dx, exact[0].to(dtype))
    assert torch.equal(dw, (exact[1] * keep).to(dtype))
    assert y.is_contiguous(memory_format=fmt)
    assert dx.stride() == x.stride()
    assert dw.stride() == weight.stride()


@FAMILY
@given(geometries, st.sampled_from(list(Mode)), st.booleans())
def test_a_drawn_mask_is_the_staged_one_in_every_direction(geometry, mode, last):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fmt = torch.channels_last if last else torch.contiguous_format
    x = integers(device, 1, 4, 4, 5, seed=1).contiguous(memory_format=fmt)
    # THRESHOLD is a power of two, so edited weights are exact as well. Soft ones are not: at most 12 products of at
    # most 9 each, summed in two orders.
    atol = 2 * 12 * 12 * 9 * 2.0**-24 if mode == Mode.GUMBEL_SOFT else 0.0
    weight = integers(device, 4, 4 // geometry[3], 1, 3, seed=2).contiguous(memory_format=fmt)
    logits = integers(device, *weight.shape, seed=3)
    lists = [list(pair) for pair in geometry[:3]]
    results = []
    for way in ("one-pass", "staged"):
        with use_way(way), fp32_products("ieee"):
            y = torch.ops.dwm_fast.conv2d(x, weight, logits, None, *rule(device, mode), *lists, geometry[3])
            grad = integers(device, *y.shape, seed=5)
            arguments = (grad, x, weight, logits, *rule(device, mode), *lists, geometry[3])
            dx = torch.ops.dwm_fast.conv2d_input_grad(*arguments)
            dl, dw = torch.ops.dwm_fast.conv2d_mask_grad(*arguments, True, True)
            results.append([y, dx, dl, dw])
    for one, staged in zip(*results, strict=True):
        torch.testing.assert_close(one, staged, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "setting"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee")]
)
def test_values_stay_within_the_budget_of_fp64(device, dtype, setting):
    x, weight = randn(device, 2, 5, 6, 5, seed=1).to(dtype), randn(device, 7, 5, 3, 3, seed=2).to(dtype)
    keep = randn(device, *weight.shape, seed=3) > 0
    with fp32_products(setting):
        y = ops.conv2d_packed(x, weight, ops.pack([keep]), None, padding=(1, 1))
    x, masked = x.cpu(), torch.where(keep, weight, 0).cpu()
    exact = F.conv2d(x.double(), masked.double(), padding=1)
    operands = (tf32(x), tf32(masked)) if setting == "tf32" else (x.float(), masked.float())
    low = F.conv2d(*operands, padding=1).to(dtype).double()
    bound = 2 * ((low - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max())
    assert (y.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize("batch", [0, 3])
def test_one_by_one_over_channels_last_is_the_linear_map(device, batch):
    x = integers(device, batch, 5, 3, 4, seed=1).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    weight, logits = integers(device, 6, 5, 1, 1, seed=2), randn(device, 6, 5, 1, 1, seed=3).requires_grad_(True)
    bias = integers(device, 6, seed=4)
    state, tau, *_ = rule(device)
    results = []
    for way in ("one-pass", "staged"):
        with use_way(way):
            y = ops.conv2d(x, weight, logits, bias, state, tau, mode=Mode.THRESHOLD)
            dx, dl = torch.autograd.grad(y, [x, logits], integers(device, *y.shape, seed=5))
            results.append([y, dx, dl, ops.conv2d_packed(x, weight, ops.pack([logits > 0]))])
    for one, staged in zip(*results, strict=True):
        assert torch.equal(one, staged)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    assert results[0][2].shape == weight.shape


def test_a_depthwise_convolution_has_no_one_pass_kernel(device):
    x, weight = torch.ones(1, 4, 5, 5, device=device), torch.ones(4, 1, 3, 3, device=device)
    with pytest.raises(BackendUnavailable, match="depthwise"):
        ops.conv2d_packed(x, weight, ops.pack([weight > 0]), groups=4)
    with use_way(None):
        y = ops.conv2d_packed(x, weight, ops.pack([weight > 0]), groups=4)
    assert torch.equal(y, F.conv2d(x, weight, groups=4))


def test_a_window_larger_than_the_image_is_refused_in_torch_s_words(device):
    x, weight = torch.ones(1, 2, 4, 4, device=device), torch.ones(3, 2, 5, 1, device=device)
    with pytest.raises(RuntimeError, match="greater than actual input size"):
        ops.conv2d_packed(x, weight, ops.pack([weight > 0]))
