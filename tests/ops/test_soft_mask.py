"""soft_mask: importance and the soft-masked step of METHODS section 4, by hand and in fp64."""

import math

import pytest
import torch

from dwm_fast import ops
from dwm_fast.errors import InputError


def importance(gradient):
    gamma = torch.zeros_like(gradient, dtype=torch.float32)
    ops.raise_importance([gamma], [gradient])
    return gamma


def rate(value):
    return torch.tensor(value, dtype=torch.float64)


class TestImportance:
    """gamma = abs(tanh((g - mean g) / std g)), unbiased std."""

    def test_by_hand(self):
        # mean 2, deviations -1, 0, 1, unbiased std 1
        expected = [math.tanh(1.0), 0.0, math.tanh(1.0)]
        assert importance(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx(expected, rel=1e-6)

    def test_the_std_is_the_unbiased_one(self):
        # two elements: deviations -1 and 1, unbiased std sqrt(2), biased 1
        expected = [math.tanh(1 / math.sqrt(2))] * 2
        assert importance(torch.tensor([3.0, 5.0])).tolist() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        "gradient", [torch.zeros(7), torch.tensor([5.0]), torch.tensor(5.0), torch.full((3,), 2.0)]
    )
    def test_no_spread_gives_zero_and_never_nan(self, gradient):
        assert torch.equal(importance(gradient), torch.zeros(gradient.shape))

    def test_an_empty_tensor_has_none(self):
        assert importance(torch.empty(0, 3)).shape == (0, 3)

    def test_does_not_depend_on_the_gradients_scale_or_sign(self):
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(0))
        for factor in (1024.0, 2.0**-40, -1.0):
            assert torch.equal(importance(factor * gradient), importance(gradient))

    def test_only_rises(self):
        gamma = torch.tensor([0.9, 0.0, 0.5])
        ops.raise_importance([gamma], [torch.tensor([1.0, 2.0, 3.0])])
        assert gamma.tolist() == pytest.approx([0.9, 0.0, math.tanh(1.0)], rel=1e-6)

    def test_every_tensor_is_standardised_by_itself(self):
        gradients = [torch.randn(4, 5), 100 * torch.randn(6) + 1000]
        gammas = [torch.zeros(4, 5), torch.zeros(6)]
        ops.raise_importance(gammas, gradients)
        for gamma, gradient in zip(gammas, gradients, strict=True):
            assert torch.equal(gamma, importance(gradient))

    @pytest.mark.parametrize("shape", [(3, 4, 3, 3), (1000,), (17, 31)])
    def test_agrees_with_the_formula_in_fp64(self, shape):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.3
        g = gradient.double()
        expected = torch.tanh((g - g.mean()) / g.std()).abs()
        # the result is rounded to fp32; statistics are in fp64
        torch.testing.assert_close(importance(gradient).double(), expected, rtol=2.0**-22, atol=2.0**-24)


class TestStep:
    """w <- w - lr (1 - gamma) g."""

    def test_by_hand(self):
        w, g = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])
        ops.soft_masked_sgd([w], [g], [torch.tensor([0.0, 0.5, 1.0])], rate(0.25))
        assert w.tolist() == [0.5, 0.75, 1.0]

    def test_full_importance_keeps_a_weight_to_the_last_bit_and_none_is_plain_sgd(self):
        w = torch.randn(40)
        g = torch.randn(40)
        frozen, free, plain = w.clone(), w.clone(), torch.nn.Parameter(w.clone())
        ops.soft_masked_sgd([frozen, free], [g, g], [torch.ones(40), torch.zeros(40)], rate(0.1))
        plain.grad = g
        torch.optim.SGD([plain], lr=0.1, foreach=False).step()
        assert torch.equal(frozen, w)
        # torch fuses the product into the sum or not, as the CPU has it: one rounding of the product apart
        torch.testing.assert_close(free, plain.detach(), rtol=2.0**-23, atol=2.0**-24)

    def test_one_number_slows_a_whole_tensor(self):
        w = torch.tensor([1.0, 2.0])
        ops.soft_masked_sgd([w], [torch.tensor([4.0, 8.0])], [torch.tensor(0.75)], rate(0.5))
        assert w.tolist() == [0.5, 1.0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, dtype):
        w, g, gamma = torch.randn(30).to(dtype), torch.randn(30).to(dtype), torch.rand(30)
        wide = torch.promote_types(dtype, torch.float32)
        expected = (w.to(wide) - 0.1 * ((1 - gamma) * g.to(wide))).to(dtype)
        ops.soft_masked_sgd([w], [g], [gamma], rate(0.1))
        tolerance = 2 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        torch.testing.assert_close(w, expected, rtol=tolerance, atol=tolerance)

    def test_any_layout(self):
        w = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
        g, gamma = torch.randn(4, 8, 3, 3), torch.rand(4, 8, 3, 3)
        flat = w.clone(memory_format=torch.contiguous_format)
        ops.soft_masked_sgd([w], [g], [gamma], rate(0.1))
        ops.soft_masked_sgd([flat], [g], [gamma], rate(0.1))
        assert torch.equal(w, flat)

    def test_autograd_knows_that_it_wrote(self):
        w = torch.nn.Parameter(torch.ones(3))
        loss = (w * w).sum()
        ops.soft_masked_sgd([w], [torch.ones(3)], [torch.zeros(3)], rate(0.1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_lists_that_do_not_fit_are_named(self):
        with pytest.raises(InputError, match="soft_masked_sgd got 1 weights, 0 gradients and 1 gammas"):
            ops.soft_masked_sgd([torch.ones(1)], [], [torch.ones(1)], rate(0.1))
        with pytest.raises(InputError, match=r"gammas\[0\] has shape \(2,\)"):
            ops.soft_masked_sgd([torch.ones(3)], [torch.ones(3)], [torch.ones(2)], rate(0.1))
        with pytest.raises(InputError, match=r"gradients\[0\] has shape \(2,\)"):
            ops.raise_importance([torch.ones(3)], [torch.ones(2)])


def test_steps_compile_without_a_break():
    def step(w, g, gamma, lr):
        ops.soft_masked_sgd([w], [g], [gamma], lr)
        ops.raise_importance([gamma], [g])
        return w

    w, g, gamma = torch.randn(9), torch.randn(9), torch.rand(9)
    eager = (w.clone(), g, gamma.clone(), rate(0.1))
    compiled = (w.clone(), g, gamma.clone(), rate(0.1))
    step(*eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[2], compiled[2])
