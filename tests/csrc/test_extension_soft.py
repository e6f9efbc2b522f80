"""The C++ kernels of KSM and SPG: the reference's bits where arithmetic is the same, fp64 formulas elsewhere."""

import pytest
import torch

import dwm_fast
from dwm_fast.ops.kernel_soft import kernel_soft_reference
from dwm_fast.ops.soft_mask import soft_masked_sgd_reference

SHAPES = [
    (64, 3, 7, 7),
    (13, 600, 3, 3),
    (96, 64, 1, 1),
    (10, 513),
    (4, 5, 2),
    (0, 3, 3, 3),
    (3, 2, 3, 3, 3),
    (1, 1, 1, 1),
]
STATE = torch.tensor([5, 0])


class _Cpp:
    """torch.ops.dwm_fast, computed by the backend 'cpp'."""

    def __getattr__(self, name):
        def call(*args):
            with dwm_fast.use_backend("cpp"):
                return getattr(torch.ops.dwm_fast, name)(*args)

        return call


extension = _Cpp()


pytestmark = pytest.mark.usefixtures("poison")


def channels_last(tensor):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def tensors(seed, like=lambda t: t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [like(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def reals(low):
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(*s[:2], *[1] * (len(s) - 2), generator=generator) * 0.03 + low for s in SHAPES]


@pytest.mark.parametrize("like", [lambda t: t, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("low", [-0.01, 0.006, -0.04], ids=["mixed", "all kept", "all dropped"])
def test_masked_weights_are_the_references_bits(like, low):
    weights = tensors(1, like)
    masked = extension.kernel_soft(reals(low), weights, STATE, list(range(len(SHAPES))), 5e-3, False, 0, None)
    expected = kernel_soft_reference(reals(low), weights, STATE, list(range(len(SHAPES))), 5e-3, False, 0, None)
    for mine, theirs, weight in zip(masked, expected, weights, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("like", [lambda t: t, channels_last], ids=["contiguous", "channels_last"])
def test_gradients_are_the_formula(like):
    weights, grads, r = tensors(1, like), tensors(2), reals(-0.01)
    found = extension.kernel_soft_backward(grads, r, weights, STATE, list(range(len(SHAPES))), 5e-3, False, 0)
    for d, g, w, real in zip(found, grads, weights, r, strict=True):
        products = (g.double() * w.double()).flatten(2).sum(2) if w.dim() > 2 else g.double() * w.double()
        size = (g.double() * w.double()).abs().flatten(2).sum(2) if w.dim() > 2 else products.abs()
        s = torch.sigmoid(12 * (real.double() - 5e-3)).view(products.shape)
        # up to 49 products summed in fp32; slope and exponential good to 2**-20
        budget = 3 * (64 * 2.0**-24 * size + 2.0**-20 * products.abs()) + 1e-12
        assert ((d.double().view(products.shape) - 12 * s * (1 - s) * products).abs() <= budget).all()
        assert d.shape == real.shape


def test_the_range_of_equal_reals_gives_zero():
    ones = torch.ones(3, 4, 3, 3)
    masked = extension.kernel_soft([torch.full((3, 4, 1, 1), 1e-3)], [ones], STATE, [0], 5e-3, False, 0, None)
    assert torch.equal(masked[0], torch.zeros_like(ones))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("like", [lambda t: t, channels_last], ids=["contiguous", "channels_last"])
def test_the_soft_masked_step_is_the_references_bits(like, dtype):
    weights, grads = tensors(1, like, dtype), tensors(2, dtype=dtype)
    gammas = [torch.rand(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SHAPES)]
    gammas[3] = torch.tensor(0.25)
    expected = [w.clone() for w in weights]
    lr = torch.tensor(0.1, dtype=torch.float64)
    extension.soft_masked_sgd(weights, grads, gammas, lr)
    soft_masked_sgd_reference(expected, grads, gammas, lr)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        masked = extension.kernel_soft(reals(-0.01), tensors(1), STATE, list(range(len(SHAPES))), 5e-3, False, 0, None)
    finally:
        torch.set_num_threads(before)
    expected = kernel_soft_reference(reals(-0.01), tensors(1), STATE, list(range(len(SHAPES))), 5e-3, False, 0, None)
    assert all(torch.equal(a, b) for a, b in zip(masked, expected, strict=True))


def test_what_the_kernels_do_not_know_goes_to_the_reference():
    weight, real = torch.randn(5, 4, 3, 2).transpose(2, 3), torch.rand(5, 4, 1, 1) * 0.02 - 5e-3
    for noisy, dtype, w in ((True, None, weight), (False, torch.bfloat16, weight), (False, None, weight.double())):
        arguments = ([real], [w], STATE, [0], 5e-3, noisy, 0, dtype)
        mine, theirs = extension.kernel_soft(*arguments)[0], kernel_soft_reference(*arguments)[0]
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    stepped = torch.randn(6, 4, dtype=torch.float64)
    expected = stepped.clone()
    lr = torch.tensor(0.1, dtype=torch.float64)
    for call, target in ((extension.soft_masked_sgd, stepped), (soft_masked_sgd_reference, expected)):
        call([target], [torch.ones(6, 4).double()], [torch.full((6, 4), 0.5)], lr)
    assert torch.equal(stepped, expected)
