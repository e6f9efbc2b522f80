"""Measuring a machine: cases are chosen, gated, timed and written to a result file, way by way."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

import dwm_fast
from dwm_fast.errors import InputError

from .cases import SHARED, Entry, chosen
from .context import Context
from .machine import CEILING_BUDGET, ceiling_case, device_name, facts, slug
from .measure import OURS, Budget, Case, GateRed, Measured, measure
from .results import ResultFile, Row, merged, rows_of
from .table import console, results_table

_QUICK = Budget(seconds=1.5, min_rounds=3, max_rounds=30)
_FULL_CPU = Budget(seconds=5.0, min_rounds=7, max_rounds=60)
_FULL_GPU = Budget(seconds=3.0, min_rounds=20, max_rounds=100, warmup=3)
COMPILE = ("last", "never", "only")
"""When ways that torch.compile makes are measured: after all other ways of all cases, not at all, or nothing else."""


def budget_for(context: Context) -> Budget:
    """Seconds and rounds of one case."""
    if context.quick:
        return _QUICK
    return _FULL_GPU if context.on_gpu else _FULL_CPU


@dataclass
class Suite:
    """One run: what is measured and what came of it.

    Attributes:
        commit: what rows say was measured.
        file: where rows are written as soon as they are known, or None.
        red: area -> why its cases are not worth timing.
    """

    context: Context
    commit: str
    file: ResultFile | None
    red: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    screen: Console = field(default_factory=console)

    def measure_ceilings(self) -> None:
        self._measure(ceiling_case(self.context.device), CEILING_BUDGET)
        by_metric = {row.metric: row.p50 for row in self.rows if row.case == "ceiling"}
        self.ceilings = {"copy": by_metric["bandwidth"], "product": by_metric["throughput"]}

    def run(self, entry: Entry, compiled: bool = False) -> None:
        """Gate and measure a case: the ways that torch.compile makes beside ours, or all others.

        A red gate gives no figures; a failure none of the way that failed and of those after it. Both are noted.
        """
        if entry.needs and importlib.util.find_spec(entry.needs) is None:
            self.say(f"  {entry.name}: left out, {entry.needs} is not installed", "yellow")
            return
        blocked = [f"{area} ({self.red[area]})" for area in (*entry.areas, *SHARED) if area in self.red]
        if blocked:
            self._fail(entry, f"tests are red: {', '.join(blocked)}")
            return
        try:
            case = entry.build(self.context)
            ways = [w for w in case.ways if w.compiled == compiled or (compiled and w.name == OURS)]
            self._measure(replace(case, ways=ways), budget_for(self.context))
        except GateRed as error:
            self._fail(entry, f"red gate: {error}")
        except Exception as error:
            self._fail(entry, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        gc.collect()
        if self.context.on_gpu:
            torch.cuda.empty_cache()

    def _measure(self, case: Case, budget: Budget) -> None:
        def keep(found: Measured) -> None:
            rows = rows_of(case, found, self.ceilings, facts(self.context.device), self.commit)
            self.rows = merged(self.rows, rows)
            if self.file is not None:
                self.file.record(rows)

        for way, reason in measure(case, self.context.device, budget, keep).missing.items():
            self.say(f"  {case.name}: '{way}' cannot run here: {reason}", "yellow")

    def say(self, text: str, style: str = "") -> None:
        """Print a line as it is, on whatever console: brackets in names, reasons and paths are no markup."""
        self.screen.print(Text(text, style=style))

    def _fail(self, entry: Entry, reason: str) -> None:
        self.failures[entry.name] = reason
        self.say(f"  {entry.name}: {reason}", "bold red")


def turns(entries: Sequence[Entry], compile: str) -> list[tuple[Entry, bool]]:
    """(case, whether its ways of torch.compile are meant) in the order of measuring."""
    plain = [(entry, False) for entry in entries if compile != "only"]
    return plain + [(entry, True) for entry in entries if entry.compiled and compile != "never"]


def run_suite(suite: Suite, entries: Sequence[Entry], seconds: float = float("inf"), compile: str = "last") -> int:
    """Measure the cases and print their table; 0, or 1 where a gate was red or a case failed.

    Args:
        seconds: start no further case after this time.
        compile: one of COMPILE.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    device = device_name(suite.context.device)
    suite.say(f"{device}; torch {torch.__version__}; {suite.commit}")
    suite.measure_ceilings()
    planned = turns(entries, "never" if suite.context.quick else compile)
    for number, (entry, compiled) in enumerate(planned, 1):
        name = f"{entry.name}{', torch.compile' if compiled else ''}"
        if time.perf_counter() - start > seconds:
            suite.say(f"  out of time; not measured: {name} and what follows it", "yellow")
            break
        if compiled and entry.name in suite.failures:
            continue
        suite.say(f"[{number}/{len(planned)}] {name}  {time.perf_counter() - start:.0f} s", "dim")
        suite.run(entry, compiled)
    suite.screen.print(results_table(suite.rows))
    where = f"recorded in {suite.file.path}" if suite.file else "not recorded"
    suite.say(f"{time.perf_counter() - start:.0f} s; {where}")
    for case, reason in suite.failures.items():
        suite.say(f"not measured, or not all of it: {case}: {reason}", "bold red")
    return 1 if suite.failures else 0


def context_of(device: str, quick: bool) -> Context:
    """The context of a device called "cpu", "cuda" or "auto". InputError where there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device '{device}' is not here; expected auto, cpu" + ", cuda" * torch.cuda.is_available())
    return Context(torch.device(device), quick)


def entries_of(context: Context, only: str, without: str = "") -> list[Entry]:
    """Chosen cases, as `cases.chosen` has them. InputError where none is left."""
    entries = chosen(context, only, without)
    if not entries:
        names = ", ".join(e.name for e in chosen(context))
        raise InputError(f"no case on {context.device.type} begins with '{only}'; names: {names}")
    return entries


def result_file(folder: Path, context: Context) -> ResultFile:
    """The file of a device's results in a folder; quick ones have a file of their own."""
    name = f"{slug(device_name(context.device))}{'-quick' if context.quick else ''}.csv"
    return ResultFile(folder.expanduser() / name)


def bench(device: str = "auto", quick: bool = False, only: str = "", out: Path = Path("dwm-fast-bench")) -> int:
    """Run the suite and print its table; 0, or 1 where a gate was red or a case failed.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        quick: smaller problems, fewer rounds, no torch.compile.
        only: comma-separated beginnings of case names.
        out: folder of the result file.

    Raises:
        InputError: no such device, or no case of that name.
        DataError: the result file cannot be written; told before anything is measured.
    """
    context = context_of(device, quick)
    entries = entries_of(context, only)
    return run_suite(Suite(context, f"release {dwm_fast.__version__}", result_file(out, context)), entries)
