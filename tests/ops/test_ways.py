"""The rule of ways is deterministic: forced, measured, or by theory, in that order, and it says why."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import BackendUnavailable, InputError
from dwm_fast.ops import measured
from dwm_fast.ops.problem import PACKED_ROWS, Problem
from dwm_fast.ops.ways import CPU_ROWS, ONE_PASS, STAGED, choose, one_pass, use_way

NAME = "NVIDIA Test 1"


def problem(op: str = "linear_packed", dtype: torch.dtype = torch.bfloat16, m: int = 16, **more) -> Problem:
    fields = {"device": "cuda", "n": 4096, "k": 4096, "name": NAME, **more}
    return Problem(op, dtype=dtype, m=m, **fields)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Write a table of the test device: record(rows, **other fields)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(rows, **fields):
        path = tmp_path / "dwm_fast" / "dispatch-nvidia-test-1.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"format": measured.TABLE_FORMAT, "rows": rows, **fields}))
        measured.forget_tables()
        return path

    measured.forget_tables()
    yield write
    measured.forget_tables()


def row(one_pass_us: float, staged_us: float, m: int = 16, n: int = 4096, k: int = 4096, **fields):
    times = {"one_pass_us": one_pass_us, "staged_us": staged_us}
    return {"op": "linear_packed", "dtype": "bfloat16", "taps": 1, "m": m, "n": n, "k": k, **times, **fields}


def test_without_a_table_one_pass_is_taken_where_one_tile_covers_the_rows(record):
    assert choose(problem(m=PACKED_ROWS)).way == ONE_PASS
    assert choose(problem(m=PACKED_ROWS + 1)).way == STAGED
    assert choose(problem("linear", m=PACKED_ROWS)).way == STAGED
    assert choose(problem("linear", m=1)).way == ONE_PASS
    assert choose(problem("linear_mask_grad", m=PACKED_ROWS)).way == ONE_PASS
    assert choose(problem(dtype=torch.float32, m=PACKED_ROWS)).way == STAGED
    assert choose(problem(dtype=torch.float32, m=PACKED_ROWS, tf32=True)).way == ONE_PASS
    assert "no table" in choose(problem()).why


def test_convolutions_are_staged_until_a_table_says_otherwise(record):
    conv = problem("conv2d_packed", m=49, k=9 * 64, taps=9)
    assert choose(conv).way == STAGED
    record([row(1.0, 2.0, op="conv2d_packed", m=49, k=9 * 64, taps=9)])
    assert choose(conv).way == ONE_PASS
    depthwise = problem("conv2d_packed", m=49, k=9, taps=9, groups=64)
    assert "depthwise" in choose(depthwise).why


def test_the_nearest_measured_shape_decides_within_a_factor_of_two(record):
    record([row(9.0, 8.0, m=16), row(8.0, 9.0, m=64), row(1.0, 9.0, m=64, n=8192, k=8192)])
    assert choose(problem(m=16)).way == STAGED
    assert "one pass 9.0 us, staged 8.0 us" in choose(problem(m=20)).why
    assert choose(problem(m=100)).way == ONE_PASS
    assert "no table" in choose(problem(m=129)).why
    assert "no table" in choose(problem(m=16, dtype=torch.float16)).why
    assert "no table" in choose(problem(m=16, name="another")).why


def test_equal_times_are_one_pass_and_ties_of_distance_go_to_the_first_row(record):
    record([row(5.0, 5.0, n=2048), row(6.0, 5.0, n=8192)])
    assert choose(problem(m=16)).way == ONE_PASS


BROKEN = ["", "[]", '{"format": "other"}', '{"format": "dwm-fast dispatch 1", "rows": [{}]}']


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_table_is_one_warning_and_no_table(record, content):
    record([row(9.0, 8.0)]).write_text(content)
    with pytest.warns(RuntimeWarning, match=r"dispatch-nvidia-test-1\.json is not used"):
        assert "no table" in choose(problem()).why
    assert "no table" in choose(problem()).why


def test_a_way_can_be_forced_and_blocks_nest():
    with use_way("staged"):
        assert not one_pass(problem(m=1))
        with use_way("one-pass"):
            assert one_pass(problem(m=10_000))
            with use_way(None):
                assert not one_pass(problem(m=10_000))
        assert not one_pass(problem(m=1))
    with pytest.raises(InputError, match="use_way got 'fast'; expected one of one-pass, staged"), use_way("fast"):
        pass


def test_one_pass_cannot_be_forced_on_what_it_cannot_compute():
    with use_way("one-pass"), pytest.raises(BackendUnavailable, match=r"takes float32, not torch\.bfloat16"):
        one_pass(problem(device="cpu", name=""))
    with use_way("one-pass"), pytest.raises(BackendUnavailable, match="linear cannot: on a CPU"):
        one_pass(problem("linear", torch.float32, device="cpu", name=""))


@pytest.mark.parametrize("rows", [1, CPU_ROWS, CPU_ROWS + 1, 40])
def test_both_ways_of_the_cpu_agree_exactly_on_integers(rows):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-3, 4, s, generator=generator).float() for s in [(rows, 70), (9, 70)])
    bits = ops.pack([weight > 0])
    expected = x @ weight.clamp(min=0).t()
    for way in (None, "one-pass", "staged"):
        with use_way(way), dwm_fast.use_backend("cpp"):
            assert torch.equal(ops.linear_packed(x, weight, bits), expected)
            assert torch.equal(ops.linear_packed(x, weight, bits, activation="relu"), expected.relu())


def test_of_two_rows_as_near_the_one_whose_tiles_cover_the_problem_decides(record):
    record([row(1.0, 9.0, m=16), row(1.0, 5.0, m=64)])
    assert "staged 5.0 us" in choose(problem(m=32)).why
    record([row(1.0, 5.0, m=64), row(1.0, 9.0, m=16)])
    assert "staged 5.0 us" in choose(problem(m=32)).why


def test_a_gpu_reads_kept_weights_of_two_bytes_whose_rows_are_whole_words(record):
    def way(**fields: object) -> str:
        return choose(dataclasses.replace(problem("linear_kept"), **fields)).way

    assert way() == way(dtype=torch.float16) == way(m=PACKED_ROWS) == ONE_PASS
    for other in ({"dtype": torch.float32}, {"k": 4090}, {"m": PACKED_ROWS + 1}):
        assert way(**other) == STAGED
        with use_way(ONE_PASS), pytest.raises(BackendUnavailable, match="kernel of kept weights"):
            way(**other)
