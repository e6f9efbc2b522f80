"""Rows, keys, and what may be recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwm_fast._bench.measure import Case, Measured, Timing, Way
from dwm_fast._bench.results import ResultFile, Row, merged, parameters_text, read, rows_of
from dwm_fast.errors import DataError, InputError

FACTS = {"device": "chip", "torch": "2.11", "triton": "3.6", "python": "3.12", "date": "2026-01-02T00:00:00Z"}
ROW = Row("sample", "ours", "time", "ms", 1.0, 2.0, 3.0, "backend=cpp;n=4", commit="abc", **FACTS)


def _rows(**ceilings: float) -> dict[tuple[str, str], Row]:
    ways = [
        Way("eager", lambda: lambda: None, moved=10**9),
        Way("ours", lambda: lambda: None, moved=10**9, flops=4 * 10**12, backend="cpp"),
    ]
    timings = {"eager": Timing([4.0, 6.0, 20.0]), "ours": Timing([2.0, 2.0, 4.0], peak=3 << 20)}
    found = Measured(timings, speed_ups={"eager": [2.0, 3.0, 5.0]})
    rows = rows_of(Case("c", {"n": 4}, ways, lambda: None), found, ceilings, FACTS, "abc")
    return {(r.way, r.metric): r for r in rows}


def test_metrics_follow_from_seconds_bytes_and_operations() -> None:
    rows = _rows(copy=2.0, product=8.0)
    assert rows["ours", "time"].p50 == 2000.0
    assert rows["ours", "time"].p80 == pytest.approx(3200.0)
    assert rows["ours", "bandwidth"].p50 == 0.5
    assert rows["ours", "throughput"].p50 == 2.0
    assert rows["ours", "bandwidth over copy ceiling"].p50 == 0.25
    assert rows["ours", "throughput over product ceiling"].p50 == 0.25
    assert rows["ours", "peak memory"].p50 == 3.0
    assert ("eager", "throughput") not in rows
    assert ("eager", "peak memory") not in rows


def test_a_speed_up_is_the_median_of_ratios_within_rounds() -> None:
    rows = _rows()
    assert rows["ours", "speed-up over eager"].p50 == 3.0
    assert not any(way == "eager" and metric.startswith("speed-up") for way, metric in rows)


def test_parameters_are_written_in_one_order() -> None:
    assert parameters_text({"b": 2, "a": "x"}) == "a=x;b=2"
    assert ROW.parameter("n") == "4"
    assert ROW.parameter("backend") == "cpp"
    assert ROW.parameter("m") == ""


@pytest.mark.parametrize(
    "other",
    [{"case": "x"}, {"way": "x"}, {"metric": "x"}, {"device": "x"}, {"parameters": "backend=cpp;n=5"}],
)
def test_rows_of_different_keys_live_side_by_side(other: dict[str, str]) -> None:
    assert merged([ROW], [replace(ROW, **other)]) == [ROW, replace(ROW, **other)]


@pytest.mark.parametrize(
    "other", [{"commit": "def"}, {"torch": "9"}, {"p50": 9.0}, {"parameters": "backend=triton;n=4"}]
)
def test_a_newer_row_takes_the_place_of_the_older_of_its_key(other: dict[str, object]) -> None:
    newer, last = replace(ROW, date="2026-01-03T00:00:00Z", **other), replace(ROW, way="z")
    assert merged([ROW, last], [newer]) == [newer, last]
    assert merged([newer, last], [ROW]) == [newer, last]


def test_a_file_gives_back_what_was_recorded_and_keeps_the_rest(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "new" / "chip.csv")
    file.record([ROW])
    other = replace(ROW, way='one, "quoted"')
    file.record([other])
    assert read(file.path) == [ROW, other]
    assert [p.name for p in file.path.parent.iterdir()] == ["chip.csv"]


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*chip\.csv"):
        ResultFile(tmp_path / "taken" / "chip.csv")


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chip.csv"
    path.write_text("case,way\na,b\n")
    with pytest.raises(ValueError, match="expected"):
        read(path)
    with pytest.raises(InputError, match="move the file away"):
        ResultFile(path)
    assert path.read_text() == "case,way\na,b\n"
    assert read(tmp_path / "none.csv") == []
