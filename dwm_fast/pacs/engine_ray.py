"""Stages as tasks of Ray: on this machine, or on a cluster by its address. Needs the extra `ray`."""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwm_fast.errors import BackendUnavailable, DwmError, InputError
from dwm_fast.pacs.engines import Schedule, Told, made_from, order, threads_of

if TYPE_CHECKING:
    from dwm_fast.pacs.study import Stage, Study

_MODULE = "dwm_fast.pacs.engine_ray"
_studies: dict[str, Study] = {}
"""In a worker: the study of the last order, so that its next stage need not read the images again."""


@dataclass(frozen=True)
class Ray:
    """Tasks of Ray. Results pass through the run folder, which every machine of a cluster has to see under one path.

    Attributes:
        workers: stages done at a time.
        address: of a running cluster ("auto" finds the one of this machine); None begins Ray here and ends it.
        gpus: GPUs of a stage; a fraction lets several stages share one. 0 for stages on a CPU.
        module: whose `do` the tasks call.
    """

    workers: int
    address: str | None = None
    gpus: float = 0.0
    module: str = _MODULE

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}; expected a whole number of at least 1")
        if not 0 <= self.gpus < float("inf"):
            raise InputError(f"--gpus-per-stage {self.gpus}; expected a number of at least 0, such as 0.25")

    def run(self, study: Study, stages: Sequence[Stage], tell: Told) -> None:
        """As `Engine.run`. A task whose process ends is begun again, a few times."""
        if not stages:
            return
        ray = _ray()
        given, threads = order(study), threads_of(study)
        with self._cluster(ray, threads):
            options = {"num_cpus": threads, "num_gpus": self.gpus, "max_retries": 0}
            # By name, not by value: what a task runs is what is installed where it runs.
            task = ray.remote(**options)(_call)
            Driver(Schedule(stages), tell, lambda name: ray.get(task.remote(self.module, given, name)), ray).run(
                min(self.workers, len(stages))
            )

    @contextlib.contextmanager
    def _cluster(self, ray: Any, threads: int) -> Iterator[None]:
        """Ray while this lasts; one that was running before is left as it is."""
        mine = not ray.is_initialized()
        if mine:
            here = {"num_cpus": self.workers * threads, "include_dashboard": False} if self.address is None else {}
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="error", **here)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"--address {self.address}: {error}; start Ray there, or leave the flag out"
                ) from error
        try:
            yield
        finally:
            if mine:
                ray.shutdown()


class Driver:
    """Threads that have tasks do one stage after the other.

    Args:
        schedule: which is next. tell: as `Engine.run`'s.
        do: does a stage by its name and returns its figures.
        ray: the package, for its errors.
    """

    def __init__(self, schedule: Schedule, tell: Told, do: Callable[[str], str], ray: Any) -> None:
        self._schedule, self._tell, self._do, self._ray = schedule, tell, do, ray
        self._telling = threading.Lock()

    def run(self, workers: int) -> None:
        """Until nothing is left; raises the first error."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # so that Ctrl-C is heard
        except BaseException as error:
            self._schedule.fail(error)
            raise
        if self._schedule.error is not None:
            raise self._schedule.error

    def _say(self, *what: str) -> None:
        with self._telling:
            self._tell(*what)

    def _work(self) -> None:
        errors = self._ray.exceptions
        try:
            while (name := self._schedule.take()) is not None:
                self._say("begun", name, "")
                try:
                    figures = self._do(name)
                except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
                    self._schedule.lost(name, type(error).__name__)
                    continue
                except errors.RayTaskError as error:
                    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
                    raise cause if isinstance(cause, DwmError) else DwmError(f"stage {name}: {cause}") from error
                self._say("done", name, figures)
                self._schedule.done(name)
        except BaseException as error:
            self._schedule.fail(error)


def do(given: Mapping[str, Any], name: str) -> str:
    """A stage of the study of an `order`, in a task; the stage's figures."""
    if not Path(given["folder"]).is_dir():
        raise InputError(
            f"the run folder {given['folder']} is not there on {socket.gethostname()}; expected one that every machine "
            "of the cluster sees under this path: give it by --out"
        )
    key = json.dumps(given, sort_keys=True)
    if key not in _studies:
        _studies.clear()
        _studies[key] = made_from(given)
    return _studies[key].run_stage(name)


def _call(module: str, given: Mapping[str, Any], name: str) -> str:
    found: str = importlib.import_module(module).do(given, name)
    return found


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise BackendUnavailable("--engine ray needs Ray; type pip install 'dwm-fast[ray]'") from error
    return ray
