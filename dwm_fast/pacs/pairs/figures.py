"""The figures of the study of pairs: a colour per method in all, the data set named in each.

Figures are PNG and SVG beside each other; matplotlib is imported when one is drawn and opens no window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dwm_fast.methods import BATCH_NORM_POLICIES
from dwm_fast.pacs.page.figure_style import (
    ACCURACY,
    DASHES,
    INK,
    MARKERS,
    NARROWEST,
    as_files,
    canvas,
    colour,
    legend,
    mark,
    seeds_note,
)
from dwm_fast.pacs.pairs.config import METHODS
from dwm_fast.pacs.pairs.mask_figures import overlap_maps, sparsity, training
from dwm_fast.pacs.pairs.table import INITS, Key, baseline_key, in_order, key_order, rank, row_key, stat
from dwm_fast.pacs.tables import Stat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = list[Mapping[str, Any]]


def draw_all(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure that the results hold data for: file name -> content.

    They are accuracy, retention, sparsity, overlap and training; any part of the grid may be missing.
    """
    drawings = {
        "accuracy": (results["rows"], _accuracy),
        "retention": (results["rows"], _retention),
        "sparsity": ([mask for mask in results["masks"] if mask["layers"]], sparsity),
        "overlap": (results["overlap"], overlap_maps),
        "training": ([mask for mask in results["masks"] if mask.get("history")], training),
    }
    return as_files({name: draw for name, (data, draw) in drawings.items() if data}, results)


def _by_config(rows: Iterable[Mapping[str, Any]], view: str) -> dict[Key, Runs]:
    groups: dict[Key, Runs] = defaultdict(list)
    for run in rows:
        if run["view"] == view:
            groups[row_key(run)].append(run)
    return {key: groups[key] for key in sorted(groups, key=key_order)}


def _names(keys: Sequence[Key]) -> list[str]:
    """'binary S_start · frozen · 0.001', with policy and rate where some ways differ in them alone."""
    policies = len({key[:2] for key in keys}) < len({key[:3] for key in keys})
    rates = len({key[:3] for key in keys}) < len(keys)
    names = []
    for method, init, policy, _, rate in keys:
        ways = [*([policy] if policies else []), *([str(rate)] if rates and rate.lr is not None else [])]
        names.append(" ".join([method, *([init] if init != "-" else []), *(f"· {way}" for way in ways)]))
    return names


def _accuracy(results: Mapping[str, Any]) -> Figure:
    """A panel per pair: for every configuration the accuracy left on the source and reached on the target."""
    rows = results["rows"]
    keys = list(_by_config(rows, "shared"))
    sources = in_order(results, (run["source"] for run in rows))
    pairs = {source: in_order(results, (r["target"] for r in rows if r["source"] == source)) for source in sources}
    shape = (len(sources), max(map(len, pairs.values())))
    panel = (3.1 if shape[1] > 1 else 5.6, 0.22 * len(keys) + 0.75)
    title, note = "Accuracy after fine-tuning, per pair", seeds_note(rows)
    figure, axes = canvas(results, title, note, shape, panel, sharex=True, sharey=True)
    for line, source in zip(axes, sources, strict=True):
        for axis, target in zip(line, [*pairs[source], *[None] * (shape[1] - len(pairs[source]))], strict=True):
            axis.set_visible(target is not None)
            if target is not None:
                here = [run for run in rows if (run["source"], run["target"]) == (source, target)]
                _accuracy_panel(axis, here, keys)
                axis.set_title(f"{source} → {target}")
    axes[0][0].set_ylim(len(keys) - 0.5, -0.5)
    for line in axes:
        for label, key in zip(line[0].get_yticklabels(), keys, strict=True):
            label.set_color(colour(key[0]))
    for column in zip(*axes, strict=True):
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(ACCURACY)
    masked = any(run["view"] == "masked" for run in rows)
    handles = [
        mark("o", "source, after"),
        mark("D", "target, after", markerfacecolor="white"),
        *([mark("|", "source under its own bits (masked view)", markeredgewidth=2)] if masked else []),
        mark("", "source, before", linestyle=DASHES, linewidth=1),
    ]
    legend(figure, handles, 4 if shape[1] > 1 else 2)
    return figure


def _accuracy_panel(axis: Axes, here: Runs, keys: Sequence[Key]) -> None:
    shared, masked = _by_config(here, "shared"), _by_config(here, "masked")
    before = stat(here, "source_before").mean
    if before is not None:
        axis.axvline(before, color=INK, linewidth=1, linestyle=DASHES, zorder=1)
    for level, key in enumerate(keys):
        ink, runs = colour(key[0]), shared.get(key, [])
        kept, reached = stat(runs, "source_after"), stat(runs, "target_after")
        if kept.mean is not None and reached.mean is not None:
            axis.plot([kept.mean, reached.mean], [level] * 2, color=ink, alpha=0.3, linewidth=1.4, zorder=2)
        _dot(axis, kept, level, marker="o", color=ink, markersize=5.5)
        _dot(axis, reached, level, marker="D", color=ink, markersize=5, markerfacecolor="white")
        own = stat(masked.get((*key[:3], "masked", key[4]), []), "source_after")
        _dot(axis, own, level, marker="|", color=ink, markersize=9, markeredgewidth=2)
    axis.set_yticks(range(len(keys)), _names(keys))
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.05)


