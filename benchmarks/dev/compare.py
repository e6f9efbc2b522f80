"""Measure this tree against another revision: python -m benchmarks.dev.compare BASE [--only sample] [--quick]

BASE is checked out into a git worktree. Both trees run the same cases in turn, twice; what moved beyond the spread of
both is printed. Nothing is recorded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from ..results import Row, read
from ..table import console, shown_number, title
from .checkout import TREE


@dataclass(frozen=True)
class Change:
    """One way's times in both trees, ms; `ratio` is new over base."""

    case: str
    parameters: str
    way: str
    base: float
    new: float
    beyond_noise: bool

    @property
    def ratio(self) -> float:
        return self.new / self.base


def changes(base: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """What both sides timed. Beyond the noise: the ranges from p20 to p80 over all runs do not meet, and medians
    differ by more than 3 %."""
    sides: list[dict[tuple[str, ...], list[Row]]] = []
    for rows in (base, new):
        side: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if row.metric == "time":
                side.setdefault(row.key, []).append(row)
        sides.append(side)
    found = []
    for key in sides[0].keys() & sides[1].keys():
        a, b = sides[0][key], sides[1][key]
        before, after = (sum(r.p50 for r in rows) / len(rows) for rows in (a, b))
        apart = max(r.p80 for r in a) < min(r.p20 for r in b) or max(r.p80 for r in b) < min(r.p20 for r in a)
        moved = apart and abs(after / before - 1) > 0.03
        found.append(Change(key[0], key[3], key[1], before, after, moved))
    return sorted(found, key=lambda c: (c.case, c.parameters, c.way))


def _measured(tree: Path, options: Sequence[str], out: Path) -> list[Row]:
    bench = ["-c", "import benchmarks; from dwm_fast.cli import main; main()", "bench"]
    done = subprocess.run([sys.executable, *bench, "--out", str(out), *options], cwd=tree, check=False)
    if done.returncode > 1:
        raise SystemExit(f"compare: {tree} could not be measured")
    return [row for path in sorted(out.glob("*.csv")) for row in read(path)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dev.compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("base", help="revision to compare with")
    parser.add_argument("--only", default="", help="comma-separated beginnings of case names")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(argv)
    options = ["--device", given.device, "--only", given.only, *(["--quick"] if given.quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        base_tree = Path(folder) / "base"
        git = ["git", "-C", str(TREE), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(base_tree), given.base], check=True)
        try:
            rows: dict[str, list[Row]] = {"base": [], "new": []}
            for turn in range(2):
                for side, tree in (("base", base_tree), ("new", TREE)):
                    rows[side] += _measured(tree, options, Path(folder) / f"{side}-{turn}")
        finally:
            subprocess.run([*git, "remove", "--force", str(base_tree)], check=True)
    screen = console()
    for change in changes(rows["base"], rows["new"]):
        mark = ("faster" if change.ratio < 1 else "SLOWER") if change.beyond_noise else ""
        screen.print(Text(f"{title(change.case, change.parameters)}"))
        times = f"{shown_number(change.base)} -> {shown_number(change.new)} ms"
        screen.print(Text(f"  {change.way:<46}{times:>28}  x{change.ratio:.3f}  {mark}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
