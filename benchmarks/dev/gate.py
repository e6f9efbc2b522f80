"""The tests as a gate: run on this machine, a process a file, many at a time; what is red is not worth timing.

python -m benchmarks.dev.gate [--seconds 200] [--jobs 12] --out FOLDER

FOLDER gets gate.json, which `benchmarks.dev.run --gate` reads, and gate.log with what failed. A process a file keeps a
kernel that breaks its CUDA context from failing the tests of other files, and needs no plugin of pytest. Without
hypothesis, the tests that draw from it are left out and the rest of their files is run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dwm_fast._files import write_atomic

from ..cases import ENTRIES, SHARED
from .checkout import TREE
from .source import find_source

WHOLE = ("kernels", "ops")
"""Folders of tests that are run whole; of the others the files of timed areas, and what is marked gpu."""
_ELSEWHERE = "test_compile"
"""Files that begin so compile for GPUs that are not here: that takes minutes, and CI does it."""
_OPTIONAL = ("hypothesis", "constriction", "zstandard", "huggingface_hub")
"""Packages without which a file of tests is left out; without any other it is red."""
_MARKED = "pytest.mark.gpu"
_SHARDS = {"kernels/test_sample.py": 3, "kernels/test_linear.py": 2, "kernels/test_products_gpu.py": 2}
"""Files of which a process takes a part only: most of their time goes to compiling, which a machine's cores share."""


@dataclass(frozen=True)
class Verdict:
    """What came of one file of tests. `reason`: why it is red or was left out, "" where it is green."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    red: bool = True
    reason: str = ""
    seconds: float = 0.0


def areas(devices: Collection[str] = ("cuda",)) -> set[str]:
    """Areas of all cases that are timed on one of the devices."""
    return {area for entry in ENTRIES if {*devices} & {*entry.devices} for area in (*entry.areas, *SHARED)}


def belongs(file: str, area: str) -> bool:
    """Whether tests/kernels/test_sample.py, a part of it, or test_sample_tails.py is about an area ("sample")."""
    stem = Path(file.partition("#")[0]).stem.removeprefix("test_")
    return stem == area or stem.startswith(f"{area}_")


def planned(tests: Path) -> list[tuple[str, list[str]]]:
    """(file, further arguments of pytest) of the gate: kernels and operations first, long files before short ones.

    A part of a file has its number behind the name: kernels/test_sample.py#2.
    """
    timed = areas()
    found: list[tuple[bool, int, str, list[str]]] = []
    for path in tests.glob("*/test_*.py"):
        name = path.relative_to(tests).as_posix()
        if path.name.startswith(_ELSEWHERE):
            continue
        whole = path.parent.name in WHOLE
        if whole or any(belongs(name, area) for area in timed):
            parts = _SHARDS.get(name, 1)
            for part in range(1, parts + 1) if parts > 1 else ():
                found.append((False, -2 * path.stat().st_size, f"{name}#{part}", ["--part", f"{part}/{parts}"]))
            if parts == 1:
                found.append((not whole, -path.stat().st_size, name, []))
        elif _MARKED in path.read_text(encoding="utf-8"):
            found.append((True, -path.stat().st_size, name, ["-m", "gpu"]))
    return [(name, more) for *_, name, more in sorted(found)]


def verdict_of(report: Path, status: int, seconds: float) -> Verdict:
    """What pytest's report says; a report that is missing or broken off is red."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Verdict(reason=f"pytest ended with status {status} and no report", seconds=seconds)
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    lacking = [package for package in _OPTIONAL if any(_lacks(case, package) for case in bad)]
    if lacking and len(bad) == 1 == len(cases):
        return Verdict(red=False, reason=f"left out: {lacking[0]} is not installed", seconds=seconds)
    names = ", ".join(sorted({(case.get("name") or "").partition("[")[0] for case in bad})[:3])
    reason = f"{len(bad)} failed: {names}" if bad else "" if status in (0, 5) else f"pytest ended with status {status}"
    passed = len(cases) - skipped - len(bad)
    return Verdict(passed, skipped, len(bad), bool(reason), reason, round(seconds, 1))


def _lacks(case: ElementTree.Element, package: str) -> bool:
    error = case.find("error")
    return error is not None and f"No module named '{package}" in "".join(error.itertext())


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    report: Path
    log: Path
    start: float


