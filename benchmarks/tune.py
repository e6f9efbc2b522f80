"""Measure which way and which tiles are fastest for masked products on this GPU, and remember it.

python -m benchmarks.tune [--seconds 120] [--out FOLDER]            in a checkout
python -m dwm_fast._bench.tune [--seconds 120] [--out FOLDER]       where the package is installed
python -m benchmarks.tune --prepare [--jobs 8]                      compile every candidate, many at a time, and end

Every shape of the grid is timed staged and in one pass with each candidate's tiles, interleaved, and written after
each shape to dispatch-<device>.json: in the user's cache, where the library reads it from then on, and in FOLDER. Put
that file into benchmarks/results/ of a checkout to ship it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dwm_fast
from dwm_fast._files import cache_folder, write_atomic
from dwm_fast.ops import ways
from dwm_fast.ops.measured import TABLE_FORMAT, dtype_name, forget_tables, read_table, slug
from dwm_fast.ops.problem import PACKED_ROWS, Problem

from .machine import device_name, facts
from .measure import Budget, Case, Run, Way, measure, require

_BUDGET = Budget(seconds=0.3, min_rounds=7, max_rounds=30)
_ROWS = (1, 16, 64, 4, 256, 1024, 8192)
_KEY = ("op", "dtype", "taps", "m", "n", "k")
_LINEAR = ((4096, 4096), (3072, 768), (768, 3072), (2304, 768), (768, 768), (1000, 2048), (512, 512))
"""(N, K): a 4096-wide linear, ViT-B/16, heads of ResNets."""
_POINTWISE = ((256, 64), (64, 256), (512, 128), (128, 512), (1024, 256), (256, 1024), (2048, 512), (512, 2048))
"""(N, K) of ResNet-50's 1x1 convolutions."""
_WINDOWS = ((64, 56), (128, 28), (256, 14), (512, 7))
"""(channels, pixels a side) of ResNet's 3x3 convolutions."""


@dataclass(frozen=True)
class Shape:
    """One product of the grid: m rows (images, where taps is 9) of n outputs and k inputs, of each domain."""

    op: str
    m: int
    n: int
    k: int
    taps: int = 1
    side: int = 1
    domains: int = 1


def grid() -> list[Shape]:
    """What is measured, in order of importance."""
    packed = [Shape("linear_packed", m, n, k) for n, k in _LINEAR for m in _ROWS]
    packed[3:3] = [Shape("bank_linear", m, 4096, 4096, domains=16) for m in (4, 1)]
    narrow = [Shape("linear_packed", m, n, k) for n, k in _POINTWISE for m in (49, 196, 3136)]
    rest = [
        Shape(op, m, n, k)
        for op in ("linear", "linear_mask_grad", "linear_input_grad", "linear_packed_input_grad")
        for n, k in _LINEAR[:3]
        for m in _ROWS
    ]
    convolutions = [Shape("conv2d_packed", b, c, c, 9, side) for c, side in _WINDOWS for b in (1, 8, 64)]
    return [*packed, *narrow, *rest, *convolutions]


def candidates(shape: Shape) -> list[Any]:
    """Tiles worth trying; those that do not fit a device are passed over when they fail."""
    from dwm_fast.kernels._launch import Tiles

    if shape.taps > 1:
        return [Tiles(64, 32, 64, stages=2), Tiles(32, 64, 32, stages=2)]
    if shape.op == "bank_linear":
        wide = [Tiles(64, 64, 16, num_warps=w, group=g) for w, g in ((4, 4), (8, 4), (4, 2), (8, 2), (8, 8))]
        return [Tiles(64, 32, 16, num_warps=8, group=4), *wide, Tiles(64, 128, 16, num_warps=8, group=2),
                Tiles(32, 64, 16, group=4), Tiles(64, 128, 16, num_warps=4, group=1)]  # fmt: skip
    if shape.m == 1:
        rows = [Tiles(16, 256, 1, splits=s, stages=2) for s in (1, 2, 4)]
        rows += [Tiles(16, 128, 1, splits=4), Tiles(16, 512, 1, splits=2, stages=2)]
        return [*rows, Tiles(64, 128, 16, splits=4), Tiles(32, 256, 16, stages=4), Tiles(16, 256, 16, stages=4)]
    if shape.m > PACKED_ROWS:
        return [Tiles(128, 64, 128, num_warps=8), Tiles(64, 64, 64)]
    block_m = max(16, 1 << (shape.m - 1).bit_length())
    drawn = "packed" not in shape.op
    found = [Tiles(64, 64, block_m, splits=s, stages=2 if drawn else 4) for s in (1, 4, 8)]
    if drawn:
        return found
    deep = [Tiles(64, 128, block_m, splits=s) for s in (2, 4, 8)]
    return [*found, *deep, Tiles(32, 256, block_m), Tiles(32, 128, block_m, splits=2, stages=5),
            Tiles(16, 256, block_m, stages=4)]  # fmt: skip


