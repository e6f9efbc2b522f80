"""What tuning writes is what the rule of ways reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dwm_fast._bench import tune
from dwm_fast._bench.measure import Measured, Timing
from dwm_fast.ops import measured, ways
from dwm_fast.ops.problem import Problem

CPU = torch.device("cpu")
OPERATION = tune.operation
NAME = "NVIDIA Test 2"


@pytest.fixture(autouse=True)
def _device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of that name, whose one-pass kernels take `seconds` of the staged way's second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "operation", lambda shape, device: lambda: torch.ones(3))

    def problem_of(shape: tune.Shape, device: torch.device) -> Problem:
        sizes = (shape.m, shape.n, shape.k)
        return Problem(shape.op, "cuda", torch.bfloat16, *sizes, taps=shape.taps, name=NAME)

    monkeypatch.setattr(tune, "problem_of", problem_of)
    measured.forget_tables()
    yield
    measured.forget_tables()


def _measure_as(monkeypatch: pytest.MonkeyPatch, best: int, seconds: float) -> None:
    """Every candidate takes 3 s but the one numbered `best`, which takes `seconds`; staged takes 1 s."""

    def measure(case: object, device: object, budget: object) -> Measured:
        names = [way.name for way in case.ways]  # type: ignore[attr-defined]
        times = {name: Timing([3.0]) for name in names}
        times[names[1 + best]], times["staged"] = Timing([seconds]), Timing([1.0])
        return Measured(times)

    monkeypatch.setattr(tune, "measure", measure)


@pytest.mark.parametrize(("seconds", "way"), [(0.5, ways.ONE_PASS), (2.0, ways.STAGED)])
def test_the_rule_follows_what_was_measured_and_launches_use_the_best_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, way: str
) -> None:
    from dwm_fast.kernels._product_launch import product_tiles

    _measure_as(monkeypatch, best=2, seconds=seconds)
    shape = tune.Shape("linear_packed", 16, 4096, 4096)
    paths = [measured.table_paths(NAME)[0], tmp_path / "out" / "table.json"]
    assert len(list(tune.tune(CPU, [shape], 1e9, paths))) == 1
    problem = tune.problem_of(shape, CPU)
    assert ways.choose(problem).way == way
    assert product_tiles(problem, False) == tune.candidates(shape)[2]
    assert paths[0].read_text() == paths[1].read_text()


def test_a_new_measurement_replaces_the_row_of_its_problem_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    shapes = [tune.Shape("linear", m, 64, 64) for m in (1, 16)]
    _measure_as(monkeypatch, best=0, seconds=0.5)
    list(tune.tune(CPU, shapes, 1e9, [path]))
    _measure_as(monkeypatch, best=0, seconds=0.25)
    list(tune.tune(CPU, shapes[:1], 1e9, [path]))
    assert {row["m"]: row["one_pass_us"] for row in measured.read_table(path)} == {1: 0.25e6, 16: 0.5e6}
    assert json.loads(path.read_text())["format"] == measured.TABLE_FORMAT


def test_time_that_is_over_starts_no_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measure_as(monkeypatch, best=0, seconds=0.5)
    assert list(tune.tune(CPU, tune.grid(), -1.0, [tmp_path / "table.json"])) == []
    assert not (tmp_path / "table.json").exists()


def test_the_grid_names_each_problem_once_and_has_what_the_aims_are_about() -> None:
    shapes = tune.grid()
    assert len(shapes) == len(set(shapes))
    first = [(s.m, s.n, s.k) for s in shapes[:3]]
    assert first == [(m, 4096, 4096) for m in (1, 16, 64)]
    assert {s.m for s in shapes if (s.n, s.k) == (4096, 4096)} >= {1, 8192}
    assert all(tune.candidates(s) for s in shapes)


@pytest.mark.parametrize("op", sorted({shape.op for shape in tune.grid()}))
def test_every_operation_of_the_grid_is_called_as_it_is_defined_and_way_by_way(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = 9 if op.startswith("conv2d") else 1
    shape = tune.Shape(op, 2, 16, 32, taps, side=4 if taps > 1 else 1, domains=3 if op == "bank_linear" else 1)
    with ways.use_way(ways.STAGED):
        found = OPERATION(shape, CPU)()
    first = found if isinstance(found, torch.Tensor) else found[0]
    expected = {"linear_mask_grad": (16, 32), "conv2d_packed": (2, 16, 4, 4), "bank_linear": (6, 16)}
    assert first.shape == expected.get(op, (2, 32) if "input_grad" in op else (2, 16))
    assert first.isfinite().all()
    assert first.abs().max() > 0


def test_a_banks_tiles_are_those_of_the_nearest_rows_a_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dwm_fast.kernels.bank import tiles_for

    _measure_as(monkeypatch, best=3, seconds=0.5)
    shape = tune.Shape("bank_linear", 4, 4096, 4096, domains=16)
    monkeypatch.setattr(tune, "_agrees", lambda run, expected: True)
    list(tune.tune(CPU, [shape], 1e9, [measured.table_paths(NAME)[0]]))
    arguments = (4096, 4096, torch.bfloat16, NAME)
    assert tiles_for(16 * 4, 16, *arguments) == tiles_for(16 * 6, 16, *arguments) == tune.candidates(shape)[3]
    assert tiles_for(16 * 16, 16, *arguments) != tune.candidates(shape)[3]


def test_each_candidate_is_compiled_once_and_those_that_do_not_run_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[str, object]] = []

    def runs(shape: tune.Shape, tiles: object) -> bool:
        made.append((shape.op, tiles))
        return shape.op != "linear"

    class Pool(ThreadPoolExecutor):
        def __init__(self, jobs: int, mp_context: object) -> None:
            super().__init__(jobs)

    monkeypatch.setattr(tune, "_compile", runs)
    monkeypatch.setattr(tune.concurrent.futures, "ProcessPoolExecutor", Pool)
    shapes = [tune.Shape(op, m, 64, 64) for op in ("linear", "linear_packed") for m in (1, 16, 16)]
    count = tune.prepare(shapes, 2)
    expected = {(shape.op, tiles) for shape in shapes for tiles in tune.candidates(shape)}
    assert set(made) == expected
    assert count == sum(op == "linear_packed" for op, _ in made)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "torch sees none" in capsys.readouterr().err