def run(
    plan: Sequence[tuple[str, list[str]]], tests: Path, jobs: int, seconds: float
) -> Iterator[tuple[str, Verdict, str]]:
    """Run the files, `jobs` at a time; yields (file, verdict, what pytest printed), each when it is done.

    What is not done after `seconds` is stopped, and red.
    """
    begin = time.monotonic()
    waiting, running = list(plan), dict[str, _Running]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                late = time.monotonic() - begin > seconds
                while waiting and len(running) < jobs and not late:
                    name, more = waiting.pop(0)
                    running[name] = _start(name, more, tests, Path(folder), jobs)
                done = [name for name, one in running.items() if one.process.poll() is not None]
                for name in done:
                    one = running.pop(name)
                    verdict = verdict_of(one.report, one.process.returncode, time.monotonic() - one.start)
                    yield name, verdict, one.log.read_text(encoding="utf-8", errors="replace")
                if late:
                    for name, one in running.items():
                        text = one.log.read_text(encoding="utf-8", errors="replace")
                        yield name, Verdict(reason="it was not done in time", seconds=seconds), text
                    yield from ((name, Verdict(reason="there was no time to run it"), "") for name, _ in waiting)
                    return
                time.sleep(0.05)
        finally:
            for one in running.values():
                one.process.kill()
                one.process.wait()


def _start(name: str, more: Sequence[str], tests: Path, folder: Path, jobs: int) -> _Running:
    report, log = (folder / f"{name.replace('/', '-')}.{kind}" for kind in ("xml", "log"))
    plugins = ["-p", "benchmarks", "-p", "benchmarks.dev.without", "-p", "no:cacheprovider"]
    file = tests / name.partition("#")[0]
    command = [sys.executable, "-m", "pytest", *plugins, "-q", f"--junitxml={report}", *more, str(file)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    path = os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=tests.parent, env=variables)
    return _Running(process, report, log, time.monotonic())


def red_areas(report: Path, commit: str) -> dict[str, str]:
    """Area -> why it is red, by the gate.json at `report`.

    An area is green where one of its tests was run and passed, and none failed. A report that cannot be read or that
    is about another tree makes every area red.
    """
    wanted = areas(("cpu", "cuda"))
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        files = {name: Verdict(**verdict) for name, verdict in content["files"].items()}
        measured = content["commit"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return dict.fromkeys(wanted, f"{report} is no report of a gate")
    if measured != commit:
        return dict.fromkeys(wanted, f"the gate was run on {measured}, not on {commit}")
    red = {}
    for area in sorted(wanted):
        own = {name: verdict for name, verdict in files.items() if belongs(name, area)}
        bad = [f"{name}: {verdict.reason}" for name, verdict in own.items() if verdict.red]
        if bad:
            red[area] = bad[0]
        elif not sum(verdict.passed for verdict in own.values()):
            red[area] = "no test of it was run and passed"
    return red


def _line(name: str, verdict: Verdict) -> str:
    counts = f"{verdict.passed} passed, {verdict.skipped} skipped, {verdict.failed} failed"
    return f"{name}: {counts}, {verdict.seconds:.0f} s{f'; {verdict.reason}' if verdict.reason else ''}"


def _save(out: Path, commit: str, files: Mapping[str, Verdict], logs: Sequence[str]) -> None:
    content = {"commit": commit, "files": {name: asdict(verdict) for name, verdict in files.items()}}
    write_atomic(out / "gate.json", json.dumps(content, indent=1) + "\n")
    write_atomic(out / "gate.log", "\n".join(logs))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dev.gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop what is not done after this time")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="files at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder of gate.json and gate.log")
    given = parser.parse_args(argv)
    if importlib.util.find_spec("pytest") is None:
        print("gate: pytest is not installed, so no test was run; each case still checks itself before it is timed")
        return 3
    commit, plan = find_source(TREE).commit, planned(TREE / "tests")
    files = {name: Verdict(reason="the gate was stopped before it was done") for name, _ in plan}
    logs: list[str] = []
    _save(given.out, commit, files, logs)
    for name, verdict, text in run(plan, TREE / "tests", given.jobs, given.seconds):
        files[name] = verdict
        print(_line(name, verdict), flush=True)
        if verdict.red:
            logs.append(f"=== {name}\n{text[-20000:]}")
        _save(given.out, commit, files, logs)
    red = red_areas(given.out / "gate.json", commit)
    for area in sorted(areas() & red.keys()):
        print(f"red: {area}: {red[area]}")
    return 1 if any(verdict.red for verdict in files.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
