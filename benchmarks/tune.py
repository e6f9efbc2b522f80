"""Measure which way and which tiles are fastest for masked products on this GPU, and remember it.

python -m benchmarks.tune [--seconds 120] [--out FOLDER]            in a checkout
python -m dwm_fast._bench.tune [--seconds 120] [--out FOLDER]       where the package is installed

Every shape of the grid is timed staged and in one pass with each candidate's tiles, interleaved, and written after
each shape to dispatch-<device>.json: in the user's cache, where the library reads it from then on, and in FOLDER. Put
that file into benchmarks/results/ of a checkout to ship it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
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
    """One product of the grid: m rows (images, where taps is 9) of n outputs and k inputs."""

    op: str
    m: int
    n: int
    k: int
    taps: int = 1
    side: int = 1


def grid() -> list[Shape]:
    """What is measured, in order of importance."""
    packed = [Shape("linear_packed", m, n, k) for n, k in _LINEAR for m in _ROWS]
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
    if shape.m == 1:
        rows = [Tiles(16, 256, 1, splits=s, stages=2) for s in (1, 2, 4)]
        return [*rows, Tiles(16, 128, 1, splits=4), Tiles(64, 128, 16, splits=4)]
    if shape.m > PACKED_ROWS:
        return [Tiles(128, 64, 128, num_warps=8), Tiles(64, 64, 64)]
    block_m = max(16, 1 << (shape.m - 1).bit_length())
    drawn = "packed" not in shape.op
    found = [Tiles(64, 64, block_m, splits=s, stages=2 if drawn else 4) for s in (1, 4, 8)]
    return found if drawn else [*found, Tiles(64, 128, block_m, splits=4), Tiles(64, 128, block_m, splits=8)]


def problem_of(shape: Shape, device: torch.device) -> Problem:
    """The shape as the rule sees it."""
    m, k = (shape.m * shape.side**2, shape.k * shape.taps) if shape.taps > 1 else (shape.m, shape.k)
    return Problem(shape.op, "cuda", torch.bfloat16, m, shape.n, k, taps=shape.taps, name=device_name(device))


def operation(shape: Shape, device: torch.device) -> Callable[[], Any]:
    """A call of the operation on random tensors, bf16."""
    window = (3, 3) if shape.taps > 1 else ()
    weight = torch.randn(shape.n, shape.k, *window, device=device).bfloat16()
    logits = torch.randn(weight.shape, device=device)
    bits = dwm_fast.ops.pack([logits > 0])
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


def _itself(call: Run) -> Run:
    return call


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def measured(shape: Shape, device: torch.device) -> dict[str, Any] | None:
    """A row of the table: the times of both ways, and the tiles that were fastest in one pass; None if none ran."""
    run = operation(shape, device)
    staged = _forced(run, ways.STAGED)
    expected = _first(staged())
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further shape after this time")
    parser.add_argument("--out", type=Path, help="a further folder for the table")
    parser.add_argument("--commit", default=f"release {dwm_fast.__version__}", help="what is measured, for the record")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks: tune measures a GPU and torch sees none", file=sys.stderr)
        return 2
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
