"""Whole runs with small cases: red gates, edited trees, and results on disk as the run goes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

import dwm_fast
from dwm_fast._bench import run
from dwm_fast._bench.cases import Entry
from dwm_fast._bench.context import Context
from dwm_fast._bench.dev import run as recording
from dwm_fast._bench.dev.checkout import TREE
from dwm_fast._bench.dev.gate import Verdict
from dwm_fast._bench.dev.source import RESULTS, Source
from dwm_fast._bench.machine import copy_way, device_name, slug
from dwm_fast._bench.measure import Budget, Case, Run, Way, require
from dwm_fast._bench.results import read
from dwm_fast.errors import DataError, InputError

CPU = torch.device("cpu")
NAME = f"{slug(device_name(CPU))}.csv"


def _ones() -> Run:
    return lambda: torch.ones(9).sum()


def _case(name: str, gate: bool = True, more: tuple[Way, ...] = ()) -> Case:
    ways = [Way("eager", _ones), Way("ours", _ones), *more]
    return Case(name, {"n": 9}, ways, lambda: require(gate, "3 of 9 bits differ"))


def _broken(*_: object) -> Case:
    raise RuntimeError("[/] ran out of everything")


GOOD = Entry("good", ("bits",), lambda c: _case("good"))
RED = Entry("red", ("sample",), lambda c: _case("red", gate=False))
BROKEN = Entry("broken", ("bits",), _broken)

Bench = Callable[..., int]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    tiny = Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1)
    monkeypatch.setattr(run, "budget_for", lambda context: tiny)
    monkeypatch.setattr(run, "CEILING_BUDGET", tiny)
    product = Way("matrix product", lambda: lambda: None, flops=8)
    monkeypatch.setattr(run, "ceiling_case", lambda d: Case("ceiling", {}, [copy_way(64, CPU), product], lambda: None))
    monkeypatch.setattr(recording, "find_source", lambda tree: Source("abc"))
    return monkeypatch


@pytest.fixture
def bench(small: pytest.MonkeyPatch) -> Bench:
    """Records these cases into a folder, with options of the command."""

    def measured(entries: list[Entry], out: Path, *options: object) -> int:
        small.setattr(run, "chosen", lambda context, only="", without="": entries)
        return recording.main(["--device", "cpu", "--out", str(out), *map(str, options)])

    return measured


def _recorded(out: Path) -> set[str]:
    return {row.case for path in out.glob("*.csv") for row in read(path)}


def test_a_green_run_records_and_returns_0(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([GOOD], tmp_path) == 0
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert _recorded(tmp_path) == {"ceiling", "good"}
    assert {row.commit for row in read(tmp_path / NAME)} == {"abc"}
    printed = capsys.readouterr().out
    assert "good" in printed
    assert max(map(len, printed.splitlines())) <= 100 + len(str(tmp_path))


def test_a_red_gate_or_a_broken_case_gives_no_figures_and_returns_1(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench([RED, BROKEN, GOOD], tmp_path) == 1
    assert _recorded(tmp_path) == {"ceiling", "good"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "red: red gate: 3 of 9 bits differ" in printed
    assert "broken: RuntimeError: [/] ran out of everything" in printed


def test_what_is_red_in_the_gate_is_not_timed(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gate.json"
    green = {f"ops/test_{area}.py": asdict(Verdict(passed=1, red=False)) for area in ("sample", "backends")}
    red = {"kernels/test_bits.py": asdict(Verdict(failed=1, reason="1 failed: test_pack[3]"))}
    report.write_text(json.dumps({"commit": "abc", "files": {**green, **red}}))
    other = Entry("other", ("sample",), lambda c: _case("other"))
    assert bench([GOOD, other], tmp_path / "out", "--gate", report) == 1
    assert _recorded(tmp_path / "out") == {"ceiling", "other"}
    assert "bits (kernels/test_bits.py: 1 failed: test_pack[3])" in " ".join(capsys.readouterr().out.split())


def test_an_edited_tree_records_nothing_among_its_own_results_and_is_told_before_anything_is_measured(
    bench: Bench, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr(recording, "find_source", lambda tree: Source("tree:01", dirty="csrc/core.h"))
    assert bench([BROKEN], TREE / RESULTS) == 2
    told = capsys.readouterr().err
    assert "csrc/core.h is edited; commit it, name another folder with --out" in told
    assert "--allow-dirty" in told


def test_elsewhere_the_rows_of_an_edited_tree_carry_its_fingerprint(
    bench: Bench, small: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.setattr(recording, "find_source", lambda tree: Source("tree:01", dirty="csrc/core.h"))
    assert bench([GOOD], tmp_path) == 0
    assert {row.commit for row in read(tmp_path / NAME)} == {"tree:01"}


def test_an_edited_tree_may_be_printed_and_is_not_recorded(
    bench: Bench, small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr(recording, "find_source", lambda tree: Source("abc", dirty="csrc/core.h"))
    assert bench([GOOD], tmp_path, "--allow-dirty") == 0
    assert "not recorded" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_results_are_on_disk_before_the_next_case_starts(bench: Bench, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def build(context: Context) -> Case:
        seen.append(_recorded(tmp_path))
        return _case("last")

    assert bench([GOOD, Entry("last", (), build)], tmp_path) == 0
    assert seen == [{"ceiling", "good"}]


def test_a_ways_rows_are_on_disk_before_the_next_way_is_made(bench: Bench, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def stopped() -> Run:
        seen.append([row.way for row in read(tmp_path / NAME) if row.case == "last" and row.metric == "time"])
        raise KeyboardInterrupt

    entry = Entry("last", (), lambda c: _case("last", more=(Way("slow", stopped),)))
    with pytest.raises(KeyboardInterrupt):
        bench([entry], tmp_path)
    assert seen == [["ours", "eager"]]
    assert {row.way for row in read(tmp_path / NAME) if row.case == "last"} == {"ours", "eager"}


@pytest.mark.parametrize(
    ("when", "order"),
    [
        ("last", ["a: eager", "b: eager", "a: torch.compile"]),
        ("never", ["a: eager", "b: eager"]),
        ("only", ["a: torch.compile"]),
    ],
)
def test_ways_of_torch_compile_come_after_all_others_or_alone_or_not_at_all(
    bench: Bench, tmp_path: Path, when: str, order: list[str]
) -> None:
    made: list[str] = []

    def entry(name: str, compiled: bool) -> Entry:
        def way(kind: str) -> Way:
            def make() -> Run:
                made.append(f"{name}: {kind}")
                return lambda: torch.ones(9).sum()

            return Way(kind, make, compiled=kind == "torch.compile")

        ways = [way("torch.compile")] * compiled + [Way("ours", _ones), way("eager")]
        return Entry(name, (), lambda c: Case(name, {}, ways, lambda: None), compiled=compiled)

    assert bench([entry("a", True), entry("b", False)], tmp_path, "--torch-compile", when) == 0
    assert made == order
    told = {(row.case, row.metric) for row in read(tmp_path / NAME) if row.way == "ours"}
    assert (("a", "speed-up over torch.compile") in told) == (when != "never")


def test_a_case_whose_optional_package_is_missing_is_left_out_and_no_failure(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Entry("coding", (), lambda c: _case("coding"), needs="no_package_of_that_name")
    assert bench([entry, GOOD], tmp_path) == 0
    assert _recorded(tmp_path) == {"ceiling", "good"}
    assert "coding: left out, no_package_of_that_name is not installed" in " ".join(capsys.readouterr().out.split())


def test_no_case_starts_when_time_is_up(bench: Bench, tmp_path: Path) -> None:
    assert bench([GOOD], tmp_path, "--seconds", -1) == 0
    assert _recorded(tmp_path) == {"ceiling"}


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cpu", "only": "nothing"}])
def test_a_device_or_a_case_that_is_not_there_is_one_clear_error(options: dict[str, str]) -> None:
    with pytest.raises(InputError):
        run.bench(**options)


def test_an_installed_package_writes_into_the_current_folder_and_says_which_release(
    small: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.chdir(tmp_path)
    small.setattr(run, "chosen", lambda context, only="", without="": [GOOD])
    assert run.bench(device="cpu") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dwm-fast-bench"]
    rows = read(tmp_path / "dwm-fast-bench" / NAME)
    assert {row.commit for row in rows} == {f"release {dwm_fast.__version__}"}


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    small: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    small.setattr(run, "measure", _broken)
    with pytest.raises(DataError, match="cannot write"):
        run.bench(device="cpu", only="bits-and", out=tmp_path / "taken")


def test_a_line_is_shown_as_it_is_on_a_console_that_reads_markup() -> None:
    suite = run.Suite(Context(CPU, quick=True), "commit", None, screen=Console(file=io.StringIO(), width=200))
    suite._fail(Entry("a[b]", (), _broken), "type: pip install 'dwm-fast[coding]' [/]")
    assert suite.screen.file.getvalue() == "  a[b]: type: pip install 'dwm-fast[coding]' [/]\n"  # type: ignore[attr-defined]
