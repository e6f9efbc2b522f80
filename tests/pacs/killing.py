"""Studies in processes of their own that end themselves by SIGKILL at a chosen point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

CALLS = 2
"""A process is killed at the second report after its file has appeared: within the next stage, never between two."""


class Runner:
    """A process with torch loaded that forks one for every run. Its children end with it."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def __call__(self, folder: Path, kill_after: str = "") -> int:
        """Run in `folder`; return the exit status. Killed in the stage after the one that leaves file `kill_after`."""
        assert self._process.stdin
        assert self._process.stdout
        print(folder, kill_after, sep="\t", file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process and all that it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


def serve(run: Callable[[Path, Callable[[], None]], object]) -> None:
    """`run(folder, report)` in a forked process for each line of stdin; `report` is called during every stage."""
    for line in sys.stdin:
        folder, kill_after = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            _run_and_exit(run, Path(folder), kill_after)
        print(os.waitpid(pid, 0)[1], flush=True)


def _run_and_exit(run: Callable[[Path, Callable[[], None]], object], folder: Path, kill_after: str) -> None:
    calls = 0

    def report() -> None:
        nonlocal calls
        calls += bool(kill_after) and (folder / kill_after).exists()
        if calls == CALLS:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        torch.set_num_threads(1)
        run(folder, report)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
