"""Stages as tasks of Ray, begun here: the numbers of a serial run, though a task's process is killed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dwm_fast.errors import BackendUnavailable, InputError
from dwm_fast.pacs.engine_ray import Ray, do
from dwm_fast.pacs.engines import order
from dwm_fast.pacs.study import Study

from .study_for_tests import stages, tiny, without_seconds
from .test_engines import written
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
