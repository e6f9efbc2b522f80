"""Processes that do tiny stages for the tests of engines: a worker, and with "drive FOLDER" a driver of two;
"drive FOLDER ray" drives two of Ray.

A worker notes every stage that it keeps in the file `written` of the run folder. Where that holds a file `kill`, the
first worker to come to the end of a stage deletes it and is killed there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwm_fast.pacs import backbones, engine_ray, study, worker
from dwm_fast.pacs.engines import Processes
from dwm_fast.pacs.pairs import figures
from dwm_fast.pacs.stages import StageFolder
from dwm_fast.pacs.study import Study

from .study_for_tests import NarrowNet, config, tiny_data

MODULE = "tests.pacs.worker_for_tests"
CONFIG = config(sources=["photo"], targets=["sketch", "art"], methods=["none", "naive"], threads=1)


def shrink() -> None:
    """As `study_for_tests.tiny`, for good, and without figures."""
    backbones.SmallResNet = NarrowNet
    study.procedural = lambda image_size: tiny_data()  # type: ignore[attr-defined]
    figures.draw_all = lambda results: {}


def note_stages() -> None:
    """Keep a list of what is written, be slow enough to be killed, and end where `kill` says so."""
    write = StageFolder.write

    def noted(self: StageFolder, name: str, *args: Any, **kwargs: Any) -> Any:
        kill = self.folder.parent / "kill"
        if kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("SLOW", 0)))
        kept = write(self, name, *args, **kwargs)
        with (self.folder.parent / "written").open("a") as file:
            file.write(f"{name}\n")
        return kept

    StageFolder.write = noted  # type: ignore[method-assign]


_tasks = 0


def do(given: Mapping[str, Any], name: str) -> str:
    """What a task of Ray calls in the place of `engine_ray.do`."""
    global _tasks
    if _tasks == 0:
        shrink()
        note_stages()
    _tasks += 1
    return engine_ray.do(given, name)


if __name__ == "__main__":
    shrink()
    if sys.argv[1:2] == ["drive"]:
        two = engine_ray.Ray(2, module=MODULE) if sys.argv[3:] == ["ray"] else Processes(2, MODULE)
        Study(CONFIG, Path(sys.argv[2])).run_on(two)
    else:
        note_stages()
        worker.main()
