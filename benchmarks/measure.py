"""Ways of doing one thing, timed side by side: interleaved in one process, medians with 20th and 80th percentiles."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]

_SHORTEST_BLOCK = 2e-3
"""Seconds on a CPU below which several calls are timed as one block."""
_FLUSH_BYTES = 256 << 20
"""Written before each timed call on a GPU, so that the second-level cache (60 MB on an H200) holds nothing of use."""


class GateRed(Exception):
    """A case's results are wrong, so its times mean nothing."""


@dataclass(frozen=True)
class Way:
    """One way of doing what a case is about.

    Attributes:
        name: "ours", or what the rival is; "ours, ..." for further ways of ours.
        make: builds what the way needs and returns the call that is timed.
        moved: bytes that one call must read and write, each tensor once; 0 where they are not counted.
        flops: floating-point operations of one call's matrix products; 0 where they are not counted.
        graph: whether a GPU may replay the call as a CUDA graph; False where the call decides that itself.
        backend: who computes, for ways of ours.
        stored: whether the call returns bytes whose number is a result too.
    """

    name: str
    make: Callable[[], Run]
    moved: int = 0
    flops: int = 0
    graph: bool = False
    backend: str = ""
    stored: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.split(",")[0] == "ours"


@dataclass(frozen=True)
class Case:
    """What `run` measures: the ways, and a gate that raises GateRed when ours is wrong."""

    name: str
    parameters: dict[str, Any]
    ways: Sequence[Way]
    gate: Callable[[], None]


@dataclass
class Timing:
    """Seconds per call, one entry a round; peak GPU memory in bytes, the way's own tensors included, or None.

    stored: number of bytes that a call returned, where they are counted.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    stored: int | None = None


@dataclass(frozen=True)
class Budget:
    """How long a case may take: `seconds` of timed rounds, and bounds on their number."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 60
    warmup: int = 2


def percentile(values: Sequence[float], q: float) -> float:
    """q-th percentile, q in [0, 100], linear between the nearest ranks; ValueError for no values."""
    if not values or not 0 <= q <= 100:
        raise ValueError(f"percentile {q} of {len(values)} values; expected 0 to 100 of at least one")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def require(condition: bool, message: str) -> None:
    """GateRed with `message` unless `condition`."""
    if not condition:
        raise GateRed(message)


class _CpuClock:
    """Blocks of calls long enough for perf_counter; several calls come after one that warms caches and threads."""

    def __init__(self, run: Run, warmup: int) -> None:
        self.run = run
        seconds = math.inf
        for _ in range(max(1, warmup)):
            start = time.perf_counter()
            run()
            seconds = min(seconds, time.perf_counter() - start)
        self.calls = max(1, min(1000, math.ceil(_SHORTEST_BLOCK / max(seconds, 1e-9))))

    def time(self) -> float:
        if self.calls > 1:
            self.run()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        return (time.perf_counter() - start) / self.calls


class _GpuClock:
    """CUDA events around one call or one graph replay, after a write that empties the second-level cache."""

    def __init__(self, run: Run, warmup: int, graph: bool, flush: torch.Tensor) -> None:
        self.flush = flush
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(max(2, warmup)):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.run = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self._kept = run()
            self.run = captured.replay

    def time(self) -> float:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.flush.zero_()
        before.record()
        self.run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def _clock(way: Way, device: torch.device, budget: Budget, flush: torch.Tensor | None) -> tuple[Any, int | None]:
    """A clock around a fresh, warm instance of the way, and the GPU memory that it took at most."""
    if device.type != "cuda" or flush is None:
        return _CpuClock(way.make(), budget.warmup), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = way.make()
    run()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return _GpuClock(run, budget.warmup, way.graph, flush), peak


def measure(case: Case, device: torch.device, budget: Budget) -> tuple[dict[str, Timing], dict[str, str]]:
    """Gate, warm up and time every way of a case, round by round, each round in another order.

    Returns:
        way name -> Timing, aligned by round; and way name -> reason for rivals that cannot run here.

    Raises:
        GateRed: the gate failed; nothing was timed.
    """
    case.gate()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    clocks, missing, timings = {}, {}, {}
    for way in case.ways:
        try:
            clocks[way.name], peak = _clock(way, device, budget, flush)
        except Exception as error:
            if way.is_ours:
                raise
            missing[way.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        timings[way.name] = Timing(peak=peak, stored=len(clocks[way.name].run()) if way.stored else None)
    names = list(clocks)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for count in range(budget.max_rounds):
            if count >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
                break
            turn = count % len(names)
            for name in names[turn:] + names[:turn]:
                timings[name].seconds.append(clocks[name].time())
    finally:
        gc.enable()
    return timings, missing
