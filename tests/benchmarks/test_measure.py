"""Percentiles, interleaving, and gates that come first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dwm_fast._bench.measure import Budget, Case, GateRed, Way, measure, percentile, require

CPU = torch.device("cpu")
THREE_ROUNDS = Budget(seconds=0.0, min_rounds=3, max_rounds=3, warmup=1)


def test_percentiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(0).exponential(size=17)
    for q in (0, 20, 33.3, 50, 80, 100):
        assert percentile(list(values), q) == pytest.approx(np.percentile(values, q), rel=1e-12)
    assert percentile([4.0], 20) == 4.0
    assert percentile([1.0, 2.0], 50) == 1.5


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_is_an_error(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 100 of at least one"):
        percentile(values, q)


def _recording(name: str, log: list[str]) -> Callable[[], None]:
    def run() -> None:
        log.append(name)
        torch.ones(400, 400) @ torch.ones(400, 400)

    return run


def test_every_round_times_every_way_and_rounds_change_the_order() -> None:
    log: list[str] = []
    ways = [Way(n, lambda n=n: _recording(n, log)) for n in ("a", "b", "ours")]
    timings, missing = measure(Case("c", {}, ways, lambda: None), CPU, THREE_ROUNDS)
    assert not missing
    assert [len(t.seconds) for t in timings.values()] == [3, 3, 3]
    order = [n for i, n in enumerate(log) if i == 0 or log[i - 1] != n]
    warmup, first, second, third = order[:3], order[3:6], order[6:9], order[9:]
    assert warmup == first == ["a", "b", "ours"]
    assert second == ["b", "ours", "a"]
    assert third == ["ours", "a", "b"]


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
    timings, missing = measure(Case("c", {}, [Way("torch.compile", broken), fine], lambda: None), CPU, THREE_ROUNDS)
    assert missing == {"torch.compile": "no compiler"}
    assert list(timings) == ["ours"]
    with pytest.raises(RuntimeError, match="no compiler"):
        measure(Case("c", {}, [Way("ours, other", broken)], lambda: None), CPU, THREE_ROUNDS)


def test_a_budget_bounds_rounds_from_both_sides() -> None:
    case = Case("c", {}, [Way("ours", lambda: _recording("ours", []))], lambda: None)
    few, _ = measure(case, CPU, Budget(seconds=0.0, min_rounds=4, max_rounds=9, warmup=1))
    many, _ = measure(case, CPU, Budget(seconds=60.0, min_rounds=1, max_rounds=6, warmup=1))
    assert (len(few["ours"].seconds), len(many["ours"].seconds)) == (4, 6)