def problem_of(shape: Shape, device: torch.device) -> Problem:
    """The shape as the rule sees it."""
    m, k = (shape.m * shape.side**2, shape.k * shape.taps) if shape.taps > 1 else (shape.m, shape.k)  # of a domain
    return Problem(shape.op, "cuda", torch.bfloat16, m, shape.n, k, taps=shape.taps, name=device_name(device))


def operation(shape: Shape, device: torch.device) -> Callable[[], Any]:
    """A call of the operation on random tensors, bf16."""
    window = (3, 3) if shape.taps > 1 else ()
    weight = torch.randn(shape.n, shape.k, *window, device=device).bfloat16()
    logits = torch.randn(weight.shape, device=device)
    bits = dwm_fast.ops.pack([logits > 0])
    if shape.op == "bank_linear":
        x = torch.randn(shape.domains * shape.m, shape.k, device=device).bfloat16()
        each = torch.stack([dwm_fast.ops.pack([torch.randn_like(logits) > 0]) for _ in range(shape.domains)])
        offsets = torch.arange(shape.domains + 1, device=device) * shape.m
        return lambda: torch.ops.dwm_fast.bank_linear(x, weight, each, None, offsets, len(x))
    state, tau = torch.tensor([7, 1], device=device), torch.tensor(1.0, device=device)
    call = getattr(torch.ops.dwm_fast, shape.op)
    if shape.taps > 1:
        x = torch.randn(shape.m, shape.k, shape.side, shape.side, device=device).bfloat16()
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return lambda: call(x, weight, bits, None, [1, 1], [1, 1], [1, 1], 1)
    x, grad = (torch.randn(shape.m, size, device=device).bfloat16() for size in (shape.k, shape.n))
    rule = (state, tau, 0, 0.0, 0, 0)
    arguments: dict[str, tuple[Any, ...]] = {
        "linear_packed": (x, weight, bits, None, "none"),
        "linear_packed_input_grad": (grad, weight, bits),
        "linear": (x, weight, logits, None, *rule),
        "linear_input_grad": (grad, weight, logits, *rule),
        "linear_mask_grad": (grad, x, weight, logits, *rule, True, False),
    }
    return lambda: call(*arguments[shape.op])