def _dot(axis: Axes, value: Stat, level: float, **style: Any) -> None:
    if value.mean is not None:
        axis.errorbar(value.mean, level, xerr=value.spread, elinewidth=1, capsize=0, linestyle="", zorder=3, **style)


def _fills(keys: Iterable[Key]) -> dict[str, str]:
    """Batch-norm policy -> how the markers of its runs are filled."""
    policies = sorted({key[2] for key in keys if key[0] != "none"}, key=lambda one: rank(BATCH_NORM_POLICIES, one))
    return dict(zip(policies, ("full", "none", "left", "bottom"), strict=False))


def _retention(results: Mapping[str, Any]) -> Figure:
    """A panel per source: accuracy kept on the source against that on the target, `none` as the origin."""
    rows = results["rows"]
    sources = in_order(results, (run["source"] for run in rows))
    columns = min(2, len(sources))
    shape = (-(-len(sources) // columns), columns)
    panel = (4.3, 3.5) if columns > 1 else (5.8, 4.4)
    title = "Retention on the source against transfer to the target"
    note = f"up and right is better; {seeds_note(rows)}"
    figure, axes = canvas(results, title, note, shape, panel, sharex=True, sharey=True)
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(sources) :]:
        axis.set_visible(False)
    for axis, source in zip(flat, sources, strict=False):
        here = [run for run in rows if run["source"] == source]
        _retention_panel(axis, here, baseline_key(results), _fills(_by_config(rows, "shared")))
        targets = in_order(results, (run["target"] for run in here))
        axis.set_title(f"{source} → {targets[0] if len(targets) == 1 else f'mean of {len(targets)} targets'}")
        axis.margins(0.08)
        axis.tick_params(labelbottom=True)
        axis.set(xlabel="target accuracy (fraction)", ylabel="source accuracy (fraction)")
    low, high = flat[0].get_xlim()
    slack = max(0.0, NARROWEST - (high - low)) / 2
    flat[0].set_xlim(low - slack, high + slack)
    legend(figure, _retention_handles(rows), 4)
    return figure


def _retention_panel(axis: Axes, here: Runs, baseline: Key | None, fills: Mapping[str, str]) -> None:
    for key, runs in [*_by_config(here, "shared").items(), *_by_config(here, "masked").items()]:
        x, y = stat(runs, "target_after"), stat(runs, "source_after")
        if x.mean is None or y.mean is None:
            continue
        if key == baseline:
            axis.axvline(x.mean, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
            axis.axhline(y.mean, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
        spread: dict[str, Any] = {"xerr": x.spread, "yerr": y.spread} if key[3] == "shared" else {}
        ink: dict[str, Any] = {"color": colour(key[0]), "ecolor": colour(key[0])}
        style = _retention_style(key, key == baseline, fills)
        axis.errorbar(x.mean, y.mean, **spread, elinewidth=0.8, linestyle="", **ink, **style)
    before = stat(here, "source_before").mean
    if before is not None:
        axis.axhline(before, color=INK, linewidth=1, linestyle=DASHES, zorder=1)


def _retention_style(key: Key, baseline: bool, fills: Mapping[str, str]) -> dict[str, Any]:
    method, init, policy, view, _ = key
    if view == "masked":
        return {"marker": "_", "markersize": 11, "markeredgewidth": 2, "zorder": 2}
    if baseline:
        return {"marker": "*", "markersize": 15, "zorder": 4}
    if method == "none":
        return {"marker": "*", "markersize": 11, "markerfacecolor": "white", "zorder": 3}
    fill = {"fillstyle": fills.get(policy, "full"), "markerfacecoloralt": "white"}
    return {"marker": MARKERS.get(init, "P"), "markersize": 8, "zorder": 3, **fill}


def _retention_handles(rows: Runs) -> list[Any]:
    keys = list(_by_config(rows, "shared"))
    fills = _fills(keys)
    methods = sorted({key[0] for key in keys} - {"none"}, key=lambda one: rank(METHODS, one))
    inits = sorted({key[1] for key in keys} - {"-"}, key=lambda one: rank(INITS, one))
    handles = [mark("*", "none: plain fine-tuning", colour("none"), markersize=12)]
    if sum(key[0] == "none" for key in keys) > 1:
        handles.append(mark("*", "none in another way", colour("none"), markersize=9, markerfacecolor="white"))
    handles += [mark("o", method, colour(method), markersize=7) for method in methods]
    handles += [mark(MARKERS.get(init, "P"), f"init {init}", "#777777", markersize=7) for init in inits]
    if len(fills) > 1:
        handles += [
            mark("o", f"batch norm {policy}", "#777777", fillstyle=fill, markerfacecoloralt="white")
            for policy, fill in fills.items()
        ]
    if any(run["view"] == "masked" for run in rows):
        handles.append(mark("_", "source under its own bits (masked view)", markeredgewidth=2, markersize=11))
    return [*handles, mark("", "source before fine-tuning", linestyle=DASHES, linewidth=1)]
