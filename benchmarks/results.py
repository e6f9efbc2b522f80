"""Result files: one CSV row per measurement; a newer row replaces the older of the same key."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dwm_fast._files import write_atomic
from dwm_fast.errors import InputError

from .measure import OURS, Case, Measured, Way

_NOT_IN_KEY = "backend"
"""Parameter that says who computed: a faster backend replaces the figures of the one before."""


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
_PERCENTILES = ("p20", "p50", "p80")


def parameters_text(parameters: dict[str, Any]) -> str:
    """name=value pairs in the order of their names, joined by semicolons."""
    return ";".join(f"{name}={parameters[name]}" for name in sorted(parameters))


def _number(value: float) -> float:
    return float(f"{value:.5g}")


def rows_of(case: Case, found: Measured, ceilings: dict[str, float], facts: dict[str, Any], commit: str) -> list[Row]:
    """Every metric of what is measured of a case.

    Args:
        ceilings: "copy" in GB/s and "product" in TFLOP/s, as far as they are known.

    Time in ms; GB/s of the counted bytes; TFLOP/s of the counted operations; each of them over its ceiling; peak
    GPU memory in MiB; bytes stored; and for ours the speed-up over each other way, round by round.
    """
    rows: list[Row] = []
    for way in case.ways:
        if way.name not in found.timings:
            continue
        parameters = {**case.parameters, **({_NOT_IN_KEY: way.backend} if way.backend else {})}
        text = parameters_text(parameters)
        for metric, unit, values in _metrics(way, found, ceilings):
            p20, p50, p80 = (_number(value) for value in np.percentile(values, (20, 50, 80)))
            rows.append(Row(case.name, way.name, metric, unit, p20, p50, p80, text, commit=commit, **facts))
    return rows


def _metrics(way: Way, found: Measured, ceilings: dict[str, float]) -> Iterable[tuple[str, str, list[float]]]:
    timing = found.timings[way.name]
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
    if way.name == OURS:
        for rival, ratios in found.speed_ups.items():
            yield f"speed-up over {rival}", "x", ratios


def read(path: Path) -> list[Row]:
    """Rows of a result file; none where there is no file. ValueError when a column is missing."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: columns are {reader.fieldnames}; expected {COLUMNS}")
        return [_row(row) for row in reader]


def _row(cells: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {n: float(text) if n in _PERCENTILES else text for n, text in cells.items()}
    return Row(**values)


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
    """A result file that is rewritten after every way, so that a stop loses nothing.

    Raises:
        DataError, here and by `record`: the file cannot be written.
        InputError: what is there is no result file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record([])

    def record(self, rows: Iterable[Row]) -> None:
        """Put the rows into the file."""
        try:
            known = read(self.path)
        except ValueError as error:
            raise InputError(f"{error}; move the file away or choose another folder with --out") from error
        write_atomic(self.path, text(merged(known, rows)))
