"""Tables measured on a device: which way was faster for a shape, and with which tiles (`dwm_fast._bench.tune`)."""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from dwm_fast._files import cache_folder
from dwm_fast.ops.problem import Problem

TABLE_FORMAT = "dwm-fast dispatch 1"


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def table_paths(name: str) -> list[Path]:
    """Files that may hold the table of the device called `name`, the first that is there counts.

    The user's own measurement outranks the one that comes with the library, in a checkout or installed.
    """
    package = Path(__file__).parents[1]
    own = cache_folder()
    folders = [*([own] if own else []), package / "_bench" / "results", package.parent / "benchmarks" / "results"]
    return [folder / f"dispatch-{slug(name)}.json" for folder in folders]


@functools.cache
def table(name: str) -> tuple[dict[str, Any], ...]:
    """Rows of the device's table, () where there is none; a file that cannot be read is one warning and no table."""
    for path in table_paths(name) if name else []:
        if path.is_file():
            try:
                return read_table(path)
            except (OSError, ValueError) as error:
                warnings.warn(f"dwm_fast: {path} is not used: {error}", RuntimeWarning, stacklevel=2)
    return ()


def read_table(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a table file. ValueError where it is none: what is wrong."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != TABLE_FORMAT:
        raise ValueError(
            f"expected a table of the format '{TABLE_FORMAT}'; measure it with python -m dwm_fast._bench.tune"
        )
    rows = content.get("rows")
    numbers = ("m", "n", "k", "taps", "one_pass_us", "staged_us")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("'rows' is no list of rows")
    for i, row in enumerate(rows):
        bad = [f for f in numbers if not isinstance(row.get(f), (int, float)) or not row[f] > 0]
        bad += [f for f in ("op", "dtype") if not isinstance(row.get(f), str)]
        if bad:
            raise ValueError(f"row {i} lacks {', '.join(bad)}, or they are not above 0")
    return tuple(rows)


@functools.lru_cache(maxsize=4096)
def nearest(problem: Problem) -> dict[str, Any] | None:
    """The measured row nearest to `problem` in the logarithms of M, N and K, within a factor of two in each.

    Of two that are as near, the one with more rows: tiles that cover them cover these rows too.
    """
    best: dict[str, Any] | None = None
    least = (math.inf, True)
    dtype = dtype_name(problem)
    for row in table(problem.name):
        if (row["op"], row["dtype"], row["taps"]) != (problem.op, dtype, problem.taps):
            continue
        steps = [
            abs(math.log2(max(own, 1) / row[f])) for f, own in (("m", problem.m), ("n", problem.n), ("k", problem.k))
        ]
        distance = (sum(steps), row["m"] < problem.m)
        if max(steps) <= 1 and distance < least:
            best, least = row, distance
    return best


def dtype_name(problem: Problem) -> str:
    """The dtype in a table: fp32 with and without TF32 are two."""
    return "tf32" if problem.dtype == torch.float32 and problem.tf32 else str(problem.dtype).removeprefix("torch.")


def forget_tables() -> None:
    """Read the tables anew at the next choice, after a measurement."""
    table.cache_clear()
    nearest.cache_clear()
