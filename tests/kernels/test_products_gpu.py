"""What only a device can show of one-pass products: compiled kernels are right, repeat, and live in graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import Mode
from dwm_fast.ops.ways import use_way

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPES = [(1, 4096, 4096), (16, 4096, 4096), (64, 1000, 2048), (5, 130, 100), (1, 33, 1027), (200, 768, 768)]


@pytest.fixture(autouse=True)
def _triton():
    with dwm_fast.use_backend("triton"):
        yield


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def integers(*shape, seed=0, dtype=torch.bfloat16):
    """-1, 0 and 1: sums of some hundred products are exact in bf16 too, however they are split."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, device="cuda").to(dtype)


def rule(mode=Mode.GUMBEL_HARD, step=0):
    return torch.tensor([42, step], device="cuda"), torch.tensor(0.7, device="cuda"), 3, 0.25, int(mode), 1


def assert_within_budget(y, exact, low):
    bound = 2 * ((low.double() - exact).abs().max() + torch.finfo(y.dtype).eps * exact.abs().max())
    assert y.isfinite().all()
    assert (y.double() - exact).abs().max() <= bound


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_from_bits_stay_within_the_budget_in_both_directions(m, n, k):
    weight, keep = randn(n, k, seed=1, dtype=torch.bfloat16), randn(n, k, seed=2) > 0
    bits, masked = ops.pack([keep]), torch.where(keep, weight, 0)
    x, grad = randn(m, k, seed=3, dtype=torch.bfloat16), randn(m, n, seed=4, dtype=torch.bfloat16)
    with use_way("one-pass"):
        y = ops.linear_packed(x, weight, bits)
        dx = torch.ops.dwm_fast.linear_packed_input_grad(grad, weight, bits)
    assert_within_budget(y, x.double() @ masked.double().t(), x @ masked.t())
    assert_within_budget(dx, grad.double() @ masked.double(), grad @ masked)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_fp32_products_follow_torch_s_tf32_setting(m, precision):
    before = torch.get_float32_matmul_precision()
    weight, keep, x = randn(512, 1024, seed=1), randn(512, 1024, seed=2) > 0, randn(m, 1024, seed=3)
    masked = torch.where(keep, weight, 0)
    try:
        torch.set_float32_matmul_precision(precision)
        with use_way("one-pass"):
            y = ops.linear_packed(x, weight, ops.pack([keep]))
        low = x @ masked.t()
    finally:
        torch.set_float32_matmul_precision(before)
    exact = x.double() @ masked.double().t()
    # A vendor may keep fp32 where TF32 is allowed, for one row: TF32 has 10 bits behind the point.
    step = 2.0**-11 if precision == "high" else 0.0
    slack = step * (x.abs().double() @ masked.abs().double().t()).max()
    bound = 2 * ((low.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max() + slack)
    assert (y.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("mode", [Mode.GUMBEL_HARD, Mode.KEEP, Mode.TERNARY])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 512, 768), (5, 130, 102)])
