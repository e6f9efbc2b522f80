"""Figures of the recorded results: bars against the limit, roofline, scaling with rows and with domains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import slug
from ..results import Row
from ..table import by_case

_LIMITS = ("dense", "one dense", "memory copy")
_OURS, _LIMIT, _OTHER = "#0b6e4f", "#30343f", "#b8bcc6"


def limit_of(ways: Sequence[str]) -> str | None:
    """The way that the others are compared with: dense work, else a copy of the same bytes."""
    for start in _LIMITS:
        for way in ways:
            if way.startswith(start):
                return way
    return None


def _times(rows: Sequence[Row]) -> dict[str, float]:
    return {r.way: r.p50 for r in rows if r.metric == "time"}


def bars(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """(case, way, time over the limit's) of every case that has a limit and a way of ours."""
    found = []
    for (case, parameters, _), group in by_case(rows).items():
        times = _times(group)
        limit = limit_of(list(times))
        if limit is None or "ours" not in times:
            continue
        size = [p for p in parameters.split(";") if p.split("=")[0] in ("M", "domains", "network")]
        label = f"{case} ({', '.join(size)})" if size else case
        found += [(label, way, seconds / times[limit]) for way, seconds in times.items() if way != limit]
    return found


def scaling(rows: Sequence[Row], case: str, parameter: str) -> dict[str, list[tuple[float, float]]]:
    """way -> (parameter, ms) pairs of a case measured at several values of the parameter."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.case == case and row.metric == "time" and row.parameter(parameter):
            lines.setdefault(row.way, []).append((float(row.parameter(parameter)), row.p50))
    return {way: sorted(points) for way, points in lines.items() if len(points) >= 3}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dwm-fast", "font.size": 9, "axes.spines.top": False})
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _colour(way: str) -> str:
    return _OURS if way.startswith("ours") else _OTHER


def _draw_bars(rows: Sequence[Row], path: Path, device: str) -> Path | None:
    found = bars(rows)
    if not found:
        return None
    figure, axes = _figure(8, 1 + 0.19 * len(found))
    axes.barh(range(len(found)), [ratio for *_, ratio in found], color=[_colour(way) for _, way, _ in found])
    axes.set_yticks(range(len(found)), [f"{case}: {way}" for case, way, _ in found], fontsize=7)
    axes.axvline(1, color=_LIMIT)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time over that of the limit (dense work, or a copy of the same bytes); shorter is faster")
    axes.set_title(device, loc="left")
    return _save(figure, path)


def _draw_roofline(rows: Sequence[Row], path: Path, device: str) -> Path | None:
    rates = {(r.key[0], r.way, r.key[3], r.metric): r.p50 for r in rows}
    points = [
        (1e3 * rate / rates[case, way, parameters, "bandwidth"], rate, way)
        for (case, way, parameters, metric), rate in rates.items()
        if metric == "throughput" and (case, way, parameters, "bandwidth") in rates
    ]
    ceilings = {r.metric: r.p50 for r in rows if r.case == "ceiling"}
    if not points or not {"bandwidth", "throughput"} <= ceilings.keys():
        return None
    figure, axes = _figure(6, 4)
    low, high = min(x for x, *_ in points) / 2, 2 * max(x for x, *_ in points)
    knee = 1e3 * ceilings["throughput"] / ceilings["bandwidth"]
    edge = [low, knee, max(high, 2 * knee)]
    axes.plot(edge, [min(x * ceilings["bandwidth"] / 1e3, ceilings["throughput"]) for x in edge], color=_LIMIT)
    for x, y, way in points:
        axes.plot(x, y, "o", color=_colour(way))
    axes.set(xscale="log", yscale="log", xlabel="operations per counted byte", ylabel="TFLOP/s")
    axes.set_title(f"{device}: ours dark, rivals pale, line: measured ceilings", loc="left", fontsize=8)
    return _save(figure, path)


def _draw_scaling(rows: Sequence[Row], case: str, parameter: str, path: Path, device: str) -> Path | None:
    lines = scaling(rows, case, parameter)
    if not lines:
        return None
    figure, axes = _figure(6, 4)
    for way, points in lines.items():
        style = "-" if way.startswith("ours") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel=parameter, ylabel="ms")
    axes.set_title(f"{case}, {device}", loc="left", fontsize=8)
    axes.legend(frameon=False, fontsize=7)
    return _save(figure, path)


def figure_name(device: str, what: str) -> str:
    """File name of one figure of one device."""
    return f"benchmarks-{slug(device)}-{what}.svg"


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure that the rows have data for, as SVG files in `folder`."""
    written: list[Path | None] = []
    for device in sorted({r.device for r in rows}):
        here = [r for r in rows if r.device == device]
        written.append(_draw_bars(here, folder / figure_name(device, "bars"), device))
        written.append(_draw_roofline(here, folder / figure_name(device, "roofline"), device))
        for case, parameter in (("linear from bits", "M"), ("bank linear", "domains")):
            path = folder / figure_name(device, f"{case.split()[0]}-{parameter.lower()}")
            written.append(_draw_scaling(here, case, parameter, path, device))
    return [path for path in written if path is not None]
