"""A process of `--engine processes`: stages as they are asked for on stdin, answers on stdout; ends with its driver."""

from __future__ import annotations

import os
import sys
import threading
import time

from dwm_fast.pacs.engines import serve

_SECONDS = 0.5


def _end_with(parent: int) -> None:
    """End this process, in the middle of a stage too, when the one that began it is gone."""
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve until stdin ends. What is printed goes to stderr: stdout is for answers alone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
