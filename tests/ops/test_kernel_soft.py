"""kernel_soft: METHODS section 3, written out by hand and again in fp64."""

import math

import pytest
import torch

from dwm_fast import ops
from dwm_fast.errors import InputError

STATE = torch.tensor([7, 0])


def soft(*values, weight=None, **options):
    """M of a (1, n) tensor of reals, through weights of ones."""
    r = torch.tensor([values], requires_grad=True)
    weight = torch.ones(1, len(values)) if weight is None else weight
    return ops.kernel_soft([r], [weight], STATE, **options)[0], r


def formula(r, threshold=5e-3):
    """M in fp64 from the formulas, element by element."""
    b = [1.0 if (x - threshold) * 1200 >= 0 else 0.0 for x in r]
    a = [x * (1 - keep) for x, keep in zip(r, b, strict=True)]
    low, high = min(a), max(a)
    scaled = [(x - low) / (high - low) if x != 0 and high > low else 0.0 for x in a]
    return [keep + 0.5 * x for keep, x in zip(b, scaled, strict=True)]


class TestByHand:
    def test_kept_kernels_are_one_and_dropped_ones_lie_in_0_to_a_half(self):
        # a = [0 (kept), -1e-3, 3e-3]: min -1e-3, max 3e-3
        assert soft(0.02, -1e-3, 3e-3)[0].tolist() == [[1.0, 0.0, 0.5]]

    def test_zeros_of_kept_kernels_count_in_the_minimum(self):
        # a = [0 (kept), 1e-3, 4e-3]: the minimum is the kept kernel's 0, so 1e-3 becomes a quarter, halved
        assert soft(0.02, 1e-3, 4e-3)[0].tolist()[0] == pytest.approx([1.0, 0.125, 0.5], rel=1e-6)
        # without a kept kernel the minimum is 1e-3 itself
        assert soft(1e-3, 4e-3)[0].tolist() == [[0.0, 0.5]]

    def test_zeros_of_kept_kernels_count_in_the_maximum(self):
        # a = [0 (kept), -4e-3, -1e-3]: min -4e-3, max 0
        assert soft(0.02, -4e-3, -1e-3)[0].tolist()[0] == pytest.approx([1.0, 0.0, 0.375], rel=1e-6)

    def test_a_dropped_kernel_at_exactly_zero_stays_zero(self):
        # a = [-1e-3, 0, 1e-3]: only non-zero entries are scaled
        assert soft(-1e-3, 0.0, 1e-3)[0].tolist() == [[0.0, 0.0, 0.5]]

    def test_the_threshold_itself_is_kept(self):
        r = torch.tensor([5e-3, 5e-3])
        r[1] = torch.nextafter(r[0], torch.tensor(0.0))
        assert soft(*r.tolist())[0].tolist() == [[1.0, 0.5]]

    @pytest.mark.parametrize("values", [(1e-3,), (1e-3, 1e-3, 1e-3), (0.0, 0.0)])
    def test_a_range_of_zero_gives_zero_and_never_nan(self, values):
        masked, r = soft(*values)
        assert masked.tolist() == [[0.0] * len(values)]
        masked.sum().backward()
        assert r.grad.isfinite().all()

    def test_all_kept_is_the_weight_itself(self):
        weight = torch.randn(3, 2, 3, 3)
        masked = ops.kernel_soft([torch.full((3, 2, 1, 1), 0.01)], [weight], STATE)[0]
        assert torch.equal(masked, weight)

    def test_empty_and_one_element(self):
        masked = ops.kernel_soft(
            [torch.empty(0, 3, 1, 1), torch.tensor([[0.1]])], [torch.empty(0, 3, 3, 3), torch.tensor([[2.0]])], STATE
        )
        assert masked[0].shape == (0, 3, 3, 3)
        assert masked[1].tolist() == [[2.0]]

    def test_gradient_is_12_s_1_minus_s_through_b_alone(self):
        r0 = 5e-3 + 0.1  # s = sigmoid(1.2)
        weight = torch.tensor([[3.0, 2.0]])
        masked, r = soft(r0, -0.1, weight=weight)
        (masked * torch.tensor([[5.0, 7.0]])).sum().backward()
        s = [1 / (1 + math.exp(-12 * (x - 5e-3))) for x in (r0, -0.1)]
        expected = [12 * s[0] * (1 - s[0]) * 5 * 3, 12 * s[1] * (1 - s[1]) * 7 * 2]
        assert r.grad.tolist()[0] == pytest.approx(expected, rel=1e-5)

    def test_a_kernels_gradient_is_the_sum_over_its_taps(self):
        weight, grad = torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)
        r = torch.full((2, 3, 1, 1), 0.01, requires_grad=True)
        ops.kernel_soft([r], [weight], STATE)[0].backward(grad)
        s = 1 / (1 + math.exp(-12 * (0.01 - 5e-3)))
        expected = 12 * s * (1 - s) * (weight * grad).double().sum((2, 3), keepdim=True)
        # nine products summed in fp32: a few units of 2**-24 of terms of size below 8
        torch.testing.assert_close(r.grad.double(), expected, rtol=1e-5, atol=1e-5)

    def test_the_weight_gets_no_gradient(self):
        weight = torch.ones(1, 2, requires_grad=True)
        masked, r = soft(0.01, 0.0, weight=weight)
        masked.sum().backward()
        assert weight.grad is None
        assert r.grad is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (6, 1, 7, 7), (8, 16, 1, 1), (3, 4, 2, 3)])
