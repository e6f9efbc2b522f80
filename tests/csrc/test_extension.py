"""The C++ kernels against oracles of their own: NumPy, fp64 formulas, torch.optim and counts."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dwm_fast.ops import _build, _extension

MODES = range(6)
SHAPES = [(64, 3, 7, 7), (130, 33, 3, 3), (96, 64, 1, 1), (10, 513), (5,), (3, 2, 3, 3, 3), (1, 1, 1, 1)]
SEED, STEP, LAYERS = -123456789012345, 2**32 + 7, [3, 0, 9, 1, 2**31, 5, 8]
TIE = 2.0**-20


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers hold NaN, so that an element nobody wrote fails loudly."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def philox(first: int, count: int, layer: int, step: int, seed: int) -> np.ndarray:
    """Words of elements [first, first + count): Philox4x32-10 in NumPy."""
    elements = np.arange(first, first + count, dtype=np.uint64)
    block = elements // np.uint64(4)
    low = np.uint64(0xFFFFFFFF)
    c = [block & low, block >> np.uint64(32), np.full_like(block, layer), np.full_like(block, step & 0xFFFFFFFF)]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            p1 >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]),
            p1 & low,
            p0 >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]),
            p0 & low,
        ]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return np.stack(c, 1)[np.arange(count), elements % np.uint64(4)]


def uniforms(numel: int, layer: int, step: int) -> np.ndarray:
    words = philox(0, numel, layer, step, SEED)
    return np.minimum((words >> np.uint64(8)).astype(np.float64) * 2.0**-24 + 2.0**-25, 1 - 2.0**-24)


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if t.dim() in formats else t


def strided(t: Tensor) -> Tensor:
    """Every second element of a wider tensor: an order that no kernel knows."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7)
    wide[..., ::2] = t
    return wide[..., ::2]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "strided": strided,
}


