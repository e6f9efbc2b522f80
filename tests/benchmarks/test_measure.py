"""Ways in turn with ours, and gates that come first."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import pytest
import torch

from dwm_fast._bench.measure import Budget, Case, Flush, GateRed, Way, _GpuClock, measure, require

CPU = torch.device("cpu")
THREE_ROUNDS = Budget(seconds=0.0, min_rounds=3, max_rounds=3, warmup=1)


def _recording(name: str, log: list[str]) -> Callable[[], None]:
    def run() -> None:
        log.append(name)
        torch.ones(400, 400) @ torch.ones(400, 400)

    return run


def test_ours_comes_first_and_every_other_way_takes_turns_with_it_in_changing_order() -> None:
    log: list[str] = []
    ways = [Way(n, lambda n=n: _recording(n, log), compiled=n == "c") for n in ("c", "a", "ours")]
    found = measure(Case("case", {}, ways, lambda: None), CPU, THREE_ROUNDS)
    assert not found.missing
    assert {name: len(t.seconds) for name, t in found.timings.items()} == {"ours": 9, "a": 3, "c": 3}
    order = [n for i, n in enumerate(log) if i == 0 or log[i - 1] != n]
    # ours alone; then the warm-up of the next way and three rounds, of which the second begins with that way
    assert order == ["ours", *["a", "ours", "a", "ours", "a"], *["c", "ours", "c", "ours", "c"]]


def test_a_speed_up_is_taken_within_rounds_and_every_way_is_told_as_soon_as_it_is_timed() -> None:
    ways = [Way(n, lambda: _recording("", [])) for n in ("a", "ours", "b")]
    seen: list[tuple[list[str], list[str]]] = []
    found = measure(
        Case("case", {}, ways, lambda: None),
        CPU,
        THREE_ROUNDS,
        lambda known: seen.append((list(known.timings), list(known.speed_ups))),
    )
    assert seen == [(["ours"], []), (["ours", "a"], ["a"]), (["ours", "a", "b"], ["a", "b"])]
    ours, other = found.timings["ours"].seconds[3:6], found.timings["a"].seconds
    assert found.speed_ups["a"] == [theirs / mine for mine, theirs in zip(ours, other, strict=True)]


def test_a_flush_reads_all_of_its_buffer_and_writes_none_of_it() -> None:
    flush = Flush(CPU, 4 << 10)
    assert flush.buffer.numel() == 1 << 10
    flush.buffer.fill_(1)
    before = flush.buffer._version
    flush()
    assert flush.buffer._version == before
    assert float(flush.total) == 1 << 10


def test_nothing_runs_after_a_red_gate() -> None:
    log: list[str] = []
    case = Case("c", {}, [Way("ours", lambda: _recording("ours", log))], lambda: require(False, "wrong by 1"))
    with pytest.raises(GateRed, match="wrong by 1"):
        measure(case, CPU, THREE_ROUNDS)
    assert log == []


def test_a_rival_that_cannot_run_is_named_and_ours_that_cannot_is_an_error() -> None:
    def broken() -> Callable[[], None]:
        raise RuntimeError("no compiler\nsecond line")

    fine = Way("ours", lambda: _recording("ours", []))
    found = measure(Case("c", {}, [Way("torch.compile", broken), fine], lambda: None), CPU, THREE_ROUNDS)
    assert found.missing == {"torch.compile": "no compiler"}
    assert list(found.timings) == ["ours"]
    with pytest.raises(RuntimeError, match="no compiler"):
        measure(Case("c", {}, [Way("ours, other", broken)], lambda: None), CPU, THREE_ROUNDS)


def test_a_budget_bounds_rounds_from_both_sides() -> None:
    case = Case("c", {}, [Way("ours", lambda: _recording("ours", []))], lambda: None)
    few = measure(case, CPU, Budget(seconds=0.0, min_rounds=4, max_rounds=9, warmup=1))
    many = measure(case, CPU, Budget(seconds=60.0, min_rounds=1, max_rounds=6, warmup=1))
    assert (len(few.timings["ours"].seconds), len(many.timings["ours"].seconds)) == (4, 6)


def test_without_a_partner_each_way_is_timed_alone() -> None:
    ways = [Way(n, lambda: _recording("", [])) for n in ("a", "b")]
    found = measure(Case("c", {}, ways, lambda: None), CPU, THREE_ROUNDS)
    assert {name: len(t.seconds) for name, t in found.timings.items()} == {"a": 3, "b": 3}
    assert found.speed_ups == {}


def test_a_ways_state_is_gone_before_the_next_way_is_made() -> None:
    alive: list[weakref.ref[object]] = []
    counts: list[int] = []

    def make() -> Callable[[], None]:
        counts.append(sum(ref() is not None for ref in alive))
        state = torch.nn.Linear(2, 2)
        alive.append(weakref.ref(state))
        return lambda: require(state is not None, "")

    ways = [Way("ours", make), *(Way(name, make) for name in "abc")]
    measure(Case("c", {}, ways, lambda: None), CPU, THREE_ROUNDS)
    assert counts == [0, 1, 1, 1]  # none for ours, then ours alone


@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu_the_cache_is_emptied_before_the_clock_starts_and_only_the_call_is_in_between(
    monkeypatch: pytest.MonkeyPatch, graph: bool
) -> None:
    """torch.cuda's own names stand for themselves: one that torch does not have cannot be replaced here."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("clock")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    for name, fake in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda captured: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    way = Way("ours", lambda: lambda: None, graph=graph)
    clock = _GpuClock(way, lambda: log.append("call"), 3, lambda: log.append("flush"))
    assert log == ["call"] * (3 + graph)
    log.clear()
    assert clock.time() == 2e-3
    assert log == ["flush", "clock", "replay" if graph else "call", "clock", "wait"]
