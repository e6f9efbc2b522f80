"""Result rows as a table that fits a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from .results import Row

WIDTH = 100


def shown_number(value: float) -> str:
    """Three significant digits without an exponent where that is readable."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 3 if value == 0 else max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def shown_rate(row: Row) -> str:
    """Number and unit of a bandwidth, a throughput or a size."""
    if row.metric == "size":
        return f"{shown_number(row.p50 / 1e3)} kB"
    if row.unit == "TFLOP/s" and row.p50 < 1:
        return f"{shown_number(row.p50 * 1e3)} GFLOP/s"
    return f"{shown_number(row.p50)} {row.unit}"


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows grouped by case, parameters (who computed aside) and device, in order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.key[3], row.device), []).append(row)
    return groups


def case_lines(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """One line per way of a case: name, time, spread, rate or size, and ours over it."""
    lines = []
    times = {r.way: r for r in rows if r.metric == "time"}
    over = {r.metric.removeprefix("speed-up over "): r for r in rows if r.way == "ours"}
    counts = {m: sum(r.metric == m for r in rows) for m in ("bandwidth", "throughput", "size")}
    shown = max(counts, key=lambda m: counts[m])
    for way, row in times.items():
        backend = row.parameter("backend")
        rates = {r.metric: r for r in rows if r.way == way and r.metric in counts}
        rate = rates.get(shown) or next(iter(rates.values()), None)
        ratio = over.get(way)
        lines.append(
            (
                f"{way} ({backend})" if backend else way,
                shown_number(row.p50),
                f"{shown_number(row.p20)}..{shown_number(row.p80)}",
                shown_rate(rate) if rate else "",
                f"{shown_number(ratio.p50)}x" if ratio else "",
            )
        )
    return lines


def title(case: str, parameters: str) -> str:
    """A case's heading: its name and what it was run on."""
    return f"{case}  {parameters.replace(';', ', ')}"


def results_table(rows: Sequence[Row]) -> Group:
    """All cases, each a heading and one way a line; "ours is" so many times as fast as that way."""
    parts: list[RenderableType] = [_line("way", "ms", "p20..p80", "rate, size", "ours is", style="dim")]
    for (case, parameters, _), group in by_case(rows).items():
        lines = case_lines(group)
        if lines:
            parts.append(Text(title(case, parameters), style="bold"))
            parts += [_line(f"  {way}", *cells) for way, *cells in lines]
    return Group(*parts)


def _line(way: str, *cells: str, style: str = "") -> Text:
    widths = (10, 18, 15, 9)
    rest = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    room = WIDTH - sum(widths)
    return Text(way[:room].ljust(room) + rest, style=style, no_wrap=True)


def console() -> Console:
    """100 columns wide, whatever the terminal is; text is printed as it is, brackets and colons too."""
    return Console(width=WIDTH, highlight=False, markup=False, emoji=False)