def network(order: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    logits = [2 * torch.randn(shape, generator=generator) for shape in SHAPES]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [ORDERS[order](x) for x in logits], [ORDERS[order](w) for w in weights]


def state() -> Tensor:
    return torch.tensor([SEED, STEP])


THRESHOLDS = [0.25 * i for i in range(len(SHAPES))]


def sample(logits: list[Tensor], weights: list[Tensor], mode: int, tau: float = 1.0, dtype: torch.dtype | None = None,
           pack: bool = True, step_offset: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    return _extension.sample(
        logits, weights, state(), torch.tensor(tau), LAYERS, THRESHOLDS, mode, step_offset, dtype, pack
    )


def oracle(logit: Tensor, weight: Tensor, index: int, mode: int, tau: float) -> tuple[np.ndarray, ...]:
    """fp64: masked weight, keep bits, ties (where a bit may differ), mask value, slope d mask / d logit."""
    scores, w = logit.double().numpy(), weight.double().numpy()
    threshold, ties = THRESHOLDS[index], np.zeros(scores.shape, bool)
    if mode in (0, 1):
        u = uniforms(scores.size, LAYERS[index], STEP + 2).reshape(scores.shape)
        soft = 1 / (1 + np.exp(-(scores + np.log(u) - np.log1p(-u)) / tau))
        keep = u > 1 / (1 + np.exp(scores))
        ties = np.abs(u - 1 / (1 + np.exp(scores))) <= TIE
        value = keep.astype(float) if mode == 0 else soft
        return w * value, keep, ties, value, w * soft * (1 - soft) / tau
    if mode == 5:
        return w + threshold * scores, np.abs(scores) <= 1, ties, np.ones_like(w), np.full_like(w, threshold)
    value = {
        2: (scores >= 0).astype(float),
        3: (scores > threshold).astype(float),
        4: np.where(scores < 0, -1.0, np.where(scores > threshold, 1.0, 0.0)),
    }[mode]
    return w * value, value != 0, ties, value, w if mode in (3, 4) else np.zeros_like(w)


def offsets(numels: list[int]) -> list[int]:
    starts = [0]
    for n in numels:
        starts.append(starts[-1] + -(-n // 128) * 16)
    return starts


def bits_of(buffer: Tensor, numels: list[int]) -> list[np.ndarray]:
    flat = np.unpackbits(buffer.numpy(), bitorder="little")
    return [flat[8 * start : 8 * start + n].astype(bool) for start, n in zip(offsets(numels), numels, strict=False)]


def test_words_match_the_random123_known_answer() -> None:
    words = _extension.random_words(4, torch.tensor([0, 0]), layer=0)
    assert words.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("first", [0, 1, 6, 2**34 - 3])
@pytest.mark.parametrize("count", [1, 63, 2305])
def test_words_match_numpy(first: int, count: int) -> None:
    got = _extension.random_words(count, state(), layer=2**32 - 1, step_offset=4, first=first)
    assert np.array_equal(got.numpy().astype(np.uint64), philox(first, count, 2**32 - 1, STEP + 4, SEED))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("mode", MODES)
def test_sample_matches_fp64(mode: int, tau: float, order: str) -> None:
    logits, weights = network(order)
    masked, buffer, penalty = sample(logits, weights, mode, tau)
    for i, bits in enumerate(bits_of(buffer, [w.numel() for w in weights])):
        expected, keep, ties, _, _ = oracle(logits[i], weights[i], i, mode, tau)
        assert masked[i].stride() == torch.empty_like(weights[i]).stride()
        close = np.abs(masked[i].double().numpy() - expected) <= 4e-6 * (1 + np.abs(expected))
        assert np.all(close | (ties if mode == 0 else False))
        assert np.all((bits.reshape(keep.shape) == keep) | ties)
    numel = sum(x.numel() for x in logits)
    sums = {0: torch.sigmoid, 1: torch.sigmoid, 5: lambda x: torch.exp(-x.abs())}
    mean = sum(sums[mode](x.double()).sum().item() for x in logits) / numel if mode in sums else 0.0
    assert penalty.item() == pytest.approx(mean, rel=1e-6)
    assert buffer.numel() == offsets([w.numel() for w in weights])[-1]
    assert int(_extension.count(buffer, [w.numel() for w in weights]).sum()) == sum(
        b.sum() for b in bits_of(buffer, [w.numel() for w in weights])
    ), "padding bits are zero"


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_rounded_once(dtype: torch.dtype, out: torch.dtype) -> None:
    logits, weights = network("channels_last", dtype)
    masked, _, _ = sample(logits, weights, 1, 0.7, out)
    exact, _, _ = sample(logits, [w.float() for w in weights], 1, 0.7)
    for got, expected in zip(masked, exact, strict=True):
        assert got.dtype == out
        assert torch.equal(got, expected.to(out))


def test_sixteen_bit_edge_values_survive() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        kept = torch.full((2**16,), 5.0)
        one = _extension.sample([kept], [every], state(), torch.tensor(1.0), [0], [0.0], 2, 0, None, False)[0][0]
        assert torch.equal(one.isnan(), every.isnan())
        assert torch.equal(one[~every.isnan()], every[~every.isnan()])
        wide = _extension.sample([kept], [every], state(), torch.tensor(1.0), [0], [0.0], 2, 0, torch.float32, False)
        assert torch.equal(wide[0][0][~every.isnan()], every[~every.isnan()].float())
    generator = torch.Generator().manual_seed(2)
    floats = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    near = torch.randn(200_000, generator=generator) * 10.0 ** torch.randint(-9, 6, (200_000,), generator=generator)
    for values in (floats, near):
        for dtype in (torch.float16, torch.bfloat16):
            kept = torch.ones_like(values)
            got = _extension.sample([kept], [values], state(), torch.tensor(1.0), [0], [0.0], 2, 0, dtype, False)[0][0]
            assert torch.equal(got.nan_to_num(nan=3.0), values.to(dtype).nan_to_num(nan=3.0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_backward_matches_fp64(mode: int, order: str) -> None:
    logits, weights = network(order)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]  # contiguous whatever the weights are
    total, grad_penalty = sum(x.numel() for x in logits), 1000.0
    dlogits, dweights = _extension.sample_backward(
        grads, torch.tensor(grad_penalty), logits, weights, state(), torch.tensor(0.6), LAYERS, THRESHOLDS, mode, 2,
        True, True,
    )  # fmt: skip
    for i, (grad, logit) in enumerate(zip(grads, logits, strict=True)):
        _, _, ties, value, slope = oracle(logit, weights[i], i, mode, 0.6)
        keep = torch.sigmoid(logit.double()).numpy()
        push = {0: keep * (1 - keep), 1: keep * (1 - keep)}.get(mode, 0.0)
        if mode == 5:
            push = -np.sign(logit.double().numpy()) * np.exp(-logit.double().abs().numpy())
        expected = grad.double().numpy() * slope + grad_penalty * push / total
        assert np.allclose(dlogits[i].double().numpy(), expected, rtol=2e-5, atol=2e-6)
        close = np.isclose(dweights[i].double().numpy(), grad.double().numpy() * value, rtol=1e-5, atol=1e-6)
        assert np.all(close | (ties if mode == 0 else False))
        assert dlogits[i].stride() == torch.empty_like(logit).stride()
        assert dweights[i].stride() == torch.empty_like(weights[i]).stride()


def test_backward_returns_only_what_is_needed() -> None:
    logits, weights = network("contiguous")
    arguments = (weights, torch.tensor(0.0), logits, weights, state(), torch.tensor(1.0), LAYERS, THRESHOLDS, 0, 0)
    assert [len(part) for part in _extension.sample_backward(*arguments, True, False)] == [len(weights), 0]
    assert [len(part) for part in _extension.sample_backward(*arguments, False, True)] == [0, len(weights)]


@pytest.mark.parametrize("mode", [0, 1])
def test_masks_do_not_depend_on_order_threads_or_packing(mode: int) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for order, threads, pack in (("contiguous", 1, True), ("channels_last", 2, True), ("strided", 3, False)):
            torch.set_num_threads(threads)
            masked, bits, penalty = sample(*network(order), mode, 1.0, pack=pack)
            results.append(([m.contiguous() for m in masked], bits, penalty))
    finally:
        torch.set_num_threads(before)
    for masked, _, penalty in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masked, results[0][0], strict=True))
        assert penalty.item() == pytest.approx(results[0][2].item(), rel=1e-6)
    assert torch.equal(results[0][1], results[1][1])
    assert results[2][1].numel() == 0


def test_mixed_and_double_dtypes_take_the_reference() -> None:
    logits, weights = network("contiguous")
    mixed = [w.double() if i % 2 else w for i, w in enumerate(weights)]
    masked, _, _ = sample(logits, mixed, 0)
    assert [m.dtype for m in masked] == [w.dtype for w in mixed]


PACKABLE = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
            torch.float32, torch.float64, torch.complex64]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", PACKABLE)
def test_pack_unpack_and_apply_match_numpy(dtype: torch.dtype, order: str) -> None:
    generator = torch.Generator().manual_seed(4)
    masks = [ORDERS[order](-torch.randint(-1, 2, s, generator=generator).float()).to(dtype) for s in SHAPES]
    numels = [m.numel() for m in masks]
    buffer = _extension.pack(masks)
    expected = np.zeros(offsets(numels)[-1], np.uint8)
    for mask, start in zip(masks, offsets(numels), strict=False):
        packed = np.packbits((mask != 0).reshape(-1).numpy(), bitorder="little")
        expected[start : start + packed.size] = packed
    assert np.array_equal(buffer.numpy(), expected)
    for mask, flat in zip(masks, _extension.unpack(buffer, numels), strict=True):
        assert flat.dtype == torch.bool
        assert torch.equal(flat, (mask != 0).reshape(-1))
    weights = [ORDERS[order](torch.randn(s, generator=generator)).to(dtype) for s in SHAPES]
    for mask, weight, got in zip(masks, weights, _extension.apply(buffer, weights), strict=True):
        assert torch.equal(got, torch.where(mask != 0, weight, torch.zeros((), dtype=dtype)))
        assert got.stride() == torch.empty_like(weight).stride()
        if dtype.is_floating_point:
            assert not torch.signbit(got[mask == 0]).any()


def test_set_operations_match_numpy() -> None:
    generator = torch.Generator().manual_seed(5)
    numels = [1, 127, 128, 129, 0, 700_001]
    masks = [[torch.rand(n, generator=generator) < p for n in numels] for p in (0.3, 0.6)]
    a, b = (_extension.pack(m) for m in masks)
    one, two = ([m.numpy() for m in ms] for ms in masks)
    pairs = list(zip(one, two, strict=True))
    assert _extension.count(a, numels).tolist() == [x.sum() for x in one]
    assert _extension.overlap(a, b, numels).tolist() == [[(x & y).sum(), (x | y).sum()] for x, y in pairs]
    x, y = a.numpy(), b.numpy()
    for op, expected in {"and": x & y, "or": x | y, "xor": x ^ y, "andnot": x & ~y}.items():
        assert np.array_equal(_extension.combine(a, b, op).numpy(), expected)


def test_empty_lists_and_empty_tensors_are_fine() -> None:
    assert _extension.pack([]).numel() == 0
    assert _extension.pack([torch.zeros(0)]).numel() == 0
    assert _extension.unpack(torch.zeros(0, dtype=torch.uint8), [0])[0].numel() == 0
    empty = torch.zeros(0, 3)
    masked, bits, penalty = _extension.sample(
        [empty], [empty], state(), torch.tensor(1.0), [0], [0.0], 0, 0, None, True
    )
    assert masked[0].shape == (0, 3)
    assert bits.numel() == 0
    assert penalty.item() == 0.0


def test_wrong_lengths_are_refused_before_memory_is_touched() -> None:
    with pytest.raises(RuntimeError, match="bits have 16 bytes, expected 32"):
        _extension.unpack(torch.zeros(16, dtype=torch.uint8), [129])
    with pytest.raises(RuntimeError, match="another number of tensors"):
        torch.ops.dwm_fast_cpu.apply(torch.zeros(16, dtype=torch.uint8), [torch.ones(3)], [])


@pytest.mark.parametrize("width", [1, 7, 33, 512, 2049])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_linear_from_bits_matches_fp64(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(2, rows, width, generator=generator), torch.randn(19, width, generator=generator)
    mask, bias = torch.rand(19, width, generator=generator) < 0.5, torch.randn(19, generator=generator)
    bits = _extension.pack([mask])
    for part in (x[:1], x[0], x[0, 0]):
        got = _extension.linear_packed(part, weight, bits, bias, "none")
        exact = torch.nn.functional.linear(part.double(), weight.double() * mask, bias.double())
        budget = 1e-6 * (part.double().abs() @ (weight.double() * mask).abs().t() + 1)
        assert got.shape == exact.shape
        assert ((got - exact).abs() <= budget).all()


def free_run(optimizer: str, order: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Three steps by the kernels and by torch.optim; returns ours, theirs and the keep masks."""
    generator = torch.Generator().manual_seed(7)
    weights = network(order, dtype)[1]
    if order == "strided":
        weights = [w.contiguous() for w in weights]
    start = [w.clone() for w in weights]
    masks = [torch.rand(s, generator=generator) < 0.5 for s in SHAPES]
    bits, ranks = _extension.pack(masks), torch.zeros(0, dtype=torch.int64)
    states = [[torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in range(2)]
    lr, steps = torch.tensor(0.01, dtype=torch.float64), torch.zeros(len(weights))
    theirs = [torch.nn.Parameter(w.double().clone()) for w in weights]
    if optimizer == "adamw":
        torch_optimizer: torch.optim.Optimizer = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    else:
        torch_optimizer = torch.optim.SGD(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(3):
        steps += 1
        grads = [torch.randn(s, generator=generator) for s in SHAPES]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.double()
        torch_optimizer.step()
        poisoned = [g.masked_fill(m, float("nan")) for g, m in zip(grads, masks, strict=True)]
        if optimizer == "adamw":
            _extension.frozen_adamw(
                weights, poisoned, *states, bits, ranks, steps, lr, 0.9, 0.999, 1e-8, 0.1, True, False
            )
        else:
            _extension.frozen_sgd(
                weights, poisoned, states[0], bits, ranks, steps, lr, 0.9, 0.0, 0.1, True, False, False
            )
    for weight, before, mask, *moments in zip(weights, start, masks, *states, strict=True):
        assert torch.equal(weight[mask], before[mask]), "kept weights are bit-identical"
        assert all((m[mask] == 0).all() for m in moments), "state of kept lanes is never written"
    return weights, [p.detach() for p in theirs], masks


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_steps_match_torch_on_free_lanes(optimizer: str, order: str) -> None:
    for ours, theirs, mask in zip(*free_run(optimizer, order, torch.float32), strict=True):
        assert torch.allclose(ours.double()[~mask], theirs[~mask], rtol=1e-5, atol=1e-6)


def test_frozen_steps_round_low_precision_weights() -> None:
    for ours, theirs, mask in zip(*free_run("adamw", "channels_last", torch.bfloat16), strict=True):
        assert torch.allclose(ours.double()[~mask], theirs[~mask], rtol=0, atol=0.05)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", [0, 3, 5])
def test_mask_adam_is_backward_then_adam(mode: int, order: str) -> None:
    logits, weights = network(order)
    generator = torch.Generator().manual_seed(8)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]
    total, coefficient = sum(x.numel() for x in logits), 5.0
    dlogits, _ = _extension.sample_backward(
        grads, torch.tensor(coefficient), logits, weights, state(), torch.tensor(0.7), LAYERS, THRESHOLDS, mode, 1,
        True, False,
    )  # fmt: skip
    theirs = [torch.nn.Parameter(x.double()) for x in logits]
    for parameter, gradient in zip(theirs, dlogits, strict=True):
        parameter.grad = gradient.double()
    torch.optim.Adam(theirs, lr=0.1).step()
    moments = [[torch.zeros_like(x) for x in logits] for _ in range(2)]
    if order == "strided":
        moments = [[strided(m) for m in part] for part in moments]
    _extension.mask_adam(
        logits, weights, grads, *moments, state(), torch.tensor(0.7), LAYERS, THRESHOLDS, mode, 1,
        torch.tensor(coefficient / total), torch.ones(len(logits)), torch.tensor(0.1, dtype=torch.float64), 0.9,
        0.999, 1e-8, 0.0, True,
    )  # fmt: skip
    for ours, expected, gradient in zip(logits, theirs, dlogits, strict=True):
        large = gradient.abs() > 1e-6  # where eps in the denominator does not decide
        assert torch.allclose(ours.double()[large], expected.detach()[large], rtol=1e-4, atol=1e-5)


def test_compiler_vectorised_the_lane_loops() -> None:
    """Every lane loop of the AVX2 table computes on 32-byte registers; what the compiler found, read from its code."""
    if platform.machine() not in ("x86_64", "AMD64"):
        assert torch.ops.dwm_fast_cpu.instruction_set() == "baseline"
        return
    objdump = shutil.which("objdump")
    assert objdump is not None, "objdump comes with the compiler: apt install binutils"
    path = str(_build.build(cuda=False))
    listing = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", path], capture_output=True, text=True).stdout
    functions = re.findall(r"<(?:\w+ )?dwm::avx2::(\w+)[^\n]*>:\n(.*?)\n\n", listing, re.S)
    loops = {name: body for name, body in functions if name.endswith(("_run", "philox_blocks", "store_free_f32"))}
    assert {"sample_run", "chain_run", "adamw_run", "adam_run", "sgd_run", "apply_run", "philox_blocks"} <= set(loops)
    assert not [name for name, body in loops.items() if "%ymm" not in body]
