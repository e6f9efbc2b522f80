"""What the cases count, and that the list of them holds together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dwm_fast._bench import (
    bench_bank,
    bench_conv2d,
    bench_files,
    bench_linear,
    bench_sample,
    bench_step,
    bench_update,
    rivals,
)
from dwm_fast._bench.cases import ENTRIES, SHARED, chosen
from dwm_fast._bench.context import Context
from dwm_fast._bench.measure import Budget, measure
from dwm_fast._bench.results import rows_of
from tests.benchmarks.test_results import FACTS

ROOT = Path(__file__).resolve().parents[2]
CPU = Context(torch.device("cpu"), quick=True)
N = 1280


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_sampling_counts_each_tensor_once() -> None:
    logits = torch.zeros(N)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        weight = torch.zeros(N, dtype=dtype)
        forward = _bytes(logits, weight, weight)
        assert bench_sample.forward_bytes(N, size, pack=False) == forward
        assert bench_sample.forward_bytes(N, size, pack=True) == forward + N // 8
        assert bench_sample.backward_bytes(N, size) == _bytes(weight, weight, logits, logits)


def test_updates_count_what_is_read_and_written() -> None:
    weight = torch.zeros(N)
    assert 2 * _bytes(weight, weight, weight) + _bytes(weight) == bench_update.ADAMW_BYTES * N
    assert 2 * _bytes(weight, weight) + _bytes(weight) == bench_update.SGD_BYTES * N
    assert 2 * _bytes(weight, weight, weight) + _bytes(weight, weight) == bench_update.MASK_ADAM_BYTES * N


def test_products_count_operands_bits_and_result() -> None:
    x, weight, y = torch.zeros(16, 64), torch.zeros(32, 64), torch.zeros(16, 32)
    assert bench_linear.packed_bytes(16, 32, 64, 4) == _bytes(x, weight, y) + weight.numel() // 8
    assert bench_bank.mixed_bytes(4, 4, 32, 64, 4) == _bytes(x, weight, y) + 4 * weight.numel() // 8


def test_the_eager_rival_draws_bernoulli_of_sigmoid_with_the_soft_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.full((200_000,), 1.0, requires_grad=True)
    mask = rivals.gumbel_mask(logits)
    assert set(mask.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    expected = torch.sigmoid(torch.tensor(1.0))
    assert abs(float(mask.detach().mean() - expected)) < 5 * float((expected * (1 - expected) / 200_000) ** 0.5)
    mask.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.min()) > 0
    assert float(logits.grad.max()) <= 0.25


def test_the_packing_rivals_undo_each_other() -> None:
    mask = torch.rand(5, 13) < 0.5
    assert torch.equal(rivals.unpacked(rivals.packed(mask), mask.shape), mask)


def test_names_are_unique_per_device_and_every_area_has_tests() -> None:
    for device in ("cpu", "cuda"):
        names = [e.name for e in ENTRIES if device in e.devices]
        assert len(names) == len(set(names))
    areas = {area for e in ENTRIES for area in (*e.areas, *SHARED)}
    missing = {area for area in areas if not list((ROOT / "tests").glob(f"*/test_{area}.py"))}
    assert not missing


def test_without_optional_packages_all_cases_but_those_of_coding_are_there() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('constriction', 'zstandard', 'hypothesis', 'huggingface_hub'))\n"
        "import torch\n"
        "from dwm_fast._bench import bench_files\n"
        "from dwm_fast._bench.cases import ENTRIES\n"
        "from dwm_fast._bench.context import Context\n"
        "bench_files.switching(Context(torch.device('cpu'), quick=True), domains=1)\n"
        "print([entry.name for entry in ENTRIES if entry.needs])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['bank-coding', 'bank-decoding']"


def test_only_picks_by_the_beginning_of_names_and_quick_leaves_some_out() -> None:
    linear = {f"linear-{rows}" for rows in (1, 4, 16, 64)}
    assert {e.name for e in chosen(CPU, "linear, bits-p")} == {*linear, "bits-pack"}
    full = Context(torch.device("cpu"))
    assert {e.name for e in chosen(CPU)} < {e.name for e in chosen(full)}
    assert chosen(CPU, "nothing") == []
    rest = chosen(CPU, "linear, bits-p", "linear-1,bits")
    assert {e.name for e in rest} == {"linear-4", "linear-64"}


def test_cases_with_ways_of_torch_compile_are_marked_so_that_they_are_measured_last() -> None:
    full = Context(torch.device("cpu"))
    for entry in chosen(full, "sample,conv2d,bits-and"):
        assert entry.compiled == any(way.compiled for way in entry.build(full).ways), entry.name
    assert [e.name for e in ENTRIES if e.name.startswith("step-masks") and not e.compiled] == []


def test_a_real_case_passes_its_gate_and_is_timed() -> None:
    case = bench_conv2d.packed(CPU, rows=1, channels=8, pixels=4)
    found = measure(case, CPU.device, Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup=1))
    assert not found.missing
    assert set(found.timings) == {w.name for w in case.ways}


def test_inference_from_bits_is_that_of_the_merged_network_for_the_rival_too() -> None:
    case = bench_step.packed_inference(CPU, "mlp4096", 2, 0)
    case.gate()
    outputs = [way.make()() for way in case.ways]
    assert len(outputs) == 3
    assert not torch.equal(outputs[0], torch.zeros_like(outputs[0]))


def test_sizes_are_those_of_what_the_ways_return() -> None:
    case = bench_files.coding(CPU, kept=0.2)
    raw = next(way for way in case.ways if way.name == "ours, raw")
    found = measure(replace(case, ways=[raw]), CPU.device, Budget(0.0, min_rounds=1, max_rounds=1, warmup=1))
    rows = rows_of(case, found, {}, FACTS, "abc")
    assert [(r.metric, r.unit) for r in rows] == [("time", "ms"), ("size", "bytes")]
    assert 1_395_864 < rows[1].p50 < 1_395_864 + (16 << 10)


def test_the_ways_of_a_union_compute_the_same_and_count_fewer_bytes_than_their_rivals() -> None:
    case = bench_bank.union(CPU, domains=2)
    case.gate()
    of = {way.name: way for way in case.ways if way.name != "one dense product, no masks"}
    first, *rest = (way.make()() for way in of.values())
    for found in rest:  # fp32 sums of 2048 terms in several orders
        torch.testing.assert_close(found, first, rtol=0.0, atol=2048 * 2.0**-24 * float(first.abs().max()))
    counted = [of[f"ours{more}"].moved for more in ("", ", kept weights of each", ", all weights and bits")]
    assert counted == sorted(counted)