def staged_way(shape: Shape, run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The other way of the same call: the masked weight first; of a bank, domain by domain on tensors like those."""
    if shape.op != "bank_linear":
        return _forced(run, ways.STAGED)
    one = _forced(operation(dataclasses.replace(shape, op="linear_packed", domains=1), device), ways.STAGED)
    return lambda: [one() for _ in range(shape.domains)]


def _forced(run: Callable[[], Any], way: str, tiles: Any = None) -> Callable[[], Any]:
    """`run` in one way, with `tiles`."""
    from dwm_fast.kernels._launch import override_launch

    def forced() -> Any:
        with ways.use_way(way), override_launch(tiles) if tiles else contextlib.nullcontext():
            return run()

    return forced


def _agrees(run: Callable[[], Any], expected: torch.Tensor) -> bool:
    """Whether a candidate runs at all; GateRed where it does and is wrong.

    Both ways round sums of the same bf16 products once, to bf16 at the latest: half a step of the largest entry each,
    and as much again where the staged way rounds a gradient before the chain rule.
    """
    try:
        found = _first(run())
    except Exception:
        return False
    error = (found.double() - expected.double()).abs().max()
    bound = 2 * torch.finfo(torch.bfloat16).eps * expected.double().abs().max()
    require(bool(error <= bound), f"one pass and staged differ by {float(error):.2e}; at most {float(bound):.2e}")
    return True


def _expected(shape: Shape, run: Callable[[], Any], staged: Callable[[], Any]) -> torch.Tensor:
    """What every candidate has to come to."""
    if shape.op != "bank_linear":
        return _first(staged())
    with dwm_fast.use_backend("reference"):
        return _first(run())


def _itself(call: Run) -> Run:
    return call


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def measured(shape: Shape, device: torch.device) -> dict[str, Any] | None:
    """A row of the table: the times of both ways, and the tiles that were fastest in one pass; None if none ran."""
    run = operation(shape, device)
    staged = staged_way(shape, run, device)
    expected = _expected(shape, run, staged)
    calls = {tiles: _forced(run, ways.ONE_PASS, tiles) for tiles in candidates(shape)}
    calls = {tiles: call for tiles, call in calls.items() if _agrees(call, expected)}
    if not calls:
        return None
    tilings = [Way(str(tiles), partial(_itself, call), graph=True) for tiles, call in calls.items()]
    case = Case("tune", {}, [Way("staged", lambda: staged, graph=True), *tilings], lambda: None, partner="staged")
    timings = measure(case, device, _BUDGET).timings
    seconds = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    fastest = min((tiles for tiles in calls if str(tiles) in seconds), key=lambda tiles: seconds[str(tiles)])
    return row_of(problem_of(shape, device), seconds["staged"], seconds[str(fastest)], fastest)


def row_of(problem: Problem, staged: float, one_pass: float, tiles: Any) -> dict[str, Any]:
    """A row of the table, from seconds."""
    return {
        "op": problem.op,
        "dtype": dtype_name(problem),
        "taps": problem.taps,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "one_pass_us": round(one_pass * 1e6, 2),
        "staged_us": round(staged * 1e6, 2),
        "tiles": dataclasses.asdict(tiles),
    }


def save(rows: Sequence[dict[str, Any]], device: torch.device, paths: Sequence[Path], commit: str) -> None:
    """Write the table; rows of another measurement in the same file give way to those of the same problem."""
    new = {tuple(row[field] for field in _KEY) for row in rows}
    about = {"format": TABLE_FORMAT, "commit": commit, **facts(device)}
    for path in paths:
        kept: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            kept = [row for row in read_table(path) if tuple(row[field] for field in _KEY) not in new]
        lines = ",\n".join(json.dumps(row) for row in [*kept, *rows])
        write_atomic(path, f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')
    forget_tables()


def tune(
    device: torch.device, shapes: Sequence[Shape], seconds: float, paths: Sequence[Path], commit: str = ""
) -> Iterator[dict[str, Any]]:
    """Measure the shapes one by one, saving and yielding after each, until the time is over."""
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        if time.perf_counter() - start > seconds:
            return
        row = measured(shape, device)
        if row is not None:
            rows.append(row)
            save(rows, device, paths, commit)
            yield row


def _compile(shape: Shape, tiles: Any) -> bool:
    """Whether one candidate runs here; what Triton compiled for it stays in its cache."""
    try:
        _forced(operation(shape, torch.device("cuda")), ways.ONE_PASS, tiles)()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def prepare(shapes: Sequence[Shape], jobs: int) -> int:
    """Compile every candidate of the shapes in `jobs` processes, each kernel once; returns how many run."""
    chosen = {
        (s.op, s.taps, s.m == 1, s.n % 16, s.k % 32, tiles): (s, tiles) for s in shapes for tiles in candidates(s)
    }
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        return sum(pool.map(_compile, *zip(*chosen.values(), strict=True)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further shape after this time")
    parser.add_argument("--out", type=Path, help="a further folder for the table")
    parser.add_argument("--commit", default=f"release {dwm_fast.__version__}", help="what is measured, for the record")
    parser.add_argument("--prepare", action="store_true", help="only compile, so that a later call measures at once")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes of --prepare")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks: tune measures a GPU and torch sees none", file=sys.stderr)
        return 2
    if options.prepare:
        print(f"{prepare(grid(), options.jobs)} candidates run here")
        return 0
    device = torch.device("cuda")
    name, cache = f"dispatch-{slug(device_name(device))}.json", cache_folder()
    folders = [*([cache] if cache else []), *([options.out] if options.out else [])]
    shapes = grid()
    for number, row in enumerate(tune(device, shapes, options.seconds, [f / name for f in folders], options.commit), 1):
        faster = ways.ONE_PASS if row["one_pass_us"] <= row["staged_us"] else ways.STAGED
        print(
            f"[{number}/{len(shapes)}] {row['op']} M={row['m']} N={row['n']} K={row['k']}: one pass "
            f"{row['one_pass_us']} us, staged {row['staged_us']} us; {faster}",
            flush=True,
        )
    print(f"written: {', '.join(str(folder / name) for folder in folders)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
