"""Ways of doing one thing, timed side by side: each in turn with ours, medians with 20th and 80th percentiles."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

Run = Callable[[], Any]

_SHORTEST_BLOCK = 2e-3
"""Seconds on a CPU below which several calls are timed as one block."""
_FLUSH_BYTES = 256 << 20
"""Read before each timed call on a GPU; where four times the second-level cache (60 MB on an H200) is more, that."""


OURS = "ours"
"""Name of the way that the others are compared with."""


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
        compiled: whether torch.compile makes it, which takes minutes: such ways are measured last.
        backend: who computes, for ways of ours.
        stored: whether the call returns bytes whose number is a result too.
    """

    name: str
    make: Callable[[], Run]
    moved: int = 0
    flops: int = 0
    graph: bool = False
    compiled: bool = False
    backend: str = ""
    stored: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.split(",")[0] == OURS


@dataclass(frozen=True)
class Case:
    """What `run` measures: the ways, and a gate that raises GateRed when ours is wrong.

    `partner`: the way that every other one is timed in turn with; where no way has that name, each is timed alone.
    """

    name: str
    parameters: dict[str, Any]
    ways: Sequence[Way]
    gate: Callable[[], None]
    partner: str = OURS


@dataclass
class Timing:
    """Seconds per call, one entry a round; peak GPU memory in bytes, the way's own tensors included, or None.

    stored: number of bytes that a call returned, where they are counted.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    stored: int | None = None


@dataclass
class Measured:
    """What is known of a case so far.

    Attributes:
        timings: way name -> Timing.
        speed_ups: way name -> times of that way over its partner's, one for each round that had both.
        missing: way name -> reason, for rivals that cannot run here.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    speed_ups: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """How long a case may take: `seconds` of timed rounds, and bounds on their number."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 60
    warmup: int = 2


def require(condition: bool, message: str) -> None:
    """GateRed with `message` unless `condition`."""
    if not condition:
        raise GateRed(message)


class _Clock(Protocol):
    """Times one call, or several as a block: seconds per call."""

    run: Run

    def time(self) -> float: ...


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


class Flush:
    """Empties a GPU's second-level cache by reading a buffer that is several times as large.

    It only reads. A write would leave the cache full of dirty lines, which the timed call would have to put back into
    memory before it can use their places: traffic that is not its own. A line that was read is dropped for nothing, and
    on its way in it pushes out what the call before has left there, dirty lines included, before the clock starts.
    """

    def __init__(self, device: torch.device, size: int = _FLUSH_BYTES) -> None:
        if device.type == "cuda":
            size = max(size, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.buffer = torch.zeros(size // 4, device=device)
        self.total = torch.zeros((), device=device)

    def __call__(self) -> None:
        torch.sum(self.buffer, 0, out=self.total)


class _GpuClock:
    """CUDA events around one call or one graph replay, after the second-level cache was emptied."""

    def __init__(self, way: Way, run: Run, warmup: int, flush: Run) -> None:
        self.flush = flush
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(max(2, warmup)):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.run = self._captured = run
        if way.graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self._results = run()
            self.run = captured.replay  # it reads and writes what belongs to the call, which has to live as long

    def time(self) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        self.flush()
        before.record()
        self.run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3


def _clock(way: Way, device: torch.device, budget: Budget, flush: Flush | None) -> tuple[_Clock, Timing]:
    """A clock around a fresh, warm instance of the way, and what is known of it before it is timed."""
    if flush is None:
        clock, timing = _CpuClock(way.make(), budget.warmup), Timing()
        if way.stored:
            timing.stored = len(clock.run())
        return clock, timing
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = way.make()
    run()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return _GpuClock(way, run, budget.warmup, flush), Timing(peak=peak)


def _rounds(clocks: Sequence[_Clock], budget: Budget) -> list[list[float]]:
    """Seconds of every clock, round by round; each round begins with another clock."""
    seconds: list[list[float]] = []
    gc.disable()
    try:
        start = time.perf_counter()
        while len(seconds) < budget.max_rounds:
            if len(seconds) >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
                break
            turn = [(len(seconds) + i) % len(clocks) for i in range(len(clocks))]
            times = {i: clocks[i].time() for i in turn}
            seconds.append([times[i] for i in range(len(clocks))])
    finally:
        gc.enable()
    return seconds


def measure(
    case: Case, device: torch.device, budget: Budget, done: Callable[[Measured], None] = lambda found: None
) -> Measured:
    """Gate a case, then time its ways: the partner alone, then every other in turn with it, torch.compile's last.

    A way's state is gone before the next one is made, so none takes memory from another.

    Args:
        budget: of the case; its ways share the seconds.
        done: called after each way with all that is known by then, so that a stop loses one way at most.

    Raises:
        GateRed: the gate failed; nothing was timed.
    """
    case.gate()
    flush = Flush(device) if device.type == "cuda" else None
    found = Measured()
    partner: _Clock | None = None
    share = replace(budget, seconds=budget.seconds / len(case.ways))
    for way in sorted(case.ways, key=lambda way: (way.name != case.partner, way.compiled)):
        try:
            clock, found.timings[way.name] = _clock(way, device, budget, flush)
        except Exception as error:
            if way.is_ours:
                raise
            found.missing[way.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        if partner is None:
            found.timings[way.name].seconds += [seconds for (seconds,) in _rounds([clock], share)]
            partner = clock if way.name == case.partner else None
        else:
            for first, second in _rounds([partner, clock], share):
                found.timings[case.partner].seconds.append(first)
                found.timings[way.name].seconds.append(second)
                found.speed_ups.setdefault(way.name, []).append(second / first)
        done(found)
        del clock
        gc.collect()
    return found
