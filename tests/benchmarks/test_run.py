"""Whole runs with small cases: red gates, edited trees, and results on disk as the run goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast._bench import run
from dwm_fast._bench.cases import Entry
from dwm_fast._bench.context import Context
from dwm_fast._bench.gate import EVERYTHING, red_areas
from dwm_fast._bench.machine import copy_way, device_name, slug
from dwm_fast._bench.measure import Budget, Case, Way, require
from dwm_fast._bench.results import read
from dwm_fast._bench.source import Source
from dwm_fast.errors import InputError


def _case(name: str, gate: bool = True) -> Case:
    ways = [Way("eager", lambda: lambda: torch.ones(9).sum()), Way("ours", lambda: lambda: torch.ones(9).sum())]
    return Case(name, {"n": 9}, ways, lambda: require(gate, "3 of 9 bits differ"))


def _broken(context: Context) -> Case:
    raise RuntimeError("ran out of everything")


GOOD = Entry("good", ("bits",), lambda c: _case("good"))
RED = Entry("red", ("sample",), lambda c: _case("red", gate=False))
BROKEN = Entry("broken", ("bits",), _broken)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    tiny = Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1)
    cpu = torch.device("cpu")
    monkeypatch.setattr(run, "budget_for", lambda context: tiny)
    monkeypatch.setattr(run, "CEILING_BUDGET", tiny)
    product = Way("matrix product", lambda: lambda: None, flops=8)
    monkeypatch.setattr(run, "ceiling_case", lambda d: Case("ceiling", {}, [copy_way(64, cpu), product], lambda: None))
    monkeypatch.setattr(run, "find_source", lambda tree, version: Source("abc"))
    return monkeypatch


def _bench(monkeypatch: pytest.MonkeyPatch, entries: list[Entry], out: Path, **options: Any) -> int:
    monkeypatch.setattr(run, "chosen", lambda context, only="": iter(entries))
    return run.bench(device="cpu", out=out, **options)


def _recorded(out: Path) -> set[str]:
    return {row.case for path in out.glob("*.csv") for row in read(path)}


def test_a_green_run_records_and_returns_0(
    small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench(small, [GOOD], tmp_path) == 0
    name = f"{slug(device_name(torch.device('cpu')))}.csv"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert _recorded(tmp_path) == {"ceiling", "good"}
    printed = capsys.readouterr().out
    assert "good" in printed
    assert max(map(len, printed.splitlines())) <= 100 + len(str(tmp_path))


def test_a_red_gate_or_a_broken_case_gives_no_figures_and_returns_1(
    small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench(small, [RED, BROKEN, GOOD], tmp_path) == 1
    assert _recorded(tmp_path) == {"ceiling", "good"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "no figures for red: red gate: 3 of 9 bits differ" in printed
    assert "no figures for broken: RuntimeError: ran out of everything" in printed


def test_red_tests_keep_their_area_from_being_timed(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        "<testsuites><testsuite><testcase classname='tests.kernels.test_bits' name='test_x'><failure/></testcase>"
        "<testcase classname='tests.ops.test_sample' name='test_y'/></testsuite></testsuites>"
    )
    assert red_areas(junit) == {"bits"}
    assert _bench(small, [GOOD], tmp_path / "out", junit=junit) == 1
    assert _recorded(tmp_path / "out") == {"ceiling"}


@pytest.mark.parametrize("content", [None, "<broken", "<testsuites/>"])
def test_a_test_run_without_a_report_makes_everything_red(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tests.xml"
    if content is not None:
        path.write_text(content)
    assert red_areas(path) == {EVERYTHING}


def test_a_collection_error_is_of_the_file_it_names(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        "<testsuites><testsuite><testcase classname='' name='tests.bank.test_file'><error/></testcase></testsuite>"
        "</testsuites>"
    )
    assert red_areas(path) == {"file"}


def test_an_edited_tree_is_refused_before_anything_is_measured(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small.setattr(run, "find_source", lambda tree, version: Source("abc", dirty="csrc/core.h"))
    with pytest.raises(InputError, match=r"csrc/core.h is edited; commit it, or run with --allow-dirty"):
        _bench(small, [BROKEN], tmp_path)


def test_an_edited_tree_may_be_printed_and_is_not_recorded(
    small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr(run, "find_source", lambda tree, version: Source("abc", dirty="csrc/core.h"))
    assert _bench(small, [GOOD], tmp_path, allow_dirty=True) == 0
    assert "not recorded: csrc/core.h is edited" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_results_are_on_disk_before_the_next_case_starts(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def build(context: Context) -> Case:
        seen.append(_recorded(tmp_path))
        return _case("last")

    assert _bench(small, [GOOD, Entry("last", (), build)], tmp_path) == 0
    assert seen == [{"ceiling", "good"}]


def test_no_case_starts_when_time_is_up(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _bench(small, [GOOD], tmp_path, seconds=-1.0) == 0
    assert _recorded(tmp_path) == {"ceiling"}


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cpu", "only": "nothing"}])
def test_a_device_or_a_case_that_is_not_there_is_one_clear_error(options: dict[str, str]) -> None:
    with pytest.raises(InputError):
        run.bench(**options)