def test_agrees_with_the_formulas(shape, memory_format):
    generator = torch.Generator().manual_seed(1)
    r = torch.rand(*shape[:2], 1, 1, generator=generator) * 0.02 - 0.008
    weight = torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)
    masked = ops.kernel_soft([r], [weight], STATE)[0]
    expected = torch.tensor(formula(r.double().flatten().tolist()), dtype=torch.float64).view(r.shape)
    assert (expected == 1).any()
    assert (expected == 0).any()
    # M is one subtraction, one difference and one quotient, each rounded by 2**-24 relative; near the minimum the
    # difference's error is 2**-24 of the terms, that is of the range
    torch.testing.assert_close(masked.double(), weight.double() * expected, rtol=2.0**-21, atol=2.0**-21)
    assert masked.stride() == weight.stride()


def test_many_layers_are_as_many_calls():
    reals = [torch.rand(3, 2, 1, 1) * 0.02, torch.rand(4, 3) * 0.02 - 0.01]
    weights = [torch.randn(3, 2, 3, 3), torch.randn(4, 3)]
    together = ops.kernel_soft(reals, weights, STATE)
    for i in range(2):
        assert torch.equal(together[i], ops.kernel_soft([reals[i]], [weights[i]], STATE)[0])


class TestNoise:
    def test_keeps_with_the_probability_of_z(self):
        """P(z + logistic >= 0) = sigmoid(z)."""
        z = 1.0
        r = torch.full((200, 100), 5e-3 + z / 1200)
        masked = ops.kernel_soft([r], [torch.ones(200, 100)], STATE, noisy=True)[0]
        kept = float((masked == 1).float().mean())
        p = 1 / (1 + math.exp(-z))
        assert abs(kept - p) < 5 * math.sqrt(p * (1 - p) / 20_000)

    def test_is_the_noise_contracts_uniform(self):
        r = torch.full((4, 8), 5e-3)  # z = 0: kept exactly where u > 1/2
        masked = ops.kernel_soft([r], [torch.ones(4, 8)], STATE, noisy=True, layers=[3], step_offset=2)[0]
        u = ops.uniform(ops.random_words(32, torch.tensor([7, 2]), 3)).view(4, 8)
        assert torch.equal(masked == 1, u > 0.5)

    def test_backward_uses_the_same_noise(self):
        r = torch.full((4, 8), 6e-3, requires_grad=True)
        masked = ops.kernel_soft([r], [torch.ones(4, 8)], STATE, noisy=True)[0]
        masked.sum().backward()
        u = ops.uniform(ops.random_words(32, STATE, 0)).view(4, 8).double()
        s = torch.sigmoid((1200 * (6e-3 - 5e-3) + u.log() - (1 - u).log()) / 100)
        # z carries 2**-24 of 6e-3 times 1200 / 100; the logarithms of fp32 more; far below 1e-4 of s (1 - s)
        torch.testing.assert_close(r.grad.double(), 12 * s * (1 - s), rtol=1e-4, atol=0)

    def test_another_step_or_layer_draws_other_noise(self):
        r, ones = torch.full((8, 8), 5e-3), torch.ones(8, 8)
        draws = [
            ops.kernel_soft([r], [ones], torch.tensor([7, step]), noisy=True, layers=[layer])[0]
            for step, layer in ((0, 0), (1, 0), (0, 1))
        ]
        assert not torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_once(dtype):
    r = torch.rand(5, 4, 1, 1) * 0.02 - 0.008
    weight = torch.randn(5, 4, 3, 3).to(dtype)
    low = ops.kernel_soft([r], [weight], STATE)[0]
    assert low.dtype == dtype
    assert torch.equal(low, ops.kernel_soft([r], [weight.float()], STATE)[0].to(dtype))
    assert ops.kernel_soft([r], [weight.float()], STATE, dtype=dtype)[0].dtype == dtype


def test_opcheck():
    reals = [torch.rand(3, 2, 1, 1) * 0.02, torch.rand(4, 3) * 0.02 - 0.01]
    reals = [r.requires_grad_() for r in reals]
    weights = [torch.randn(3, 2, 3, 3), torch.randn(4, 3)]
    torch.library.opcheck(torch.ops.dwm_fast.kernel_soft, (reals, weights, STATE, [0, 1], 5e-3, False, 0, None))


@pytest.mark.parametrize("noisy", [False, True])
def test_compiles_without_a_break(noisy):
    r, weight = torch.rand(3, 2, 1, 1) * 0.02, torch.randn(3, 2, 3, 3)

    def masked_sum(r):
        return ops.kernel_soft([r], [weight], STATE, noisy=noisy)[0].sum()

    eager, compiled = r.clone().requires_grad_(), r.clone().requires_grad_()
    masked_sum(eager).backward()
    torch.compile(masked_sum, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.parametrize(
    ("reals", "weights", "message"),
    [
        ([], [torch.ones(1, 1)], "got 0 reals, 1 weights and 1 layers"),
        ([torch.ones(2, 3, 3, 3)], [torch.ones(2, 3, 3, 3)], r"reals\[0\] has shape \(2, 3, 3, 3\)"),
        ([torch.ones(3)], [torch.ones(3)], r"expected \(out, in\)"),
    ],
)
def test_wrong_shapes_are_named(reals, weights, message):
    with pytest.raises(InputError, match=message):
        ops.kernel_soft(reals, weights, STATE)
    with pytest.raises(InputError, match="rng_state is"):
        ops.kernel_soft([torch.ones(1, 1)], [torch.ones(1, 1)], torch.tensor([1.0]))
