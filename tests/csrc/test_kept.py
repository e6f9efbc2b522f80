"""linear_kept in C++: fp64's product within the budget of its sums, and the same bits whoever computes."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dwm_fast import ops

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(
    n: int, k: int, kept: float, dtype: torch.dtype, seed: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight with NaN under dropped bits, the masked weight in fp64, bits, values, row starts."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    mask = torch.rand(n, k, generator=generator) < kept
    if n > 2:
        mask[1], mask[2] = False, True
    bits = ops.pack([mask])
    values, starts = ops.keep_values(weight.masked_fill(~mask, torch.nan), bits)
    return weight, torch.where(mask, weight, 0).double(), bits, values, starts


shapes = st.tuples(st.sampled_from([1, 2, 4, 5, 9, 16, 37]), st.integers(1, 40), st.integers(1, 700))


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from(DTYPES), st.booleans())
def test_the_product_is_fp64s_within_the_budget_of_its_sums(shape, kept, dtype, with_bias):
    m, n, k = shape
    _, masked, bits, values, starts = problem(n, k, kept, dtype)
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(m, 2 * k, generator=generator)
    x, bias = wide[:, ::2], torch.randn(n, generator=generator) if with_bias else None
    with ops.use_backend("cpp"), ops.use_way("one-pass"):
        got = ops.linear_kept(x, values, starts, bits, bias)
    shift = torch.zeros(n).double() if bias is None else bias.double()
    # Each lane adds ceil(k / 16) rounded products, four levels add the lanes and one the bias.
    terms = -(-k // 16) + 6
    size = x.double().abs() @ masked.abs().t() + shift.abs()
    error = (got - (x.double() @ masked.t() + shift)).abs()
    assert (error <= terms * 2.0**-24 / (1 - terms * 2.0**-24) * size).all()


def sums_of_pairs(x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel's fp32 sums of bf16 x and bf16 values, before they are rounded to x's dtype."""
    y = torch.empty(x.shape[0], starts.shape[0] - 1)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32))
    torch.ops.dwm_fast_cpu.linear_kept(padded, values, starts, bits, bias, x.shape[1], y)
    return y


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_sums_of_bf16_are_fp64s_within_the_budget_of_fused_sums(shape, kept, with_bias):
    m, n, k = shape
    _, masked, bits, values, starts = problem(n, k, kept, torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(m, k, generator=generator).bfloat16()
    bias = torch.randn(n, generator=generator).bfloat16() if with_bias else None
    shift = torch.zeros(n).double() if bias is None else bias.double()
    got = sums_of_pairs(x, values, starts, bits, None if bias is None else bias.float())
    # A lane adds two exact products a step of 32 columns, each in one rounding; four levels add lanes, one the bias.
    terms = 2 * -(-k // 32) + 5
    size = x.double().abs() @ masked.abs().t() + shift.abs()
    error = (got - (x.double() @ masked.t() + shift)).abs()
    assert (error <= terms * 2.0**-24 / (1 - terms * 2.0**-24) * size).all()
    with ops.use_backend("cpp"), ops.use_way("one-pass"):
        y = ops.linear_kept(x, values, starts, bits, bias)
    assert torch.equal(y, got.bfloat16())


def sum_of(weights: dict[int, float], x: float | dict[int, float] = 1.0) -> float:
    """The sum of 64 columns, most of them zero."""
    w, rows = torch.zeros(1, 64), torch.full((1, 64), x) if isinstance(x, float) else torch.zeros(1, 64)
    for row, given_values in ((w, weights), (rows, x if isinstance(x, dict) else {})):
        for column, value in given_values.items():
            row[0, column] = value
    bits = ops.pack([w != 0])
    return float(sums_of_pairs(rows.bfloat16(), *ops.keep_values(w.bfloat16(), bits), bits))


def test_of_two_bf16_columns_the_odd_one_is_added_first_in_one_rounding():
    assert sum_of({1: 2.0**24, 33: -(2.0**24), 32: 1.0}) == 1.0  # 2^24 + 1 is not a number of fp32
    assert sum_of({33: 2.0**24, 32: 1.0, 1: -(2.0**24)}) == 1.0
    assert sum_of({1: 2.0**24, 32: -(2.0**24), 33: 1.0}) == 0.0
    # 2^128 alone is infinite.
    assert sum_of({0: 2.0**127, 1: -(2.0**127)}, x={0: 2.0, 1: 1.0}) == 2.0**127


def test_a_bf16_factor_that_is_denormal_counts_as_zero_and_so_does_a_sum():
    small, tiny = 2.0**-126, 2.0**-133
    assert sum_of({0: tiny}, x=2.0**100) == 0.0
    assert sum_of({0: 2.0**100}, x=tiny) == 0.0
    assert sum_of({0: small}) == small
    assert sum_of({0: -small, 1: 1.5 * small}) == 0.0
    assert sum_of({0: 2.0**-60, 1: small, 2: 2.0**-61}, x={0: 2.0**-60, 1: 1.0, 2: 2.0**-60}) == small + 1.5 * 2.0**-120
    assert sum_of({0: 2.0**-65}, x=2.0**-65) == 0.0
    # 24 bits hold 2^-126 - 2^-150, which is denormal; 2^-126 - 2^-152 they round to 2^-126, which is not.
    assert sum_of({1: small, 0: -(2.0**-75)}, x={1: 1.0, 0: 2.0**-75}) == 0.0
    assert sum_of({1: small, 0: -(2.0**-76)}, x={1: 1.0, 0: 2.0**-76}) == small


@pytest.mark.parametrize("m", [1, 3, 4, 6, 33])
@pytest.mark.parametrize("k", [5, 512, 4101])
@pytest.mark.parametrize("kept", [0.2, 0.5])
def test_kept_weights_give_the_bits_that_all_weights_give_on_any_number_of_threads(m, k, kept):
    weight, _, bits, values, starts = problem(101, k, kept, torch.float32)
    x, before = torch.randn(m, k, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with ops.use_backend("cpp"), ops.use_way("one-pass"):
                y = ops.linear_kept(x, values, starts, bits)
                assert torch.equal(y, ops.linear_packed(x, weight, bits))
                assert torch.equal(y[:1], ops.linear_kept(x[:1], values, starts, bits))
    finally:
        torch.set_num_threads(before)


PROGRAM = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
import test_kept
from test_kept import DTYPES, problem, sums_of_pairs
from dwm_fast import ops
with ops.use_backend("cpp"), ops.use_way("one-pass"):
    found = hashlib.sha256()
    test_kept.test_of_two_bf16_columns_the_odd_one_is_added_first_in_one_rounding()
    test_kept.test_a_bf16_factor_that_is_denormal_counts_as_zero_and_so_does_a_sum()
    for dtype in DTYPES:
        for k, kept in ((33, 0.4), (1100, 0.4), (37, 0.1), (2100, 0.2)):
            _, _, bits, values, starts = problem(50, k, kept, dtype)
            for m in (1, 2, 3, 4, 9, 40, 79):
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
                found.update(ops.linear_kept(x, values, starts, bits).numpy().tobytes())
    for k in (33, 64, 1100):
        generator = torch.Generator().manual_seed(k)
        any16 = lambda *shape: torch.randint(-2**15, 2**15, shape, generator=generator).short().view(torch.bfloat16)
        near = lambda *shape: (torch.randn(shape, generator=generator) * 2.0**-61).bfloat16()
        for draw in (any16, near):
            mask = torch.rand(50, k, generator=generator) < 0.4
            bits = ops.pack([mask])
            weight = draw(50, k) if draw is near else draw(50, k).nan_to_num(1.0)
            kept = ops.keep_values(weight.masked_fill(~mask, torch.nan), bits)
            for m in (1, 2, 3, 4, 9, 40):
                y = sums_of_pairs(draw(m, k), *kept, bits)
                found.update(y.nan_to_num(0.5).numpy().tobytes())
                found.update(str(y.isnan().sum()).encode())
    for k in (33, 1100):
        weight, _, bits, _, _ = problem(50, k, 0.3, torch.float32)
        both = torch.stack([bits, problem(50, k, 0.3, torch.float32, seed=4)[2]])
        x = torch.randn(11, k, generator=torch.Generator().manual_seed(k))
        y = ops.bank_linear_union(x, *ops.keep_union(weight, both), both, None, torch.tensor([0, 4, 11]), 11)
        assert torch.equal(y, ops.bank_linear(x, weight, both, None, torch.tensor([0, 4, 11]), 11))
        found.update(y.numpy().tobytes())
assert float(torch.tensor(2.0**-126) * 0.5) == 2.0**-127, "the caller's settings are put back"
print(torch.ops.dwm_fast_cpu.instruction_set(), found.hexdigest())
"""


def widest_sets():
    """What runs when baseline, avx2, avx512 and nothing is asked for, by what the kernel says of this processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    avx2 = "avx2" if {"avx2", "fma", "popcnt"} <= flags else "baseline"
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2", "avx512_vpopcntdq"} <= flags
    avx512 = "avx512" if wide and avx2 == "avx2" else avx2
    return ["baseline", avx2, avx512, "avx512bf16" if avx512 == "avx512" and "avx512_bf16" in flags else avx512]


def test_instruction_sets_give_the_same_bits():
    folder = os.path.dirname(__file__)
    told = []
    for asked in ("baseline", "avx2", "avx512", None):
        setting = {} if asked is None else {"DWM_FAST_ISA": asked}
        environment = {k: v for k, v in os.environ.items() if k != "DWM_FAST_ISA"} | setting
        command = [sys.executable, "-c", PROGRAM.format(folder=folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split())
    assert [name for name, _ in told] == widest_sets()
    assert len({bits for _, bits in told}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_value_is_widened_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    weight = every[~every.isnan()].clone()
    bits = ops.pack([torch.ones(weight.numel(), 1)])
    values, starts = ops.keep_values(weight.unsqueeze(1), bits)
    with ops.use_backend("cpp"), ops.use_way("one-pass"):
        y = ops.linear_kept(torch.ones(1, 1), values, starts, bits)[0]
    assert torch.equal(y, weight.float())
    with ops.use_backend("cpp"), ops.use_way("one-pass"):
        nan = ops.keep_values(torch.full((1, 1), torch.nan, dtype=dtype), ops.pack([torch.ones(1, 1)]))
        assert ops.linear_kept(torch.ones(1, 1), *nan, ops.pack([torch.ones(1, 1)])).isnan().all()


@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("m", "kept"), [(1, 0.5), (8, 0.5), (16, 0.1)])
def test_infinite_inputs_meet_dropped_weights_as_in_a_product(m, kept, infinite):
    _, masked, bits, values, starts = problem(19, 33, kept, torch.float32)
    x = torch.randn(m, 33)
    x[m // 2, 5] = infinite
    with ops.use_backend("cpp"), ops.use_way("one-pass"):
        got = ops.linear_kept(x, values, starts, bits)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, masked.float()), equal_nan=True)


@pytest.mark.parametrize("k", [5, 24, 33, 1030])
@pytest.mark.parametrize("m", [1, 8, 18])
@pytest.mark.parametrize("every", [1, 5])
def test_what_is_not_finite_in_a_row_stays_in_its_row(m, k, every):
    weight, mask = torch.ones(4, k), torch.arange(k).expand(4, k) % every == 0
    weight[2] = torch.nan
    bits = ops.pack([mask])
    with ops.use_backend("cpp"), ops.use_way("one-pass"):
        y = ops.linear_kept(torch.ones(m, k), *ops.keep_values(weight, bits), bits)
    assert y[:, 2].isnan().all()
    assert torch.equal(y[:, [0, 1, 3]], torch.full((m, 3), float(mask[0].sum())))


def test_tensors_that_do_not_fit_each_other_are_refused_before_values_are_read():
    _, _, bits, values, starts = problem(19, 32, 0.5, torch.float32)
    x, out = torch.ones(2, 32), torch.empty(2, 19)
    kernel = torch.ops.dwm_fast_cpu.linear_kept
    other = ops.pack([torch.ones(19, 32)])
    with pytest.raises(RuntimeError, match="different numbers of kept weights"):
        kernel(x, values, starts, other, None, 32, out)
    for wrong in (starts + 1, starts.flip(0), starts * 2, starts[:0]):
        with pytest.raises(RuntimeError, match="dwm_fast: row_starts must"):
            kernel(x, values, wrong, bits, None, 32, out)
    with pytest.raises(RuntimeError, match="row_starts must rise from 0 and end before the padding"):
        kernel(x, values[: int(starts[-1])], starts, bits, None, 32, out)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        kernel(x[:, :16].contiguous(), values, starts, bits, None, 32, out)
    with pytest.raises(RuntimeError, match="bits have"):
        kernel(x, values, starts, bits[:16], None, 32, out)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        kernel(x, values.double(), starts, bits, None, 32, out)
