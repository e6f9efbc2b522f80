"""The figures of a sequence: accuracy as domains are added, average against storage, forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dwm_fast.pacs.page.figure_style import ACCURACY, as_files, canvas, colour, legend, mark, seeds_note
from dwm_fast.pacs.sequence.table import orders_in, sequence_table
from dwm_fast.pacs.tables import Stat, number, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, str]
"""A method and a view."""

_CROWDED = 40
"""Characters of all domains from which their names below an axis stand upright."""
_UNITS = {"kB": 8e3, "MB": 8e6}
_LINEAR_RANGE = 20.0
"""Ratio of the largest storage to the smallest above 0 from which the axis is logarithmic."""


def draw_all(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure of a sequence's results, `sequence`, `storage` and `forgetting`: file name -> content."""
    drawings = {"sequence": _sequence, "storage": _storage, "forgetting": _forgetting}
    return as_files(drawings, results)


def name(method: str, view: str) -> str:
    """'piggyback', or 'binary, masked' for a view that is not the usual one."""
    return method if view == "shared" else f"{method}, {view}"


def _style(method: str, view: str) -> dict[str, Any]:
    """A preset has its method's colour and triangles; a view beside the usual one is dashed, its markers open."""
    style: dict[str, Any] = {"color": colour(method), "marker": "^" if "-" in method else "o"}
    if view != "shared":
        style |= {"linestyle": "--", "markerfacecolor": "white", "marker": "D"}
    return style


def _keys(results: Mapping[str, Any]) -> list[Key]:
    return [(row.method, row.view) for row in sequence_table(results)]


def _handles(keys: Sequence[Key], **changes: Any) -> list[Any]:
    styles = {key: {"linestyle": "-", **_style(*key), **changes} for key in keys}
    return [mark(style.pop("marker"), name(*key), style.pop("color"), **style) for key, style in styles.items()]


def _note(results: Mapping[str, Any]) -> str:
    """How many runs stand behind the points of a figure."""
    orders = len(orders_in(results))
    seeds = seeds_note(results["measures"])
    if orders == 1:
        return seeds
    return f"mean and standard deviation over {orders} orders × {seeds.rpartition(' over ')[2]}"


def _over(rows: Sequence[Mapping[str, Any]], domains: Sequence[str] | None) -> Stat:
    """Mean accuracy on `domains`, or all in rows of one method, view and place; spread over orders and seeds."""
    runs: dict[Any, list[float]] = {}
    for row in rows:
        if domains is None or row["on"] in domains:
            runs.setdefault((row.get("order"), row["seed"]), []).append(row["accuracy"])
    return over_seeds([fmean(values) for values in runs.values()])


@dataclass(frozen=True)
class _Panel:
    """Accuracy on `domains`, or the mean over all seen, in those rows, after each domain from place `start` on."""

    title: str
    names: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    domains: Sequence[str] | None = None
    start: int = 0

    def line(self, key: Key) -> Iterator[tuple[int, Stat]]:
        own = [row for row in self.rows if (row["method"], row["view"]) == key]
        for place in range(self.start, len(self.names)):
            yield place, _over([row for row in own if row["position"] == place], self.domains)


def _panels(results: Mapping[str, Any]) -> list[_Panel]:
    """The mean over the domains seen, and each domain; of several orders that mean over all of them, and in each."""
    sequence, rows, orders = results["sequence"], results["rows"], orders_in(results)
    if len(orders) == 1:
        own = [_Panel(f"on {one}", sequence, rows, [one], start) for start, one in enumerate(sequence)]
        return [_Panel("mean over the domains seen", sequence, rows), *own]
    numbers = [str(number) for number in range(1, len(sequence) + 1)]
    each = [
        _Panel(f"order {number}", order, [row for row in rows if row["order"] == ",".join(order)])
        for number, order in enumerate(orders, start=1)
    ]
    return [_Panel("all orders", numbers, rows), *each]


