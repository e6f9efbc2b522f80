"""The device script with a Python that only notes what it is asked: order, time, what is left out, what is chosen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dwm_fast._bench.dev.checkout import TREE

STEPS = ["machine", "tests", "tune", "suite", "sanitizer", "summary"]
_PYTHON = """#!/bin/bash
echo "python $*" >>"$LOG"
case "$*" in
    -) cat >/dev/null; exit "${GPU_STATUS:-0}" ;;
    *dev.gate*) [ -n "${NO_PYTEST:-}" ] && exit 3; mkdir -p build/gate; echo {} >build/gate/gate.json ;;
    *dev.source) echo tree:0123 ;;
    *dev.run*) echo "a,b" >"$OUT/chip.csv"; exit "${SUITE_STATUS:-0}" ;;
esac
"""
_SANITIZER = """#!/bin/bash
echo "sanitizer caching-off=$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>"$LOG"
"""


class Device:
    """A bare copy of the script in a tree of its own, beside programs that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "benchmarks").mkdir()
        shutil.copy(TREE / "benchmarks" / "device.sh", folder / "benchmarks")
        (folder / "bin").mkdir()
        for name, text in (("python", _PYTHON), ("compute-sanitizer", _SANITIZER)):
            path = folder / "bin" / name
            path.write_text(text)
            path.chmod(0o755)

    def run(self, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        known = {"PATH": path, "LOG": str(self.log), "PYTHON": "python", "OUT": str(self.folder / "out")}
        command = ["bash", str(self.folder / "benchmarks" / "device.sh"), *map(str, options)]
        return subprocess.run(command, env={**known, **variables}, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        """What was called one after the other: without what compiles beside the tests."""
        return [line for line in self.log.read_text().splitlines() if "--prepare" not in line]

    def prepared(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "--prepare" in line]

    def call(self, part: str) -> str:
        """The only call that has `part` in it, "" for none."""
        found = [line for line in self.calls() if part in line]
        assert len(found) <= 1
        return found[0] if found else ""


def _option(call: str, name: str) -> str:
    words = call.split()
    return words[words.index(name) + 1]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def _steps(printed: str) -> list[str]:
    return re.findall(r"^== (\w+) \(", printed, re.MULTILINE)


def test_a_call_without_options_does_everything_in_order_within_its_time(device: Device) -> None:
    done = device.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert _steps(done.stdout) == STEPS
    programs = [line.split(" --")[0] for line in device.calls() if "source" not in line]
    assert programs == [
        "python -",
        "python -m benchmarks.dev.gate",
        "python -m benchmarks.tune",
        "python -m benchmarks.dev.run",
        *["sanitizer caching-off=1"] * 2,
        "python -m benchmarks.dev.report",
    ]
    seconds = [float(_option(device.call(part), "--seconds")) for part in ("dev.gate", "tune", "dev.run")]
    assert seconds[0] == 570 * 45 // 100 - 25
    assert all(each > 0 for each in seconds)
    assert "--gate build/gate/gate.json" in device.call("dev.run")
    assert "--commit tree:0123" in device.call("tune")
    assert (device.folder / "out" / "gate.json").is_file()
    assert "--tool racecheck" in device.calls()[-2]
    assert device.calls()[-2].endswith("dev.sanitize one_pass")
    assert device.prepared() == ["python -m benchmarks.tune --prepare --jobs 4"]


def test_steps_are_left_out_as_asked_and_say_so(device: Device) -> None:
    done = device.run("--skip", "tests,tune,sanitizer")
    assert _steps(done.stdout) == STEPS
    assert done.stdout.count("left out, as asked") == 3
    assert [line for line in device.calls() if "gate" in line or "tune" in line or "sanitizer" in line] == []
    assert "gated by its own check alone" in done.stdout
    assert not device.prepared()
    assert float(_option(device.call("dev.run"), "--seconds")) > 500
    done = device.run("--skip", "suite")
    assert device.call("dev.run") == ""
    assert device.call("tune")


def test_the_report_of_an_earlier_call_gates_a_later_one_that_skips_the_tests(device: Device) -> None:
    device.run("--skip", "suite,tune,sanitizer")
    device.run("--skip", "tests,tune,sanitizer")
    assert "--gate build/gate/gate.json" in device.call("dev.run")
    device.run(NO_PYTEST="1")
    assert "--gate" not in device.call("dev.run")


def test_cases_are_chosen_by_options_that_reach_the_suite(device: Device) -> None:
    options = ["--only", "sample,step-masks", "--without", "step-masks-vit", "--torch-compile", "never"]
    device.run("--skip", "tests", *options)
    assert " ".join(options) in device.call("dev.run")


@pytest.mark.parametrize("limit", [1, 30, 59, 100, 140, 199, 250, 300, 331, 420, 570, 600])
def test_no_step_gets_time_that_is_not_there(device: Device, limit: int) -> None:
    done = device.run("--seconds", limit)
    assert done.returncode == 0
    assert _steps(done.stdout) == STEPS
    given = {part: device.call(part) for part in ("dev.gate", "benchmarks.tune", "dev.run")}
    for part, call in given.items():
        assert not call or 10 <= float(_option(call, "--seconds")) <= limit, part
    left_out = done.stdout.count("left out: it needs")
    asked = sum(bool(call) for call in given.values()) + any("sanitizer" in call for call in device.calls())
    assert left_out + asked == 4
    assert bool(given["dev.run"]) == (limit >= 50)


def test_a_suite_of_three_minutes_comes_before_the_table_of_ways_and_the_sanitizer(device: Device) -> None:
    device.run("--seconds", 200, "--skip", "tests")
    assert device.call("tune") == ""
    assert float(_option(device.call("dev.run"), "--seconds")) >= 200 - 45
    device.run("--skip", "tests")
    assert device.call("tune")
    assert 570 - 185 <= float(_option(device.call("dev.run"), "--seconds")) <= 570 - 170


def test_the_exit_status_is_the_suites(device: Device) -> None:
    assert device.run(SUITE_STATUS="1").returncode == 1
    assert device.call("dev.report")


def test_without_a_gpu_nothing_is_run(device: Device) -> None:
    done = device.run(GPU_STATUS="1")
    assert done.returncode == 2
    assert "no GPU that torch can use" in done.stdout
    assert device.calls() == ["python -"]


@pytest.mark.parametrize(
    "options",
    [["570"], ["--seconds"], ["--seconds", "-5"], ["--seconds", "x"], ["--skip", "test"], ["--only"], ["--x", "y"]],
)
def test_an_option_that_is_not_there_is_told_and_nothing_is_run(device: Device, options: list[str]) -> None:
    done = device.run(*options)
    assert done.returncode == 2
    assert "--skip tests,tune,suite,sanitizer" in done.stderr
    assert device.calls() == []
