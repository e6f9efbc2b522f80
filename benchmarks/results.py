"""Result files: one CSV row per measurement; a newer row replaces the older of the same key."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .measure import Case, Timing, Way, percentile
from .source import Source

_NOT_IN_KEY = "backend"
"""Parameter that says who computed: a faster backend replaces the figures of the one before."""


class DirtySource(Exception):
    """Rows of an edited tree, which no commit describes, are not recorded."""


@dataclass(frozen=True)
class Row:
    """One measurement. Percentiles are of the metric itself, so p20 of a bandwidth belongs to a slow round."""

    case: str
    way: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    parameters: str
    device: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        shown = [p for p in self.parameters.split(";") if not p.startswith(f"{_NOT_IN_KEY}=")]
        return (self.case, self.way, self.metric, ";".join(shown), self.device)

    def parameter(self, name: str) -> str:
        """Value of one parameter, "" where the row has none of that name."""
        found = [p.partition("=")[2] for p in self.parameters.split(";") if p.partition("=")[0] == name]
        return found[0] if found else ""


COLUMNS = [f.name for f in fields(Row)]


def parameters_text(parameters: dict[str, Any]) -> str:
    """name=value pairs in the order of their names, joined by semicolons."""
    return ";".join(f"{name}={parameters[name]}" for name in sorted(parameters))


def _number(value: float) -> float:
    return float(f"{value:.5g}")


def _three(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": _number(percentile(values, q)) for q in (20, 50, 80)}


def rows_of(
    case: Case, timings: dict[str, Timing], ceilings: dict[str, float], facts: dict[str, str], commit: str
) -> list[Row]:
    """Every metric of a measured case.

    Args:
        ceilings: "copy" in GB/s and "product" in TFLOP/s, as far as they are known.

    Time in ms; GB/s of the counted bytes; TFLOP/s of the counted operations; each of them over its ceiling; peak
    GPU memory in MiB; bytes stored; and for ours the speed-up over each other way, round by round.
    """
    rows: list[Row] = []
    for way in case.ways:
        if way.name not in timings:
            continue
        parameters = {**case.parameters, **({_NOT_IN_KEY: way.backend} if way.backend else {})}
        shared = {"parameters": parameters_text(parameters), "commit": commit, **facts}
        for metric, unit, values in _metrics(way, timings, ceilings):
            rows.append(Row(case=case.name, way=way.name, metric=metric, unit=unit, **_three(values), **shared))
    return rows


def _metrics(
    way: Way, timings: dict[str, Timing], ceilings: dict[str, float]
) -> Iterable[tuple[str, str, list[float]]]:
    timing = timings[way.name]
    seconds = timing.seconds
    yield "time", "ms", [s * 1e3 for s in seconds]
    for counted, scale, metric, unit, ceiling in (
        (way.moved, 1e9, "bandwidth", "GB/s", "copy"),
        (way.flops, 1e12, "throughput", "TFLOP/s", "product"),
    ):
        if counted:
            rates = [counted / s / scale for s in seconds]
            yield metric, unit, rates
            if ceiling in ceilings:
                yield f"{metric} over {ceiling} ceiling", "fraction", [r / ceilings[ceiling] for r in rates]
    if timing.stored is not None:
        yield "size", "bytes", [float(timing.stored)]
    if timing.peak is not None:
        yield "peak memory", "MiB", [timing.peak / 2**20]
    if way.is_ours:
        for rival, other in timings.items():
            if rival != way.name:
                pairs = zip(other.seconds, seconds, strict=True)
                yield f"speed-up over {rival}", "x", [theirs / mine for theirs, mine in pairs]


def read(path: Path) -> list[Row]:
    """Rows of a result file; none where there is no file. ValueError when a column is missing."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: columns are {reader.fieldnames}; expected {COLUMNS}")
        return [Row(**{n: float(v) if n in ("p20", "p50", "p80") else v for n, v in row.items()}) for row in reader]


def text(rows: Iterable[Row]) -> str:
    """Rows as the content of a result file."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Rows of both; of two with one key the later in date, in the place of the first."""
    found: dict[tuple[str, ...], Row] = {}
    for row in (*old, *new):
        if row.key not in found or row.date >= found[row.key].date:
            found[row.key] = row
    return list(found.values())


class ResultFile:
    """A result file that is rewritten after every case, so that a stop loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, rows: Iterable[Row], source: Source) -> None:
        """Put the rows into the file. DirtySource for a tree that no commit describes."""
        if source.dirty:
            raise DirtySource(f"{source.dirty} differs from commit {source.commit}; commit it, or use --allow-dirty")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".csv.part")
        partial.write_text(text(merged(read(self.path), rows)), encoding="utf-8")
        os.replace(partial, self.path)
