"""Run the suite on this machine.

python -m benchmarks.run [--quick] [--device cpu|cuda] [--only sample,step] [--out FOLDER] [--allow-dirty]

Every case passes its gate before it is timed; a red one prints no figures and makes the exit status 1. Results are
written after every case to FOLDER/<device>.csv.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

import dwm_fast
from dwm_fast.errors import InputError

from .cases import Entry, chosen
from .checkout import TREE
from .context import Context
from .gate import EVERYTHING, red_areas
from .machine import CEILING_BUDGET, ceiling_case, device_name, facts, slug
from .measure import Budget, Case, GateRed, measure
from .results import ResultFile, Row, rows_of
from .source import Source, find_source, results_folder
from .table import console, results_table

_QUICK = Budget(seconds=1.5, min_rounds=3, max_rounds=30)
_FULL_CPU = Budget(seconds=5.0, min_rounds=7, max_rounds=60)
_FULL_GPU = Budget(seconds=3.0, min_rounds=20, max_rounds=100, warmup=3)


def budget_for(context: Context) -> Budget:
    """Seconds and rounds of one case."""
    if context.quick:
        return _QUICK
    return _FULL_GPU if context.on_gpu else _FULL_CPU


@dataclass
class Suite:
    """One run: what is measured and what came of it."""

    context: Context
    source: Source
    file: ResultFile | None
    red: set[str] = field(default_factory=set)
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    screen: Console = field(default_factory=console)

    def measure_ceilings(self) -> None:
        case = ceiling_case(self.context.device)
        rows = self._rows(case, CEILING_BUDGET)
        by_metric = {row.metric: row.p50 for row in rows}
        self.ceilings = {"copy": by_metric["bandwidth"], "product": by_metric["throughput"]}
        self._keep(rows)

    def run(self, entry: Entry) -> None:
        """Gate and measure one case; a red gate or a failure is noted and gives no figures."""
        blocked = self.red & {*entry.areas, EVERYTHING}
        if blocked:
            self._fail(entry, f"tests of {', '.join(sorted(blocked))} are red")
            return
        try:
            rows = self._rows(entry.build(self.context), budget_for(self.context))
        except GateRed as error:
            self._fail(entry, f"red gate: {error}")
        except Exception as error:
            self._fail(entry, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        else:
            self._keep(rows)
        gc.collect()
        if self.context.on_gpu:
            torch.cuda.empty_cache()

    def _rows(self, case: Case, budget: Budget) -> list[Row]:
        timings, missing = measure(case, self.context.device, budget)
        for way, reason in missing.items():
            self.screen.print(f"  {case.name}: '{way}' cannot run here: {reason}", style="yellow")
        return rows_of(case, timings, self.ceilings, facts(self.context.device), self.source.commit)

    def _keep(self, rows: list[Row]) -> None:
        self.rows += rows
        if self.file is not None:
            self.file.record(rows, self.source)

    def _fail(self, entry: Entry, reason: str) -> None:
        self.failures[entry.name] = reason
        self.screen.print(f"  {entry.name}: {reason}; no figures", style="bold red")


def run_suite(suite: Suite, entries: Sequence[Entry], seconds: float) -> Iterator[Entry]:
    """Measure the entries in order, yielding each before it starts; stop between two after `seconds`."""
    start = time.perf_counter()
    suite.measure_ceilings()
    for entry in entries:
        if time.perf_counter() - start > seconds:
            suite.screen.print(f"  out of time; not measured: {entry.name} and what follows it", style="yellow")
            return
        yield entry
        suite.run(entry)


def bench(
    device: str = "auto",
    quick: bool = False,
    only: str = "",
    out: Path | None = None,
    allow_dirty: bool = False,
    seconds: float = float("inf"),
    junit: Path | None = None,
) -> int:
    """Run the suite and print its table; 0, or 1 where a gate was red or a case failed.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        quick: smaller problems, fewer rounds, no torch.compile.
        only: comma-separated beginnings of case names.
        out: folder of the result file.
        allow_dirty: measure an edited tree, print, and record nothing.
        seconds: start no further case after this time.
        junit: report of a test run; areas that are red there are not timed.

    Raises:
        InputError: no such device, no case of that name, or an edited tree without `allow_dirty`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device '{device}' is not here; expected auto, cpu" + ", cuda" * torch.cuda.is_available())
    context = Context(torch.device(device), quick)
    entries = list(chosen(context, only))
    if not entries:
        names = ", ".join(e.name for e in chosen(context))
        raise InputError(f"no case on {device} begins with '{only}'; names: {names}")
    source = find_source(TREE, dwm_fast.__version__)
    if source.dirty and not allow_dirty:
        raise InputError(f"{source.dirty} is edited; commit it, or run with --allow-dirty to print without recording")
    name = device_name(context.device)
    path = (out or results_folder(TREE)) / f"{slug(name)}{'-quick' if quick else ''}.csv"
    recorded = not source.dirty
    suite = Suite(context, source, ResultFile(path) if recorded else None)
    suite.red = red_areas(junit) if junit is not None else set()
    start = time.perf_counter()
    torch.manual_seed(0)
    suite.screen.print(f"{name}; torch {torch.__version__}; {source.commit}")
    for number, entry in enumerate(run_suite(suite, entries, seconds), 1):
        suite.screen.print(f"[{number}/{len(entries)}] {entry.name}  {time.perf_counter() - start:.0f} s", style="dim")
    suite.screen.print(results_table(suite.rows))
    where = f"recorded in {path}" if recorded else f"not recorded: {source.dirty} is edited"
    suite.screen.print(f"{time.perf_counter() - start:.0f} s; {where}")
    for case, reason in suite.failures.items():
        suite.screen.print(f"no figures for {case}: {reason}", style="bold red")
    return 1 if suite.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="smaller problems, no torch.compile")
    parser.add_argument("--only", default="", help="comma-separated beginnings of case names")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--allow-dirty", action="store_true", help="measure an edited tree and record nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--junit", type=Path, help="report of a test run; what is red there is not timed")
    try:
        return bench(**vars(parser.parse_args(argv)))
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
