"""conv2d: one masked convolution equals masking first and convolving then, forward and backward."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from dwm_fast import ops, use_backend
from dwm_fast.errors import InputError
from dwm_fast.ops import Mode

pytestmark = pytest.mark.usefixtures("reference", "poison")


def _state() -> torch.Tensor:
    return torch.tensor([3, 2**32 + 1], dtype=torch.int64)


def _inputs(x_shape, w_shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [x_shape, w_shape, w_shape, (w_shape[0],)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes]


def _masked(weight, logits, mode=Mode.GUMBEL_HARD, layer=0, threshold=0.0):
    return ops.sample(
        [logits],
        [weight],
        _state(),
        torch.tensor(1.0, dtype=logits.dtype),
        mode=mode,
        layers=[layer],
        thresholds=[threshold],
    )[0][0]


geometries = st.fixed_dictionaries(
    {
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "groups": st.sampled_from([1, 2, 4]),
    }
)


@settings(deadline=None, max_examples=40)
@given(geometries, st.sampled_from(list(Mode)), st.integers(0, 2), st.booleans(), st.booleans())
def test_conv2d_equals_sampling_first_and_convolving_then(geometry, mode, batch, with_bias, channels_last):
    with use_backend("reference"):
        x, w, scores, b = _inputs((batch, 4, 9, 8), (8, 4 // geometry["groups"], 3, 2))
        if channels_last:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_(True)
            w = w.detach().to(memory_format=torch.channels_last).requires_grad_(True)
        b = b if with_bias else None
        leaves = [t for t in (x, w, scores, b) if t is not None]
        got = ops.conv2d(x, w, scores, b, _state(), torch.tensor(1.0), layer=2, threshold=0.2, mode=mode, **geometry)
        expected = F.conv2d(x, _masked(w, scores, mode, 2, 0.2), b, **geometry)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
        grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
        for a, e in zip(
            torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(a, e)
        keep = scores.detach() > 0
        packed = ops.conv2d_packed(x, w, ops.pack([keep]), b, **geometry)
        expected = F.conv2d(x, w * keep, b, **geometry)
        assert torch.equal(packed, expected)
        leaves = [t for t in (x, w, b) if t is not None]
        for a, e in zip(
            torch.autograd.grad(packed, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(a, e)


def test_the_smooth_rule_passes_gradcheck_in_double_precision():
    inputs = _inputs((1, 2, 4, 3), (2, 1, 2, 2), torch.float64)
    tau = torch.tensor(0.9, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: ops.conv2d(*t, _state(), tau, mode=Mode.GUMBEL_SOFT, groups=2, stride=(2, 1), padding=(1, 0)),
        inputs,
    )


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_any_argument_may_be_without_gradient(frozen):
    inputs = _inputs((2, 3, 5, 5), (4, 3, 3, 3))
    inputs[frozen].requires_grad_(False)
    ops.conv2d(*inputs, _state(), torch.tensor(1.0)).sum().backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(4)]


def test_channels_last_in_is_channels_last_out_with_the_same_mask():
    x, w, scores, b = _inputs((2, 8, 6, 6), (8, 8, 3, 3))
    y = ops.conv2d(x, w, scores, b, _state(), torch.tensor(1.0))
    last = [t.detach().to(memory_format=torch.channels_last) for t in (x, w, scores)]
    z = ops.conv2d(*last, b, _state(), torch.tensor(1.0))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, z)


def test_dtypes_and_autocast():
    x, w, scores, b = _inputs((2, 3, 5, 5), (4, 3, 3, 3))
    low = ops.conv2d(x.bfloat16(), w, scores, b, _state(), torch.tensor(1.0))
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.conv2d(x, w, scores, b, _state(), torch.tensor(1.0))
        packed = ops.conv2d_packed(x, w, ops.pack([scores > 0]), b)
    assert torch.equal(y, low)
    assert packed.dtype == torch.bfloat16
    (y.float().sum() + packed.float().sum()).backward()
    assert [t.grad.dtype for t in (x, w, scores, b)] == [torch.float32] * 4


def test_wrong_arguments_are_named():
    x, w, scores, b = _inputs((2, 3, 5, 5), (4, 3, 3, 3))
    with pytest.raises(InputError, match=r"shape \(3, 5, 5\); expected \(batch, channels, rows, columns\)"):
        ops.conv2d(x[0], w, scores, b, _state(), torch.tensor(1.0))
    with pytest.raises(InputError, match=r"shape \(3, 5, 5\)"):
        ops.conv2d_packed(x[0], w, ops.pack([scores > 0]), b)
    with pytest.raises(InputError, match="expected uint8 of shape"):
        ops.conv2d_packed(x, w, torch.zeros(3, dtype=torch.uint8), b)


def test_conv2d_is_a_well_formed_operation():
    rule = (_state(), torch.tensor(1.0), 0, 0.1, int(Mode.GUMBEL_HARD), 0)
    geometry = ([2, 1], [1, 0], [1, 1], 2)
    x, w, scores, b = _inputs((2, 4, 5, 5), (4, 2, 3, 3))
    torch.library.opcheck(torch.ops.dwm_fast.conv2d.default, (x, w, scores, b, *rule, *geometry))
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_(True)
    torch.library.opcheck(torch.ops.dwm_fast.conv2d.default, (last, w, scores, None, *rule, *geometry))
    torch.library.opcheck(torch.ops.dwm_fast.conv2d_packed.default, (x, w, ops.pack([scores > 0]), b, *geometry))


@pytest.mark.parametrize(
    "fields", [{"stride": (-1, 1)}, {"stride": (0, 1)}, {"padding": (0, -1)}, {"dilation": (1, 0)}]
)
def test_negative_strides_and_the_like_are_refused(fields):
    x, w, scores, b = _inputs((2, 3, 5, 5), (4, 3, 3, 3))
    name, value = next(iter(fields.items()))
    with pytest.raises(InputError, match=rf"{name} is \({value[0]}, {value[1]}\); expected two numbers"):
        ops.conv2d(x, w, scores, b, _state(), torch.tensor(1.0), **fields)
    with pytest.raises(InputError, match=name):
        ops.conv2d_packed(x, w, ops.pack([scores > 0]), b, **fields)


def test_the_backward_passes_are_well_formed_operations():
    x, w, scores, _ = (t.detach() for t in _inputs((2, 4, 5, 5), (4, 2, 3, 3)))
    rule, geometry = (_state(), torch.tensor(1.0), 0, 0.1, int(Mode.GUMBEL_HARD), 0), ([2, 1], [1, 0], [1, 1], 2)
    grad, bits = torch.ones(2, 4, 3, 3), ops.pack([scores > 0])
    operations = [
        ("conv2d_input_grad", (grad, x, w, scores, *rule, *geometry)),
        ("conv2d_input_grad", (grad, x.to(memory_format=torch.channels_last), w, scores, *rule, *geometry)),
        ("conv2d_mask_grad", (grad, x, w, scores, *rule, *geometry, True, False)),
        ("conv2d_packed_input_grad", (grad, x, w, bits, *geometry)),
        ("conv2d_packed_weight_grad", (grad, x, w, bits, *geometry)),
    ]
    for name, arguments in operations:
        torch.library.opcheck(getattr(torch.ops.dwm_fast, name).default, arguments)


def test_a_double_backward_is_refused_in_words():
    x, w, scores, b = _inputs((2, 3, 5, 5), (4, 3, 3, 3))
    for y in (ops.conv2d(x, w, scores, b, _state(), torch.tensor(1.0)), ops.conv2d_packed(x, w, ops.pack([w > 0]))):
        (first,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
        with pytest.raises(InputError, match="differentiable once"):
            first.sum().backward()
