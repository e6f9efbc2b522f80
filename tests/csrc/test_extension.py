"""The C++ kernels against oracles of their own: NumPy, fp64 formulas, torch.optim and counts."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dwm_fast
from dwm_fast.ops import _build, _extension, update
from dwm_fast.ops.update import free_ranks

MODES = range(6)
SHAPES = [(64, 3, 7, 7), (130, 33, 3, 3), (96, 64, 1, 1), (10, 513), (5,), (3, 2, 3, 3, 3), (1, 1, 1, 1)]
SEED, STEP, LAYERS = -123456789012345, 2**32 + 7, [3, 0, 9, 1, 2**31, 5, 8]
TIE = 2.0**-20

pytestmark = pytest.mark.usefixtures("poison")


class _Cpp:
    """torch.ops.dwm_fast, computed by the backend 'cpp'."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            with dwm_fast.use_backend("cpp"):
                return getattr(torch.ops.dwm_fast, name)(*args)

        return call


cpp = _Cpp()


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


def sample(
    logits: list[Tensor],
    weights: list[Tensor],
    mode: int,
    tau: float = 1.0,
    dtype: torch.dtype | None = None,
    pack: bool = True,
    step_offset: int = 2,
) -> tuple[list[Tensor], Tensor, Tensor]:
    return cpp.sample(logits, weights, state(), torch.tensor(tau), LAYERS, THRESHOLDS, mode, step_offset, dtype, pack)


