"""Take result files from another machine into this checkout: python -m benchmarks.merge FILE...

A machine without git stamps its rows with a fingerprint of the files it measured. Rows are taken in when a recent
commit here has that fingerprint, and then carry the commit; others are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .checkout import TREE
from .results import ResultFile, Row, read
from .source import RESULTS, Source, resolve


def with_commits(rows: Sequence[Row], tree: Path) -> list[Row]:
    """Rows whose fingerprints are replaced by commits. ValueError for a fingerprint that no recent commit has."""
    known: dict[str, str] = {}
    for commit in {row.commit for row in rows}:
        found = resolve(tree, commit) if commit.startswith("tree:") else commit
        if found is None:
            raise ValueError(f"no recent commit is {commit}: the rows come from an edited tree")
        known[commit] = found
    return [replace(row, commit=known[row.commit]) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    status = 0
    for path in parser.parse_args(argv).files:
        try:
            rows = with_commits(read(path), TREE)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            status = 1
            continue
        target = TREE / RESULTS / path.name
        ResultFile(target).record(rows, Source("merged"))
        print(f"{path}: {len(rows)} rows into {target.relative_to(TREE)}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
