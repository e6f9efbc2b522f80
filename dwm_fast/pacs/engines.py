"""Stages on several processes: which are ready, who does them, and what happens when one of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch

from dwm_fast.errors import DwmError, InputError

if TYPE_CHECKING:
    from dwm_fast.pacs.study import Stage, Study

TRIES = 3
"""How often a stage is begun whose process is killed."""
Told = Callable[[str, str, str], None]
"""Told of a stage by its name: ("begun", name, ""), ("at", name, figures of a step) or ("done", name, figures)."""


class Engine(Protocol):
    """What does the stages of a study that are not done: in any number of processes, each after those it needs."""

    def run(self, study: Study, stages: Sequence[Stage], tell: Told) -> None:
        """Do the stages; `tell` is called by one thread at a time. InputError or DwmError where one cannot be done."""


class Schedule:
    """Which stage is next. Calls may come from several threads.

    Args:
        stages: what is to be done, in the order in which it is begun where that is free; what a stage needs beside
            these is done already.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        names = {stage.name for stage in stages}
        self._needs = {stage.name: {name for name in stage.needs if name in names} for stage in stages}
        self._tries = dict.fromkeys(self._needs, 0)
        self._changed = threading.Condition()
        self._open = list(self._needs)
        self.error: BaseException | None = None

    def take(self) -> str | None:
        """A stage whose needs are done, after waiting for one; None when there is nothing left to do."""
        with self._changed:
            while self._open and self.error is None:
                for name in self._open:
                    if not self._needs[name]:
                        self._open.remove(name)
                        self._tries[name] += 1
                        return name
                self._changed.wait()
            return None

    def done(self, name: str) -> None:
        """A stage is finished."""
        with self._changed:
            for needs in self._needs.values():
                needs.discard(name)
            self._changed.notify_all()

    def lost(self, name: str, how: str) -> None:
        """The process that was at a stage has ended: another may begin it, a few times."""
        with self._changed:
            if self._tries[name] < TRIES:
                self._open.insert(0, name)
            else:
                self.fail(DwmError(f"stage {name}: its process ended {TRIES} times ({how}); finished stages are kept"))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Begin nothing more; the first error is kept."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()


@dataclass(frozen=True)
class Processes:
    """A pool of processes on this machine.

    Attributes:
        workers: number of processes.
        module: what they run, as `python -m` has it.
    """

    workers: int
    module: str = "dwm_fast.pacs.worker"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}; expected a whole number of at least 1")

    def run(self, study: Study, stages: Sequence[Stage], tell: Told) -> None:
        """As `Engine.run`. Processes end with this one, and with an error that leaves this function."""
        schedule, told = Schedule(stages), threading.Lock()

        def tell_alone(*what: str) -> None:
            with told:
                tell(*what)

        pool = [_Worker(study, self.module, schedule, tell_alone) for _ in range(min(self.workers, len(stages)))]
        try:
            for worker in pool:
                worker.thread.start()
            for worker in pool:
                while worker.thread.is_alive():
                    worker.thread.join(0.2)  # so that Ctrl-C is heard
        except BaseException as error:
            schedule.fail(error)
            raise
        finally:
            for worker in pool:
                worker.end()
        if schedule.error is not None:
            raise schedule.error


class _Worker:
    """A thread that has a process do one stage after the other, and begins another process where it ends."""

    def __init__(self, study: Study, module: str, schedule: Schedule, tell: Callable[..., None]) -> None:
        self.study, self.module, self.schedule, self.tell = study, module, schedule, tell
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def end(self) -> None:
        """End the process, if there is one."""
        process = self.process
        if process is not None:
            with process:
                process.kill()

    def _work(self) -> None:
        try:
            while (name := self.schedule.take()) is not None:
                self.tell("begun", name, "")
                if self._do(name):
                    self.schedule.done(name)
                else:
                    self.schedule.lost(name, self._ended())
        except BaseException as error:
            self.schedule.fail(error)

    def _ended(self) -> str:
        """How the process has ended; the next stage gets another."""
        process, self.process = self.process, None
        assert process is not None
        with process:
            process.kill()  # it has closed its answers, whatever else it does
        return _how(process.returncode)

    def _do(self, name: str) -> bool:
        """Whether the process did the stage; False where it ended."""
        if self.process is None:
            self.process = self._begin()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(name, file=process.stdin, flush=True)
        for line in process.stdout:
            kind, text = json.loads(line)
            if kind == "error":
                raise InputError(text)
            if kind == "broken":
                raise DwmError(f"stage {name}: {text}")
            self.tell(kind, name, text)
            if kind == "done":
                return True
        return False

    def _begin(self) -> subprocess.Popen[str]:
        given = json.dumps(order(self.study))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of(self.study))}
        process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(given, file=process.stdin, flush=True)
        return process


def threads_of(study: Study) -> int:
    """Threads on which every process computes: as many as a serial run here would, so that the sums are the same."""
    return study.config.threads or torch.get_num_threads()


def order(study: Study) -> dict[str, Any]:
    """What another process needs to make the same study."""
    return {
        "config": study.config.to_dict(),
        "folder": str(study.folder.resolve()),
        "threads": threads_of(study),
    }


def made_from(given: Mapping[str, Any]) -> Study:
    """The study of an `order`."""
    from dwm_fast.pacs.config import builtin_defaults, from_dict
    from dwm_fast.pacs.study import Study

    torch.set_num_threads(given["threads"])
    return Study(from_dict(given["config"], builtin_defaults()), Path(given["folder"]))


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Do stages, a name each line, after a line with the `order`; answer in lines of JSON. Ends with `orders`."""

    def answer(kind: str, text: str) -> None:
        print(json.dumps([kind, text]), file=answers, flush=True)

    study, lines = None, iter(orders)
    given = json.loads(next(lines))
    for line in lines:
        try:
            study = study or made_from(given)
            study.lab.report = _Slowly(lambda text: answer("at", text))
            answer("done", study.run_stage(line.rstrip("\n")))
        except DwmError as error:
            answer("error", str(error))
        except Exception as error:
            answer("broken", f"{type(error).__name__}: {error}")
            raise


class _Slowly:
    """Figures of training steps as text, a few times a second at most: reading them may wait for a device."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.last = say, 0.0

    def __call__(self, figures: Mapping[str, torch.Tensor]) -> None:
        if time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.say(", ".join(f"{name} {float(value):.3g}" for name, value in figures.items()))


def _how(status: int) -> str:
    """Why a process ended, from its exit status."""
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def in_order(stages: Sequence[Stage]) -> Iterator[Stage]:
    """Those of `stages` that others need first, else as they are."""
    needed = {name for stage in stages for name in stage.needs}
    yield from (stage for stage in stages if stage.name in needed)
    yield from (stage for stage in stages if stage.name not in needed)