def _sequence(results: Mapping[str, Any]) -> Figure:
    """Accuracy after each domain learned, in the panels of `_panels`."""
    sequence, keys, panels = results["sequence"], _keys(results), _panels(results)
    columns = min(3, len(panels))
    shape = (-(-len(panels) // columns), columns)
    several = "orders" in results
    crowded = sum(map(len, sequence)) > _CROWDED
    through = f"{len(sequence)} domains, {sequence[0]} to {sequence[-1]}" if crowded else " → ".join(sequence)
    note = f"{'on the domains seen' if several else through}; {_note(results)}"
    figure, axes = canvas(
        results, "Accuracy while domains are added", note, shape, (3.4, 2.7), sharex=not several, sharey=True
    )
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(flat, panels, strict=False):
        for order, key in enumerate(keys):
            places, values = zip(*panel.line(key), strict=True)
            aside = 0.05 * (order - (len(keys) - 1) / 2)  # equal accuracies would hide each other
            axis.errorbar(
                [place + aside for place in places],
                [value.mean for value in values],
                yerr=None if values[0].spread is None else [value.spread for value in values],
                markersize=4.5,
                linewidth=1.4,
                elinewidth=0.9,
                **_style(*key),
            )
        axis.set_title(panel.title)
        axis.set_xticks(range(len(sequence)), panel.names, rotation=90 if crowded else 0)
        axis.tick_params(labelbottom=True)
    for line in axes:
        line[0].set_ylabel("accuracy (fraction)")
    for axis in flat[: len(panels)][-columns:]:
        axis.set_xlabel("after learning")
    legend(figure, _handles(keys), 4)
    return figure


def _storage(results: Mapping[str, Any]) -> Figure:
    """Average accuracy at the end against what a domain adds to storage."""
    rows = sequence_table(results)
    note = f"up and left is better; {_note(results)}"
    figure, axes = canvas(results, "Final average against storage", note, (1, 1), (5.8, 4.0))
    axis = axes[0][0]
    stored = [row.bits_added.mean or 0.0 for row in rows]
    unit = "MB" if max(stored) >= _UNITS["MB"] else "kB"
    for row, bits in zip(rows, stored, strict=True):
        axis.errorbar(
            bits / _UNITS[unit],
            row.average.mean or 0.0,
            yerr=row.average.spread,
            markersize=8,
            **_style(row.method, row.view) | {"linestyle": ""},
        )
    axis.set_ylabel("average accuracy after the last domain")
    axis.margins(0.12)
    _storage_scale(axis, [bits / _UNITS[unit] for bits in stored])
    axis.set_xlabel(f"{unit} stored per domain added (beside the backbone and the domain's head)")
    legend(figure, _handles([(row.method, row.view) for row in rows], linestyle=""), 4)
    return figure


def _storage_scale(axis: Axes, stored: Sequence[float]) -> None:
    """From 0 on; logarithmic above the smallest storage where it spans much."""
    smallest, largest = min(filter(None, stored), default=1.0), max(stored)
    if largest > _LINEAR_RANGE * smallest:
        axis.set_xscale("symlog", linthresh=smallest)
        axis.set_xlim(-0.1 * smallest, 2 * largest)
    else:
        axis.set_xlim(-0.03 * max(largest, smallest), 1.1 * max(largest, smallest))


def _forgetting(results: Mapping[str, Any]) -> Figure:
    """A bar per method and view: how much of the best earlier accuracy is lost at the end."""
    rows = sequence_table(results)
    note = f"lower is better; {_note(results)}"
    panel = (5.8, 0.32 * len(rows) + 0.9)
    figure, axes = canvas(results, "Forgetting", note, (1, 1), panel)
    axis = axes[0][0]
    for level, row in enumerate(rows):
        hollow = row.view != "shared"
        axis.barh(
            level,
            row.forgetting.mean or 0.0,
            height=0.62,
            xerr=row.forgetting.spread,
            edgecolor=colour(row.method),
            color="white" if hollow else colour(row.method),
            error_kw={"elinewidth": 0.9, "ecolor": "#222222"},
        )
        lost, spread = row.forgetting.mean or 0.0, row.forgetting.spread or 0.0
        place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axis.annotate(number(row.forgetting), (max(lost, 0.0) + spread, level), **place)
    axis.margins(x=0.14)
    axis.axvline(0, color="#777777", linewidth=0.9)
    axis.set_yticks(range(len(rows)), [name(row.method, row.view) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(f"best earlier minus final {ACCURACY.split(' (')[0]}, mean over all domains but the last")
    return figure