def test_a_drawn_mask_is_the_staged_one_bit_for_bit(mode, m, n, k):
    weight, logits = integers(n, k, seed=1), randn(n, k, seed=2)
    x, grad = integers(m, k, seed=3), integers(m, n, seed=4)
    results = []
    for way in ("one-pass", "staged"):
        with use_way(way):
            dl, dw = torch.ops.dwm_fast.linear_mask_grad(grad, x, weight, logits, *rule(mode), True, True)
            results.append(
                [
                    torch.ops.dwm_fast.linear(x, weight, logits, None, *rule(mode)),
                    torch.ops.dwm_fast.linear_input_grad(grad, weight, logits, *rule(mode)),
                    dw,
                    dl,
                ]
            )
    for one, staged in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(one, staged)
    torch.testing.assert_close(results[0][3], results[1][3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_exact_on_integers(last, groups):
    fmt = torch.channels_last if last else torch.contiguous_format
    x = integers(3, 32, 15, 14, seed=1).contiguous(memory_format=fmt)
    weight = integers(48, 32 // groups, 3, 3, seed=2).contiguous(memory_format=fmt)
    logits = randn(*weight.shape, seed=3)
    geometry = ([2, 1], [1, 2], [1, 2], groups)
    results = []
    for way in ("one-pass", "staged"):
        with use_way(way):
            y = torch.ops.dwm_fast.conv2d_packed(x, weight, ops.pack([logits > 0]), None, *geometry)
            grad = integers(*y.shape, seed=4)
            given = (grad, x, weight, logits, *rule(), *geometry)
            results.append(
                [
                    y,
                    torch.ops.dwm_fast.conv2d(x, weight, logits, None, *rule(), *geometry),
                    torch.ops.dwm_fast.conv2d_input_grad(*given),
                ]
            )
            dl, _ = torch.ops.dwm_fast.conv2d_mask_grad(*given, True, False)
            results[-1].append(dl)
    for one, staged in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(one, staged)
        assert one.stride() == staged.stride()
    # The staged gradient is rounded to bf16 before the chain rule.
    torch.testing.assert_close(results[0][3], results[1][3], rtol=2.0**-7, atol=1e-6)


def test_every_run_gives_the_same_bits():
    weight, logits = randn(4096, 4096, dtype=torch.bfloat16), randn(4096, 4096, seed=1)
    x = randn(16, 4096, seed=2, dtype=torch.bfloat16)
    with use_way("one-pass"):
        first = torch.ops.dwm_fast.linear(x, weight, logits, None, *rule())
        assert all(torch.equal(torch.ops.dwm_fast.linear(x, weight, logits, None, *rule()), first) for _ in range(10))


def test_weights_beyond_two_to_the_31_elements_are_read_where_they_lie():
    n, k = 70_000, 32_768
    weight = torch.ones(n, k, device="cuda", dtype=torch.bfloat16)
    bits = torch.randint(0, 256, (ops.packed_nbytes(n * k),), device="cuda", dtype=torch.uint8)
    x = torch.ones(1, k, device="cuda", dtype=torch.bfloat16)
    with use_way("one-pass"):
        y = ops.linear_packed(x, weight, bits).float()
    rows = bits.view(n, k // 8)
    for row in (0, 65_535, 65_536, n - 1):
        ones = sum(((rows[row] >> shift) & 1).sum() for shift in range(8))
        assert y[0, row] == ones.to(torch.bfloat16).float()


def test_replays_of_a_graph_draw_new_masks_and_nothing_waits():
    torch.manual_seed(0)
    layer = dwm_fast.MaskedLinear(256, 128, kind=dwm_fast.GumbelSigmoid(init=0.0), seed=1, device="cuda")
    layer.weight.fill_(1.0)
    x = torch.eye(256, device="cuda")[:16].requires_grad_(True)

    def step():
        layer.mask_logits.grad = None
        y = layer(x)
        y.square().sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)
    assert layer.mask_logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (dwm_fast.MaskedLinear(96, 40, seed=1, device="cuda"), randn(8, 96)),
        lambda: (dwm_fast.MaskedConv2d(8, 16, 3, padding="same", seed=1, device="cuda"), randn(2, 8, 9, 9)),
        lambda: (dwm_fast.MaskedConv2d(8, 16, 1, padding_mode="circular", seed=1, device="cuda"), randn(2, 8, 9, 9)),
    ],
)
def test_a_layer_alone_draws_in_its_product_what_it_would_draw_before(make):
    layer, x = make()
    assert layer.draws_in_product()
    before = copy.deepcopy(layer)
    got = layer(x)
    weight = before.masked_weight()
    expected = F.linear(x, weight, layer.bias) if x.dim() == 2 else before._conv_forward(x, weight, layer.bias)
    # Convolutions may use TF32: 96 products of unit size, each off by 2^-11 of itself at most.
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert layer.rng_state.tolist() == before.rng_state.tolist() == [1, 1]
    got.sum().backward()
    assert layer.mask_logits.grad.any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_network_gives_what_the_masked_one_gives(compiled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10))
    masked = dwm_fast.mask_model(net.cuda().bfloat16(), dwm_fast.Threshold()).eval()
    with torch.no_grad():
        for p in masked.mask_parameters():
            p.normal_()
    packed = dwm_fast.pack(masked)
    run = torch.compile(packed, fullgraph=True, dynamic=True) if compiled else packed
    for batch in (1, 16, 100):
        x = randn(batch, 3, 12, 12, seed=batch, dtype=torch.bfloat16)
        with torch.no_grad():
            # Three layers, each rounded to bf16 (2^-9 of the largest entry) in both networks.
            torch.testing.assert_close(run(x), masked(x), rtol=2e-2, atol=2e-2)
            if not compiled:
                with use_way("staged"):
                    assert torch.equal(packed(x), masked(x))


def test_the_rule_says_what_it_does_on_this_device():
    layer = dwm_fast.pack(
        dwm_fast.mask_model(nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16), dwm_fast.Threshold())
    )
    explanation = dwm_fast.explain(layer, (8, 4096))
    assert explanation.forward.way in ops.WAYS
    assert "M=8" in explanation.forward.why or "measured" in explanation.forward.why