def rule(oracle: Any, logit: Tensor, weight: Tensor, index: int, mode: int, tau: float) -> tuple[np.ndarray, ...]:
    """fp64: masked weight, keep bits, ties (where a bit may differ), mask value, slope d mask / d logit."""
    scores, w = logit.double().numpy(), weight.double().numpy()
    threshold, ties = THRESHOLDS[index], np.zeros(scores.shape, bool)
    if mode in (0, 1):
        u = oracle.uniform(0, scores.size, SEED, STEP + 2, LAYERS[index]).reshape(scores.shape)
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
def test_words_match_numpy(oracle: Any, first: int, count: int) -> None:
    got = _extension.random_words(count, state(), layer=2**32 - 1, step_offset=4, first=first)
    elements = np.arange(first, first + count, dtype=np.uint64)
    assert np.array_equal(got.numpy().astype(np.uint64), oracle.words(elements, SEED, STEP + 4, 2**32 - 1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("mode", MODES)
def test_sample_matches_fp64(oracle: Any, mode: int, tau: float, order: str) -> None:
    logits, weights = network(order)
    masked, buffer, penalty = sample(logits, weights, mode, tau)
    for i, bits in enumerate(bits_of(buffer, [w.numel() for w in weights])):
        expected, keep, ties, _, _ = rule(oracle, logits[i], weights[i], i, mode, tau)
        assert masked[i].stride() == torch.empty_like(weights[i]).stride()
        close = np.abs(masked[i].double().numpy() - expected) <= 4e-6 * (1 + np.abs(expected))
        assert np.all(close | (ties if mode == 0 else False))
        assert np.all((bits.reshape(keep.shape) == keep) | ties)
    numel = sum(x.numel() for x in logits)
    sums = {0: torch.sigmoid, 1: torch.sigmoid, 5: lambda x: torch.exp(-x.abs())}
    mean = sum(sums[mode](x.double()).sum().item() for x in logits) / numel if mode in sums else 0.0
    assert penalty.item() == pytest.approx(mean, rel=1e-6)
    assert buffer.numel() == offsets([w.numel() for w in weights])[-1]
    assert int(cpp.count(buffer, [w.numel() for w in weights]).sum()) == sum(
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
        one = cpp.sample([kept], [every], state(), torch.tensor(1.0), [0], [0.0], 2, 0, None, False)[0][0]
        assert torch.equal(one.isnan(), every.isnan())
        assert torch.equal(one[~every.isnan()], every[~every.isnan()])
        wide = cpp.sample([kept], [every], state(), torch.tensor(1.0), [0], [0.0], 2, 0, torch.float32, False)
        assert torch.equal(wide[0][0][~every.isnan()], every[~every.isnan()].float())
    generator = torch.Generator().manual_seed(2)
    floats = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    near = torch.randn(200_000, generator=generator) * 10.0 ** torch.randint(-9, 6, (200_000,), generator=generator)
    for values in (floats, near):
        for dtype in (torch.float16, torch.bfloat16):
            kept = torch.ones_like(values)
            got = cpp.sample([kept], [values], state(), torch.tensor(1.0), [0], [0.0], 2, 0, dtype, False)[0][0]
            assert torch.equal(got.nan_to_num(nan=3.0), values.to(dtype).nan_to_num(nan=3.0))


def test_infinite_logits_keep_or_drop_for_good(infinite_logits: Callable[[str], None]) -> None:
    with dwm_fast.use_backend("cpp"):
        infinite_logits("cpu")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_backward_matches_fp64(oracle: Any, mode: int, order: str) -> None:
    logits, weights = network(order)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(s, generator=generator) for s in SHAPES]  # contiguous whatever the weights are
    total, grad_penalty = sum(x.numel() for x in logits), 1000.0
    dlogits, dweights = cpp.sample_backward(
        grads,
        torch.tensor(grad_penalty),
        logits,
        weights,
        state(),
        torch.tensor(0.6),
        LAYERS,
        THRESHOLDS,
        mode,
        2,
        True,
        True,
    )
    for i, (grad, logit) in enumerate(zip(grads, logits, strict=True)):
        _, _, ties, value, slope = rule(oracle, logit, weights[i], i, mode, 0.6)
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


def test_the_penalty_has_the_same_bits_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(700_000, generator=generator)  # pieces of one chunk or of two, by the threads
    found: list[list[float]] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            parts = [logits[64 * i :] for i in range(40)]
            rest = (state(), torch.tensor(1.0), [0], [0.0], 0, 0, None, False)
            found.append([cpp.sample([part], [part], *rest)[2].item() for part in parts])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_backward_returns_only_what_is_needed() -> None:
    logits, weights = network("contiguous")
    arguments = (weights, torch.tensor(0.0), logits, weights, state(), torch.tensor(1.0), LAYERS, THRESHOLDS, 0, 0)
    assert [len(part) for part in cpp.sample_backward(*arguments, True, False)] == [len(weights), 0]
    assert [len(part) for part in cpp.sample_backward(*arguments, False, True)] == [0, len(weights)]


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


PACKABLE = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", PACKABLE)
def test_pack_unpack_and_apply_match_numpy(dtype: torch.dtype, order: str) -> None:
    generator = torch.Generator().manual_seed(4)
    masks = [ORDERS[order](-torch.randint(-1, 2, s, generator=generator).float()).to(dtype) for s in SHAPES]
    numels = [m.numel() for m in masks]
    buffer = cpp.pack(masks)
    expected = np.zeros(offsets(numels)[-1], np.uint8)
    for mask, start in zip(masks, offsets(numels), strict=False):
        packed = np.packbits((mask != 0).reshape(-1).numpy(), bitorder="little")
        expected[start : start + packed.size] = packed
    assert np.array_equal(buffer.numpy(), expected)
    for mask, flat in zip(masks, cpp.unpack(buffer, numels), strict=True):
        assert flat.dtype == torch.bool
        assert torch.equal(flat, (mask != 0).reshape(-1))
    weights = [ORDERS[order](torch.randn(s, generator=generator)).to(dtype) for s in SHAPES]
    for mask, weight, got in zip(masks, weights, cpp.apply(buffer, weights), strict=True):
        assert torch.equal(got, torch.where(mask != 0, weight, torch.zeros((), dtype=dtype)))
        assert got.stride() == torch.empty_like(weight).stride()
        if dtype.is_floating_point:
            assert not torch.signbit(got[mask == 0]).any()


def test_set_operations_match_numpy() -> None:
    generator = torch.Generator().manual_seed(5)
    numels = [1, 127, 128, 129, 0, 700_001]
    masks = [[torch.rand(n, generator=generator) < p for n in numels] for p in (0.3, 0.6)]
    a, b = (cpp.pack(m) for m in masks)
    one, two = ([m.numpy() for m in ms] for ms in masks)
    pairs = list(zip(one, two, strict=True))
    assert cpp.count(a, numels).tolist() == [x.sum() for x in one]
    assert cpp.overlap(a, b, numels).tolist() == [[(x & y).sum(), (x | y).sum()] for x, y in pairs]


def test_empty_lists_and_empty_tensors_are_fine() -> None:
    assert cpp.pack([]).numel() == 0
    assert cpp.pack([torch.zeros(0)]).numel() == 0
    assert cpp.unpack(torch.zeros(0, dtype=torch.uint8), [0])[0].numel() == 0
    empty = torch.zeros(0, 3)
    masked, bits, penalty = cpp.sample([empty], [empty], state(), torch.tensor(1.0), [0], [0.0], 0, 0, None, True)
    assert masked[0].shape == (0, 3)
    assert bits.numel() == 0
    assert penalty.item() == 0.0


def test_wrong_lengths_are_refused_before_memory_is_touched() -> None:
    with pytest.raises(RuntimeError, match="bits have 16 bytes, expected 32"):
        cpp.unpack(torch.zeros(16, dtype=torch.uint8), [129])
    with pytest.raises(RuntimeError, match="another number of tensors"):
        torch.ops.dwm_fast_cpu.apply(torch.zeros(16, dtype=torch.uint8), [torch.ones(3)], [])


ROWS = [1, 3, 8, 9]


def masked_product(width: int, seed: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight (19, width), two masks, and a bias for each."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(19, width, generator=generator)
    masks = torch.rand(2, 19, width, generator=generator) < 0.5
    return weight, masks, torch.randn(2, 19, generator=generator), torch.randn(40, width, generator=generator)


@pytest.mark.parametrize("width", [1, 7, 33, 512, 5003])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_from_bits_matches_fp64(rows: int, width: int) -> None:
    weight, masks, biases, x = masked_product(width)
    masked, bits, x = weight.double() * masks[0], cpp.pack([masks[0]]), x[: 2 * rows].view(2, rows, width)
    for part in (x[:1], x[0], x[0, 0]):
        got = cpp.linear_packed(part, weight, bits, biases[0], "none")
        exact = torch.nn.functional.linear(part.double(), masked, biases[0].double())
        # Each lane adds ceil(width / 16) rounded products, four levels add the lanes and one the bias.
        terms = -(-width // 16) + 6
        size = part.double().abs() @ masked.abs().t() + biases[0].double().abs()
        assert got.shape == exact.shape
        assert ((got - exact).abs() <= terms * 2.0**-24 / (1 - terms * 2.0**-24) * size).all()


@pytest.mark.parametrize("width", [5, 128, 5003])
def test_a_row_from_bits_is_the_same_bit_for_bit_in_any_company(width: int) -> None:
    weight, masks, biases, x = masked_product(width)
    bits = torch.stack([cpp.pack([mask]) for mask in masks])
    expected = []
    for row in range(7):
        domain = int(row >= 2)
        expected.append(cpp.linear_packed(x[row], weight, bits[domain], biases[domain], "none"))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = cpp.bank_linear(x[:7], weight, bits, biases, torch.tensor([0, 2, 7]), 7)
            assert torch.equal(y, torch.stack(expected))
    finally:
        torch.set_num_threads(before)
    shared = cpp.bank_linear(x[:7], weight, bits, biases[0], torch.tensor([0, 2, 7]), 7)
    assert torch.equal(shared[:2], y[:2])
    assert not torch.equal(shared[2:], y[2:])


def test_integers_multiply_exactly_from_bits() -> None:
    """Sums of at most 5003 products of magnitude 9 stay below 2^24, so every order of adding gives the same."""
    generator = torch.Generator().manual_seed(9)
    weight, x = (torch.randint(-3, 4, (n, 5003), generator=generator).float() for n in (33, 60))
    masks = torch.rand(4, 33, 5003, generator=generator) < 0.6
    bits = torch.stack([cpp.pack([mask]) for mask in masks])
    wide = torch.full((4, bits.shape[1] + 48), 255, dtype=torch.uint8)
    wide[:, 16:-32] = bits  # rows of bits may lie apart
    counts = [1, 0, 10, 4]  # ten are too many to be read from bits
    ends = torch.tensor([0, *counts]).cumsum(0)
    y = cpp.bank_linear(x.view(15, 4, 5003), weight, wide[:, 16:-32], None, ends, 15)
    for domain, count in enumerate(counts):
        part = slice(int(ends[domain]), int(ends[domain]) + count)
        assert torch.equal(y[part], torch.nn.functional.linear(x.view(15, 4, 5003)[part], weight * masks[domain]))


def test_infinite_inputs_meet_masked_weights_as_in_a_product() -> None:
    weight, masks, _, x = masked_product(33)
    x[0, 5], x[1, 7] = torch.inf, torch.nan
    got = cpp.linear_packed(x[:3], weight, cpp.pack([masks[0]]), None, "none")
    expected = torch.nn.functional.linear(x[:3], torch.where(masks[0], weight, 0.0))
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("parts", [[0, 0, 5], [0, -1, 2], [2, 0, 1], [-1, 0, 1], [0, 3, 2], [0, 0]])
def test_parts_outside_of_the_matrices_are_refused_before_memory_is_touched(parts: list[int]) -> None:
    weight, masks, _, x = masked_product(33)
    bits = torch.stack([cpp.pack([mask]) for mask in masks])
    with pytest.raises(RuntimeError, match=r"dwm_fast: (a part lies outside|parts come as)"):
        torch.ops.dwm_fast_cpu.linear_packed(x[:4], weight, bits, None, parts, torch.empty(4, 19))


def free_run(optimizer: str, order: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Three steps by the kernels and by torch.optim; returns ours, theirs and the keep masks."""
    generator = torch.Generator().manual_seed(7)
    weights = network(order, dtype)[1]
    if order == "strided":
        weights = [w.contiguous() for w in weights]
    start = [w.clone() for w in weights]
    masks = [torch.rand(s, generator=generator) < 0.5 for s in SHAPES]
    bits, ranks = cpp.pack(masks), torch.zeros(0, dtype=torch.int64)
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
            cpp.frozen_adamw(weights, poisoned, *states, bits, ranks, steps, lr, 0.9, 0.999, 1e-8, 0.1, True, False)
        else:
            cpp.frozen_sgd(weights, poisoned, states[0], bits, ranks, steps, lr, 0.9, 0.0, 0.1, True, False, False)
    for weight, before, mask, *moments in zip(weights, start, masks, *states, strict=True):
        assert torch.equal(weight[mask], before[mask]), "kept weights are bit-identical"
        assert all((m[mask] == 0).all() for m in moments), "state of kept lanes is never written"
    return weights, [p.detach() for p in theirs], masks


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_steps_match_torch_on_free_lanes(optimizer: str, order: str) -> None:
    for ours, theirs, mask in zip(*free_run(optimizer, order, torch.float32), strict=True):
        assert torch.allclose(ours.double()[~mask], theirs[~mask], rtol=1e-5, atol=1e-6)


class Compact:
    """A network whose weights take the same steps with dense state and with compact state."""

    def __init__(self, order: str, dtype: torch.dtype, fraction: float = 0.5) -> None:
        self.generator = torch.Generator().manual_seed(17)
        weights = [w.contiguous() if order == "strided" else w for w in network(order, dtype)[1]]
        self.masks = [torch.rand(s, generator=self.generator) < fraction for s in SHAPES]
        self.bits, numels = cpp.pack(self.masks), [w.numel() for w in weights]
        self.ranks = free_ranks(self.bits, numels)
        self.weights = {True: [w.clone() for w in weights], False: weights}
        free = [int((~mask).sum()) for mask in self.masks]
        wide = torch.promote_types(dtype, torch.float32)
        self.states = {
            False: [[torch.zeros_like(w, dtype=wide) for w in weights] for _ in range(2)],
            True: [[torch.zeros(n, dtype=wide) for n in free] for _ in range(2)],
        }
        self.lr, self.steps = torch.tensor(0.01, dtype=torch.float64), torch.zeros(len(weights))

    def step(self, optimizer: str, grads: list[Tensor], kernels: bool = True) -> None:
        self.steps += 1
        for compact, weights in self.weights.items():
            ranks = self.ranks if compact else self.ranks[:0]
            first, second = self.states[compact]
            where = cpp if kernels else update
            suffix = "" if kernels else "_reference"
            if optimizer == "adamw":
                getattr(where, f"frozen_adamw{suffix}")(
                    weights,
                    grads,
                    first,
                    second,
                    self.bits,
                    ranks,
                    self.steps,
                    self.lr,
                    0.9,
                    0.999,
                    1e-8,
                    0.1,
                    True,
                    False,
                )
            else:
                getattr(where, f"frozen_sgd{suffix}")(
                    weights, grads, first, self.bits, ranks, self.steps, self.lr, 0.9, 0.3, 0.1, False, False, False
                )

    def gradients(self) -> list[Tensor]:
        grads = [torch.randn(s, generator=self.generator) for s in SHAPES]
        return [g.masked_fill(m, float("nan")) for g, m in zip(grads, self.masks, strict=True)]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_compact_state_takes_the_same_steps_bit_for_bit(
    optimizer: str, order: str, dtype: torch.dtype, fraction: float
) -> None:
    net = Compact(order, dtype, fraction)
    for _ in range(3):
        net.step(optimizer, net.gradients())
    for compact, dense in zip(net.weights[True], net.weights[False], strict=True):
        assert torch.equal(compact, dense)
        assert compact.stride() == dense.stride()
    for compact_states, dense_states in zip(net.states[True], net.states[False], strict=True):
        for compact, dense, mask in zip(compact_states, dense_states, net.masks, strict=True):
            assert torch.equal(compact, dense[~mask])
            assert not dense[mask].any()


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_compact_state_follows_the_reference_step_by_step(optimizer: str, order: str) -> None:
    ours, theirs, exact = (Compact(order, dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    for _ in range(5):
        grads = ours.gradients()
        ours.step(optimizer, grads)
        theirs.step(optimizer, grads, kernels=False)
        exact.step(optimizer, [g.double() for g in grads], kernels=False)
        for pick in (lambda net: net.states[True][0], lambda net: net.weights[True]):
            for mine, other, true in zip(pick(ours), pick(theirs), pick(exact), strict=True):
                error = (other.double() - true).abs().max() + torch.finfo(torch.float32).eps * true.abs().max()
                assert ((mine.double() - true).abs() <= 2 * error).all()


def test_compact_state_of_another_length_is_refused_before_memory_is_touched() -> None:
    net = Compact("contiguous", torch.float32)
    net.states[True][1][2] = net.states[True][1][2][1:]
    with pytest.raises(RuntimeError, match="compact state has another length"):
        net.step("adamw", net.gradients())
    wrong = net.ranks.clone()
    wrong[0] += 1
    for ranks, message in ((wrong, "do not count the free lanes"), (wrong[1:], "one int64 per 16 bytes")):
        net.ranks = ranks
        with pytest.raises(RuntimeError, match=message):
            net.step("sgd", net.gradients())


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
    dlogits, _ = cpp.sample_backward(
        grads,
        torch.tensor(coefficient),
        logits,
        weights,
        state(),
        torch.tensor(0.7),
        LAYERS,
        THRESHOLDS,
        mode,
        1,
        True,
        False,
    )
    theirs = [torch.nn.Parameter(x.double()) for x in logits]
    for parameter, gradient in zip(theirs, dlogits, strict=True):
        parameter.grad = gradient.double()
    torch.optim.Adam(theirs, lr=0.1).step()
    moments = [[torch.zeros_like(x) for x in logits] for _ in range(2)]
    if order == "strided":
        moments = [[strided(m) for m in part] for part in moments]
    cpp.mask_adam(
        logits,
        weights,
        grads,
        *moments,
        state(),
        torch.tensor(0.7),
        LAYERS,
        THRESHOLDS,
        mode,
        1,
        torch.tensor(coefficient / total),
        torch.ones(len(logits)),
        torch.tensor(0.1, dtype=torch.float64),
        0.9,
        0.999,
        1e-8,
        0.0,
        True,
    )
    for ours, expected, gradient in zip(logits, theirs, dlogits, strict=True):
        large = gradient.abs() > 1e-6  # where eps in the denominator does not decide
        assert torch.allclose(ours.double()[large], expected.detach()[large], rtol=1e-4, atol=1e-5)


def test_compiler_vectorised_the_lane_loops() -> None:
    """Every lane loop of the AVX2 table computes on 32-byte registers, kept weights with AVX-512 on 64-byte ones.

    What the compiler found, read from its code; whether this processor can run it does not matter.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        assert torch.ops.dwm_fast_cpu.instruction_set() == "baseline"
        return
    objdump = shutil.which("objdump")
    assert objdump is not None, "objdump comes with the compiler: apt install binutils"
    path = str(_build.build(cuda=False))
    listing = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", path], capture_output=True, text=True).stdout
    functions = re.findall(r"<(?:\w+ )?dwm::avx2::(\w+)[^\n]*>:\n(.*?)\n\n", listing, re.S)
    loops = {name: body for name, body in functions if name.endswith(("_run", "philox_blocks", "store_free_f32"))}
    wanted = {"sample_run", "chain_run", "adamw_run", "adam_run", "sgd_run", "apply_run", "dot_run", "philox_blocks"}
    wanted |= {"coded_adam_run", "encode_bf16_run", "encode_fixed_run", "encode_blocks_run", "decode_blocks_run"}
    assert wanted <= set(loops)
    assert not [name for name, body in loops.items() if "%ymm" not in body]
    assert not [name for name, body in functions if name in wanted and re.search(r"\bcall .*<dwm::", body)]
    wide = re.findall(r"<(?:\w+ )?dwm::avx512::(kept_rows_run|panel_tile)[^\n]*>:\n(.*?)\n\n", listing, re.S)
    assert {name for name, _ in wide} == {"kept_rows_run", "panel_tile"}
    assert not [name for name, body in wide if "%zmm" not in body]
    assert not re.search(
        r"vp?expand\w+ +[-x0-9a-f]*\(", listing
    )  # the form that reads memory is slow on some processors
