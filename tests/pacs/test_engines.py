"""Stages on several processes: the numbers of a serial run, whoever is killed.

DWM_FAST_STUDY_KILLS sets how many studies are killed at a moment of their own (default 1; a full campaign uses 20).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dwm_fast.errors import DwmError, InputError
from dwm_fast.pacs.engines import TRIES, Processes, Schedule, in_order
from dwm_fast.pacs.study import Stage, Study

from .study_for_tests import config, stages, tiny, without_seconds
from .worker_for_tests import CONFIG, MODULE

KILLS = int(os.environ.get("DWM_FAST_STUDY_KILLS", "1"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results: {})


def stage(name: str, *needs: str) -> Stage:
    return Stage(name, name, lambda: "", [], needs)


def written(folder: Path) -> Counter[str]:
    return Counter((folder / "written").read_text().split())


def test_a_stage_is_begun_when_those_it_needs_are_done_and_a_few_times_when_its_process_ends() -> None:
    schedule = Schedule([stage("b", "a"), stage("a", "before"), stage("c", "a", "b")])
    assert schedule.take() == "a"
    schedule.done("a")
    for _ in range(TRIES - 1):
        assert schedule.take() == "b"
        schedule.lost("b", "signal 9")
    assert schedule.take() == "b"
    schedule.done("b")
    assert schedule.take() == "c"
    assert schedule.take() is None
    for _ in range(TRIES - 1):
        schedule.lost("c", "signal 9")
        assert schedule.error is None or schedule.take() is None
        schedule.take()
    schedule.lost("c", "signal 9")
    assert isinstance(schedule.error, DwmError)
    assert f"stage c: its process ended {TRIES} times (signal 9)" in str(schedule.error)
    assert [s.name for s in in_order([stage("x"), stage("b", "a"), stage("a")])] == ["a", "x", "b"]


def test_two_processes_of_which_one_is_killed_give_the_numbers_of_a_serial_run(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    serial = Study(CONFIG, whole).run()
    parted.mkdir()
    (parted / "kill").touch()
    told: list[Any] = []
    results = Study(CONFIG, parted).run_on(Processes(2, MODULE), lambda *what: told.append(what))
    assert without_seconds(results) == without_seconds(serial)
    assert not (parted / "kill").exists()
    assert set(written(parted).values()) == {1}
    assert set(written(parted)) == set(stages(parted)) == set(stages(whole))
    names = [s.name for s in Study(CONFIG, whole).stages()]
    begun = Counter(name for kind, name, _ in told if kind == "begun")
    assert sum(begun.values()) == len(names) + 1  # the one that was killed, again
    assert sorted(name for kind, name, _ in told if kind == "done") == sorted(names)
    assert Study(CONFIG, parted).run_on(Processes(2, "nothing.is.begun")) == results


def children(pid: int) -> list[int]:
    """Processes that a process has begun."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment_nothing_is_lost_and_nothing_done_twice(number: int, tmp_path: Path) -> None:
    """A driver (first) or a worker; a driver takes its processes along, and another one goes on."""
    chance = random.Random(number)
    serial = Study(CONFIG, tmp_path / "serial").run()
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", MODULE, "drive", str(folder)]
    driver = subprocess.Popen(command, env={**os.environ, "SLOW": "0.3"})
    stop, wanted = time.monotonic() + 60, 2 if number == 0 else chance.randrange(4)
    while (len(stages(folder)) < wanted or len(children(driver.pid)) < 2) and time.monotonic() < stop:
        time.sleep(0.02)
    time.sleep(chance.random() * 0.3 * (number > 0))
    if number % 2 == 0:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert number > 0 or 0 < sum(written(folder).values()) < 6
        Study(CONFIG, folder).run_on(Processes(2, MODULE))
    else:
        os.kill(chance.choice(children(driver.pid)), signal.SIGKILL)
        assert driver.wait(60) == 0
    assert without_seconds(json.loads((folder / "results.json").read_text())) == without_seconds(serial)
    assert set(written(folder).values()) == {1}


def test_a_stage_that_cannot_be_done_is_one_line_and_others_are_kept(tmp_path: Path) -> None:
    wild = config(sources=["photo"], targets=["sketch"], methods=["none"], tune={"none": {"lr": 1e30}}, threads=1)
    with pytest.raises(InputError, match=r"stage tune-photo-sketch-none.* is not finite.*--tune-lr"):
        Study(wild, tmp_path).run_on(Processes(1, MODULE))
    assert stages(tmp_path) == ["source-photo-seed0"]
    with pytest.raises(InputError, match=r"--workers 0; expected"):
        Processes(0)
