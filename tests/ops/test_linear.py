"""linear: one masked product equals masking first and multiplying then, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import Mode

pytestmark = pytest.mark.usefixtures("reference", "poison")

STATE = (2**33 + 5, 7)


def _state() -> torch.Tensor:
    return torch.tensor(STATE, dtype=torch.int64)


def _inputs(*x_shape: int, n: int = 6, k: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(*x_shape, k), (n, k), (n, k), (n,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes]


def _masked(weight, logits, mode, layer=0, threshold=0.0, step_offset=0, tau=1.0):
    return ops.sample(
        [logits],
        [weight],
        _state(),
        torch.tensor(tau, dtype=logits.dtype),
        mode=mode,
        layers=[layer],
        thresholds=[threshold],
        step_offset=step_offset,
    )[0][0]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("x_shape", [(4,), (), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equals_sampling_first_and_multiplying_then(mode, x_shape, with_bias):
    x, w, scores, b = _inputs(*x_shape)
    b = b if with_bias else None
    leaves = [t for t in (x, w, scores, b) if t is not None]
    expected = F.linear(x, _masked(w, scores, mode, 3, 0.2, 2, 0.7), b)
    got = ops.linear(x, w, scores, b, _state(), torch.tensor(0.7), layer=3, threshold=0.2, mode=mode, step_offset=2)
    assert torch.equal(got, expected)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    for a, e in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, e)


def test_the_smooth_rule_passes_gradcheck_in_double_precision():
    inputs = _inputs(3, n=2, k=3, dtype=torch.float64)
    tau = torch.tensor(0.9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ops.linear(*t, _state(), tau, mode=Mode.GUMBEL_SOFT), inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_any_argument_may_be_without_gradient(frozen):
    inputs = _inputs(4)
    inputs[frozen].requires_grad_(False)
    ops.linear(*inputs, _state(), torch.tensor(1.0)).sum().backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(4)]


@pytest.mark.parametrize("x_shape", [(4,), (), (2, 3), (0,)])
def test_packed_bits_give_the_product_of_the_masked_weight(x_shape):
    x, w, scores, b = _inputs(*x_shape)
    keep = scores.detach() > 0
    expected = F.linear(x, w * keep, b)
    got = ops.linear_packed(x, w, ops.pack([keep]), b)
    assert torch.equal(got, expected)
    grad = torch.ones_like(got)
    for a, e in zip(
        torch.autograd.grad(got, [x, w, b], grad), torch.autograd.grad(expected, [x, w, b], grad), strict=True
    ):
        torch.testing.assert_close(a, e)
    with torch.no_grad():
        assert torch.equal(ops.linear_packed(x, w, ops.pack([keep])), F.linear(x, w * keep))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_input_decides_the_compute_dtype(dtype):
    x, w, scores, b = _inputs(4)
    y = ops.linear(x.to(dtype), w, scores, b, _state(), torch.tensor(1.0))
    assert y.dtype == dtype
    expected = F.linear(x.to(dtype), _masked(w, scores, Mode.GUMBEL_HARD).to(dtype), b.to(dtype))
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert [t.grad.dtype for t in (x, w, scores, b)] == [torch.float32] * 4
    assert ops.linear_packed(x.to(dtype), w, ops.pack([scores > 0]), b).dtype == dtype


def test_autocast_is_respected_in_both_directions():
    x, w, scores, b = _inputs(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(x, w, scores, b, _state(), torch.tensor(1.0))
        packed = ops.linear_packed(x, w, ops.pack([scores > 0]), b)
        assert torch.ops.dwm_fast.linear(x, w, scores, b, _state(), torch.tensor(1.0), 0, 0.0, 0, 0).dtype == x.dtype
    assert y.dtype == packed.dtype == torch.bfloat16
    (y.float().sum() + packed.float().sum()).backward()
    assert [t.grad.dtype for t in (x, w, scores, b)] == [torch.float32] * 4


def test_no_features_at_all():
    state, tau = _state(), torch.tensor(1.0)
    nothing = ops.linear(torch.zeros(3, 0, requires_grad=True), torch.zeros(2, 0), torch.zeros(2, 0), None, state, tau)
    assert nothing.tolist() == [[0, 0]] * 3
    nothing.sum().backward()
    x = torch.ones(3, 2, requires_grad=True)
    ops.linear(x, torch.zeros(0, 2), torch.zeros(0, 2), None, state, tau).sum().backward()
    assert not x.grad.any()


def test_wrong_arguments_are_named():
    x, w, scores, b = _inputs(4)
    with pytest.raises(InputError, match="expected uint8 of shape"):
        ops.linear_packed(x, w, torch.zeros(3, dtype=torch.uint8), b)
    with pytest.raises(InputError, match=r"rng_state is torch\.float32"):
        ops.linear(x, w, scores, b, torch.zeros(2), torch.tensor(1.0))


@pytest.mark.parametrize("mode", [Mode.GUMBEL_HARD, Mode.THRESHOLD])
def test_linear_is_a_well_formed_operation(mode):
    rule = (_state(), torch.tensor(1.0), 0, 0.1, int(mode), 0)
    torch.library.opcheck(torch.ops.dwm_fast.linear.default, (*_inputs(3), *rule))
    x, w, scores, _ = _inputs(2, 3)
    transposed = x.transpose(0, 1)
    torch.library.opcheck(torch.ops.dwm_fast.linear.default, (transposed, w, scores, None, *rule))


def test_linear_packed_is_a_well_formed_operation():
    x, w, scores, b = _inputs(3)
    torch.library.opcheck(torch.ops.dwm_fast.linear_packed.default, (x, w, ops.pack([scores > 0]), b, "none"))


@pytest.mark.parametrize(("need_logits", "need_weight"), [(True, True), (True, False), (False, True)])
def test_the_backward_passes_are_well_formed_operations(need_logits, need_weight):
    x, w, scores, _ = (t.detach() for t in _inputs(3))
    rule = (_state(), torch.tensor(1.0), 0, 0.1, int(Mode.GUMBEL_HARD), 0)
    grad, bits = torch.ones(3, 6), ops.pack([scores > 0])
    ops_and_arguments = [
        ("linear_input_grad", (grad, w, scores, *rule)),
        ("linear_mask_grad", (grad, x, w, scores, *rule, need_logits, need_weight)),
        ("linear_packed_input_grad", (grad, w, bits)),
        ("linear_packed_weight_grad", (grad, x, w, bits)),
    ]
    for name, arguments in ops_and_arguments:
        torch.library.opcheck(getattr(torch.ops.dwm_fast, name).default, arguments)


@pytest.mark.parametrize("wanted", [0, 2])
def test_a_double_backward_is_refused_in_words(wanted):
    x, w, scores, b = _inputs(4)
    y = ops.linear(x, w, scores, b, _state(), torch.tensor(1.0))
    (first,) = torch.autograd.grad(y.square().sum(), [(x, w, scores)[wanted]], create_graph=True)
    with pytest.raises(InputError, match="differentiable once"):
        first.sum().backward()
    y = ops.linear_packed(x, w, ops.pack([scores > 0]), b)
    (first,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(InputError, match="differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_an_activation_behind_the_product_has_its_gradient(activation):
    x, w, scores, b = _inputs(4)
    bits, function = ops.pack([scores > 0]), getattr(F, activation)
    got = ops.linear_packed(x, w, bits, b, activation=activation)
    expected = function(F.linear(x, w * (scores > 0), b))
    assert torch.equal(got, expected)
    for a, e in zip(*(torch.autograd.grad(t.sum(), [x, w, b]) for t in (got, expected)), strict=True):
        torch.testing.assert_close(a, e)
    with torch.no_grad():
        assert torch.equal(ops.linear_packed(x, w, bits, b, activation=activation), expected)
    raw = torch.ops.dwm_fast.linear_packed(x, w, bits, b, activation)
    with pytest.raises(InputError, match="no gradient with activation"):
        raw.sum().backward()
    with pytest.raises(InputError, match="expected one of none, relu, gelu, silu"):
        ops.linear_packed(x, w, bits, b, activation="tanh")
