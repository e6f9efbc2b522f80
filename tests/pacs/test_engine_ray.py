"""Stages as tasks of Ray, begun here: the numbers of a serial run, though a task's process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dwm_fast.errors import BackendUnavailable, InputError
from dwm_fast.pacs.engine_ray import Ray, do
from dwm_fast.pacs.engines import order
from dwm_fast.pacs.study import Study

from .study_for_tests import stages, tiny, without_seconds
from .test_engines import KILLS, children, written
from .worker_for_tests import CONFIG, MODULE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results: {})
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # tasks import this package of tests


def test_two_workers_of_which_one_is_killed_give_the_numbers_of_a_serial_run(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    serial = Study(CONFIG, whole).run()
    parted.mkdir()
    (parted / "kill").touch()
    told: list[Any] = []
    results = Study(CONFIG, parted).run_on(Ray(2, module=MODULE), lambda *what: told.append(what))
    assert without_seconds(results) == without_seconds(serial)
    assert not (parted / "kill").exists()
    assert set(written(parted).values()) == {1}
    assert set(written(parted)) == set(stages(whole))
    names = [s.name for s in Study(CONFIG, whole).stages()]
    assert sum(kind == "begun" for kind, _, _ in told) == len(names) + 1  # the one that was killed, again
    assert sorted(name for kind, name, _ in told if kind == "done") == sorted(names)


def workers(pid: int) -> list[int]:
    """Workers of Ray below a process."""
    found, below = [], children(pid)
    while below:
        one = below.pop()
        with contextlib.suppress(OSError):
            below += children(one)
            if (Path("/proc") / str(one) / "cmdline").read_bytes().startswith(b"ray::"):
                found.append(one)
    return found


def killed_at_a_moment_of_its_own(number: int, tmp_path: Path) -> None:
    """A driver, or a worker while it does a stage; in the run folder nothing is lost and nothing done twice."""
    chance = random.Random(number)
    serial = Study(CONFIG, tmp_path / "serial").run()
    folder = tmp_path / "killed"
    environment = {**os.environ, "SLOW": "0.3"}
    driver = subprocess.Popen([sys.executable, "-m", MODULE, "drive", str(folder), "ray"], env=environment)
    stop, wanted = time.monotonic() + 120, chance.randrange(4)
    while (len(stages(folder)) < wanted or not workers(driver.pid)) and time.monotonic() < stop:
        assert driver.poll() is None, "the driver ended before anything was killed"
        time.sleep(0.02)
    time.sleep(chance.random())
    busy = workers(driver.pid)
    if number % 2 == 0 or not busy:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        Study(CONFIG, folder).run_on(Ray(2, module=MODULE))
    else:
        os.kill(chance.choice(busy), signal.SIGKILL)
        assert driver.wait(120) == 0
    assert without_seconds(json.loads((folder / "results.json").read_text())) == without_seconds(serial)
    assert set(written(folder).values()) == {1}


if KILLS > 1:  # a campaign; one worker is killed above
    test_killed_at_any_moment = pytest.mark.parametrize("number", range(KILLS))(killed_at_a_moment_of_its_own)


def test_a_machine_that_does_not_see_the_run_folder_is_one_line(tmp_path: Path) -> None:
    given = {**order(Study(CONFIG, tmp_path)), "folder": str(tmp_path / "elsewhere")}
    with pytest.raises(InputError, match=r"run folder .*elsewhere is not there on .*; expected one that every machine"):
        do(given, "source-photo-seed0")


def test_without_ray_or_with_impossible_numbers_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--workers 0; expected"):
        Ray(0)
    with pytest.raises(InputError, match=r"--gpus-per-stage -1; expected"):
        Ray(1, gpus=-1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match=r"needs Ray; type pip install 'dwm-fast\[ray\]'"):
        Study(CONFIG, tmp_path).run_on(Ray(1))
