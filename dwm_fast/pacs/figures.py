"""The study's figures, drawn from its results: a colour per method in all, the data set named in each.

Files are PNG and SVG beside each other; matplotlib is imported when a figure is drawn and opens no window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwm_fast.pacs.figure_style import (
    ACCURACY,
    DASHES,
    INK,
    MARKERS,
    NARROWEST,
    canvas,
    colour,
    legend,
    mark,
    save_drawings,
    seeds_note,
)
from dwm_fast.pacs.mask_figures import overlap_maps, sparsity
from dwm_fast.pacs.table import (
    INITS,
    METHODS,
    POLICIES,
    Stat,
    baseline_key,
    in_order,
    key_order,
    rank,
    row_key,
    stat,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Config = tuple[str, str, str, float | None]
Runs = list[Mapping[str, Any]]


def draw_all(
    results: Mapping[str, Any], folder: Path | str, history: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """Draw every figure that the results hold data for.

    Args:
        results: a study's results; any part of the grid may be missing.
        folder: where the files go; made when missing.
        history: training curves, one mapping per epoch: "stage" (source, mask or target), "epoch", "accuracy"
            in [0, 1], and what names the run: some of "source", "target", "method", "init", "bn_policy" and
            "seed".

    Returns:
        The files, PNG before SVG: accuracy, retention, sparsity, overlap, training (as far as there is data).

    Raises:
        DataError: a file cannot be written.
    """
    drawings: list[tuple[str, bool, Callable[[], Figure]]] = [
        ("accuracy", bool(results["rows"]), lambda: _accuracy(results)),
        ("retention", bool(results["rows"]), lambda: _retention(results)),
        ("sparsity", any(mask["layers"] for mask in results["masks"]), lambda: sparsity(results)),
        ("overlap", bool(results["overlap"]), lambda: overlap_maps(results)),
        ("training", bool(history), lambda: _training(results, history or ())),
    ]
    return save_drawings([(name, draw) for name, drawable, draw in drawings if drawable], folder)


def _by_config(rows: Iterable[Mapping[str, Any]], view: str) -> dict[Config, Runs]:
    groups: dict[Config, Runs] = defaultdict(list)
    for run in rows:
        if run["view"] == view:
            method, init, policy, _, lr = row_key(run)
            groups[method, init, policy, lr].append(run)
    ordered = sorted(groups, key=lambda one: key_order((*one[:3], view, one[3])))
    return {config: groups[config] for config in ordered}


def _name(config: Config, policies: bool, rates: bool) -> str:
    method, init, policy, lr = config
    ways = [*([policy] if policies else []), *([f"{lr:g}"] if rates and lr is not None else [])]
    return " ".join([method, *([init] if init != "-" else []), *(f"· {way}" for way in ways)])


def _policies_differ(configs: Iterable[Config]) -> bool:
    """Whether some method and re-initialisation ran under several batch-norm policies."""
    policies = {config[:3] for config in configs}
    return len({policy[:2] for policy in policies}) < len(policies)


def _rates_differ(configs: Iterable[Config]) -> bool:
    """Whether some method, re-initialisation and policy ran at several rates."""
    configs = list(configs)
    return len({config[:3] for config in configs}) < len(configs)


def _accuracy(results: Mapping[str, Any]) -> Figure:
    """A panel per pair: for every configuration the accuracy left on the source and reached on the target."""
    rows = results["rows"]
    configs = list(_by_config(rows, "shared"))
    sources = in_order(results, (run["source"] for run in rows))
    pairs = {source: in_order(results, (r["target"] for r in rows if r["source"] == source)) for source in sources}
    shape = (len(sources), max(map(len, pairs.values())))
    panel = (3.1 if shape[1] > 1 else 5.6, 0.22 * len(configs) + 0.75)
    title, note = "Accuracy after fine-tuning, per pair", seeds_note(rows)
    figure, axes = canvas(results, title, note, shape, panel, sharex=True, sharey=True)
    several = (_policies_differ(configs), _rates_differ(configs))
    masked_drawn = False
    for line, source in zip(axes, sources, strict=True):
        for axis, target in zip(line, [*pairs[source], *[None] * (shape[1] - len(pairs[source]))], strict=True):
            if target is None:
                axis.set_visible(False)
                continue
            here = [run for run in rows if (run["source"], run["target"]) == (source, target)]
            shared, masked = _by_config(here, "shared"), _by_config(here, "masked")
            before = stat(here, "source_before").mean
            if before is not None:
                axis.axvline(before, color=INK, linewidth=1, linestyle=DASHES, zorder=1)
            for level, config in enumerate(configs):
                ink = colour(config[0])
                kept, reached = (
                    stat(shared.get(config, []), "source_after"),
                    stat(shared.get(config, []), "target_after"),
                )
                if kept.mean is not None and reached.mean is not None:
                    axis.plot(
                        [kept.mean, reached.mean],
                        [level] * 2,
                        color=ink,
                        alpha=0.3,
                        linewidth=1.4,
                        zorder=2,
                    )
                _dot(axis, kept, level, marker="o", color=ink, markersize=5.5)
                _dot(axis, reached, level, marker="D", color=ink, markersize=5, markerfacecolor="white")
                own = stat(masked.get(config, []), "source_after")
                masked_drawn |= own.mean is not None
                _dot(axis, own, level, marker="|", color=ink, markersize=9, markeredgewidth=2)
            axis.set_title(f"{source} → {target}")
            axis.set_yticks(range(len(configs)), [_name(config, *several) for config in configs])
            axis.tick_params(axis="y", length=0)
            axis.margins(x=0.05)
    axes[0][0].set_ylim(len(configs) - 0.5, -0.5)
    for line in axes:
        for label, config in zip(line[0].get_yticklabels(), configs, strict=True):
            label.set_color(colour(config[0]))
    for column in zip(*axes, strict=True):
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(ACCURACY)
    handles = [
        mark("o", "source, after"),
        mark("D", "target, after", markerfacecolor="white"),
        *([mark("|", "source under its own bits (masked view)", markeredgewidth=2)] if masked_drawn else []),
        mark("", "source, before", linestyle=DASHES, linewidth=1),
    ]
    legend(figure, handles, 4 if shape[1] > 1 else 2)
    return figure


def _dot(axis: Axes, value: Stat, level: float, **style: Any) -> None:
    if value.mean is not None:
        axis.errorbar(value.mean, level, xerr=value.spread, elinewidth=1, capsize=0, linestyle="", zorder=3, **style)


def _retention(results: Mapping[str, Any]) -> Figure:
    """A panel per source: accuracy kept on the source against that on the target, `none` as the origin."""
    rows = results["rows"]
    sources = in_order(results, (run["source"] for run in rows))
    configs = list(_by_config(rows, "shared"))
    baseline = baseline_key(results)
    policies = sorted({config[2] for config in configs if config[0] != "none"}, key=lambda one: rank(POLICIES, one))
    fills = dict(zip(policies, ("full", "none", "left", "bottom"), strict=False))
    columns = min(2, len(sources))
    shape = (-(-len(sources) // columns), columns)
    panel = (4.3, 3.5) if columns > 1 else (5.8, 4.4)
    title, note = (
        "Retention on the source against transfer to the target",
        f"up and right is better; {seeds_note(rows)}",
    )
    figure, axes = canvas(results, title, note, shape, panel, sharex=True, sharey=True)
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(sources) :]:
        axis.set_visible(False)
    masked_drawn = False
    for axis, source in zip(flat, sources, strict=False):
        here = [run for run in rows if run["source"] == source]
        for view in ("shared", "masked"):
            for (method, init, policy, lr), runs in _by_config(here, view).items():
                x, y = stat(runs, "target_after"), stat(runs, "source_after")
                if x.mean is None or y.mean is None:
                    continue
                style: dict[str, Any] = {"color": colour(method), "markersize": 8, "zorder": 3}
                if view == "masked":
                    masked_drawn = True
                    style |= {"marker": "_", "markersize": 11, "markeredgewidth": 2, "zorder": 2}
                elif (method, init, policy, view, lr) == baseline:
                    axis.axvline(x.mean, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
                    axis.axhline(y.mean, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
                    style |= {"marker": "*", "markersize": 15, "zorder": 4}
                elif method == "none":
                    style |= {"marker": "*", "markersize": 11, "markerfacecolor": "white"}
                else:
                    fill = fills.get(policy, "full")
                    style |= {
                        "marker": MARKERS.get(init, "P"),
                        "fillstyle": fill,
                        "markerfacecoloralt": "white",
                    }
                spread: dict[str, Any] = {"xerr": x.spread, "yerr": y.spread} if view == "shared" else {}
                axis.errorbar(x.mean, y.mean, **spread, elinewidth=0.8, ecolor=colour(method), linestyle="", **style)
        before = stat(here, "source_before").mean
        if before is not None:
            axis.axhline(before, color=INK, linewidth=1, linestyle=DASHES, zorder=1)
        targets = in_order(results, (run["target"] for run in here))
        axis.set_title(f"{source} → {targets[0] if len(targets) == 1 else f'mean of {len(targets)} targets'}")
        axis.margins(0.08)
        axis.tick_params(labelbottom=True)
        axis.set(xlabel="target accuracy (fraction)", ylabel="source accuracy (fraction)")
    low, high = flat[0].get_xlim()
    slack = max(0.0, NARROWEST - (high - low)) / 2
    flat[0].set_xlim(low - slack, high + slack)
    methods = sorted({config[0] for config in configs} - {"none"}, key=lambda one: rank(METHODS, one))
    inits = sorted({config[1] for config in configs} - {"-"}, key=lambda one: rank(INITS, one))
    handles = [mark("*", "none: plain fine-tuning", colour("none"), markersize=12)]
    if sum(config[0] == "none" for config in configs) > 1:
        handles.append(mark("*", "none in another way", colour("none"), markersize=9, markerfacecolor="white"))
    handles += [mark("o", method, colour(method), markersize=7) for method in methods]
    handles += [mark(MARKERS.get(init, "P"), f"init {init}", "#777777", markersize=7) for init in inits]
    if len(policies) > 1:
        handles += [
            mark("o", f"batch norm {policy}", "#777777", fillstyle=fills[policy], markerfacecoloralt="white")
            for policy in policies
            if policy in fills
        ]
    if masked_drawn:
        handles.append(mark("_", "source under its own bits (masked view)", markeredgewidth=2, markersize=11))
    handles.append(mark("", "source before fine-tuning", linestyle=DASHES, linewidth=1))
    legend(figure, handles, 4)
    return figure


def _training(results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per stage: accuracy per epoch, one line per run, coloured by method."""
    stages = sorted({point["stage"] for point in history}, key=lambda one: rank(("source", "mask", "target"), one))
    methods = sorted({point["method"] for point in history if point.get("method")}, key=lambda one: rank(METHODS, one))
    note = "one line per run"
    figure, axes = canvas(results, "Training curves", note, (1, len(stages)), (3.6, 2.8), sharey=True)
    identity = ("source", "target", "method", "init", "bn_policy", "seed")
    for axis, stage in zip(axes[0], stages, strict=True):
        curves: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
        for point in history:
            if point["stage"] == stage:
                curves[tuple(point.get(part) for part in identity)].append((point["epoch"], point["accuracy"]))
        for key, points in curves.items():
            epochs, accuracies = zip(*sorted(points), strict=True)
            ink = colour(key[2]) if key[2] else INK
            axis.plot(epochs, accuracies, ".-", lw=1, ms=4, alpha=0.7, color=ink)
        axis.set(title=stage, xlabel="epoch")
    axes[0][0].set_ylabel(ACCURACY)
    if methods:
        legend(figure, [mark("o", method, colour(method)) for method in methods], len(methods))
    return figure
