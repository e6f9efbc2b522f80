"""Run the suite on this checkout and record it.

python -m benchmarks.dev.run [--quick] [--device cpu|cuda] [--only sample,step] [--without bank] [--out FOLDER]

Every case passes its own check before it is timed; a red one gives no figures and makes the exit status 1. Rows are
written to FOLDER/<device>.csv as soon as a way is timed. An edited tree, which no commit describes, is not recorded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dwm_fast.errors import DwmError, InputError

from ..run import COMPILE, Suite, context_of, entries_of, result_file, run_suite
from .checkout import TREE
from .gate import red_areas
from .source import RESULTS, find_source


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dev.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="smaller problems, no torch.compile")
    parser.add_argument("--only", default="", help="comma-separated beginnings of case names")
    parser.add_argument("--without", default="", help="beginnings of names of cases that are left out")
    parser.add_argument("--torch-compile", choices=COMPILE, default="last", help="when its ways are measured")
    parser.add_argument("--out", type=Path, help="folder of the result file; by default $OUT or benchmarks/results")
    parser.add_argument("--allow-dirty", action="store_true", help="measure an edited tree and record nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--gate", type=Path, help="gate.json of benchmarks.dev.gate; what is red there is not timed")
    return parser.parse_args(argv)


def record(given: argparse.Namespace) -> int:
    """Measure and record what the options say. InputError for what is not there, and for an edited tree."""
    context = context_of(given.device, given.quick)
    entries = entries_of(context, given.only, given.without)
    source = find_source(TREE)
    folder = given.out or Path(os.environ.get("OUT") or TREE / RESULTS)
    own = folder.resolve() == (TREE / RESULTS).resolve()
    if source.dirty and own and not given.allow_dirty:
        raise InputError(
            f"{source.dirty} is edited; commit it, name another folder with --out (report takes its rows in once a "
            f"commit has these files), or run with --allow-dirty to print without recording"
        )
    file = None if source.dirty and given.allow_dirty else result_file(folder, context)
    red = red_areas(given.gate, source.commit) if given.gate else {}
    return run_suite(Suite(context, source.commit, file, red), entries, given.seconds, given.torch_compile)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return record(_options(argv))
    except DwmError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
