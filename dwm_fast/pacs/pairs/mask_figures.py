"""Figures of the masks: how they were learned, what each layer keeps, how far two domains keep the same weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from dwm_fast.pacs.page.figure_style import canvas, colour, legend, mark, seeds_note
from dwm_fast.pacs.pairs.config import METHODS
from dwm_fast.pacs.pairs.table import in_order, rank
from dwm_fast.pacs.tables import MISSING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _methods(entries: list[Mapping[str, Any]]) -> list[str]:
    return sorted({entry["method"] for entry in entries}, key=lambda one: rank(METHODS, one))


def sparsity(results: Mapping[str, Any]) -> Figure:
    """A panel per source: the fraction of weights kept in each layer, one line per method."""
    masks = [mask for mask in results["masks"] if mask["layers"]]
    sources = in_order(results, (mask["source"] for mask in masks))
    names = list(dict.fromkeys(layer["name"] for mask in masks for layer in mask["layers"]))
    width = max(5.8, 0.3 * len(names) + 1.5)
    shape, panel = (len(sources), 1), (width, 1.7 if len(sources) > 1 else 3.0)
    seeds = len({mask["seed"] for mask in masks})
    note = f"mean over {seeds} seeds, band from lowest to highest" if seeds > 1 else "one seed"
    figure, axes = canvas(results, "Fraction of weights kept, per layer", note, shape, panel, sharex=True, sharey=True)
    for (axis,), source in zip(axes, sources, strict=True):
        here = [mask for mask in masks if mask["source"] == source]
        totals = []
        for method in _methods(here):
            chosen = [mask for mask in here if mask["method"] == method]
            _sparsity_line(axis, chosen, names, colour(method))
            totals.append(f"{method} {fmean(mask['fraction_kept'] for mask in chosen):.2f}")
        axis.set_title(f"{source} (of all weights: {', '.join(totals)})", loc="left")
        axis.set_ylim(-0.03, 1.05)
    axes[-1][0].set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes[-1][0].set_xlabel("layer, in the network's order")
    figure.supylabel("kept (fraction of the layer's weights)", fontsize=9)
    methods = _methods(masks)
    legend(figure, [mark("o", method, colour(method), linestyle="-") for method in methods], len(methods))
    return figure


def _sparsity_line(axis: Axes, masks: list[Mapping[str, Any]], names: list[str], ink: str) -> None:
    kept: dict[str, list[float]] = defaultdict(list)
    for mask in masks:
        for layer in mask["layers"]:
            kept[layer["name"]].append(layer["kept"] / layer["total"])
    places = [place for place, name in enumerate(names) if name in kept]
    values = [kept[names[place]] for place in places]
    axis.fill_between(places, list(map(min, values)), list(map(max, values)), color=ink, alpha=0.18, lw=0)
    axis.plot(places, list(map(fmean, values)), "o-", ms=3.5, lw=1.5, color=ink)


def training(results: Mapping[str, Any]) -> Figure:
    """Two panels, a line per mask: after every epoch the source's loss under the mask, and what the mask keeps."""
    from matplotlib.ticker import MaxNLocator

    masks = [mask for mask in results["masks"] if mask.get("history")]
    sources = in_order(results, (mask["source"] for mask in masks))
    dashes = dict(zip(sources, ("-", "--", ":", "-."), strict=False))
    panels = {"loss": "loss on training images (nats)", "fraction_kept": "kept (fraction of all weights)"}
    figure, (axes,) = canvas(results, "Masks while they are learned", "one line per mask", (1, 2), (3.8, 3.0))
    for axis, (figures, label) in zip(axes, panels.items(), strict=True):
        for mask in masks:
            values = [epoch[figures] for epoch in mask["history"]]
            line: dict[str, Any] = {"color": colour(mask["method"]), "linestyle": dashes.get(mask["source"], "-")}
            axis.plot(range(1, len(values) + 1), values, marker=".", ms=4, lw=1.4, alpha=0.8, **line)
        axis.set(xlabel="epoch", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [mark("o", method, colour(method)) for method in _methods(masks)]
    if len(sources) > 1:
        handles += [mark("", f"on {source}", "#777777", linestyle=dashes.get(source, "-")) for source in sources]
    legend(figure, handles, 4)
    return figure


def chance_overlap(results: Mapping[str, Any], method: str, a: str, b: str) -> float | None:
    """Jaccard index of two independent masks that keep as many weights of each layer as those of `a` and `b`.

    With n weights in a layer, fractions p, q kept: sum n p q / sum n (p + q - p q); mean over the seeds.
    Layers of different sizes, which only heads have, are left out.
    """
    masks = {(m["source"], m["seed"]): m["layers"] for m in results["masks"] if m["method"] == method and m["layers"]}
    indices = []
    for (source, seed), layers in masks.items():
        if source != a or (b, seed) not in masks:
            continue
        both = either = 0.0
        for one, other in zip(layers, masks[b, seed], strict=True):
            if one["total"] != other["total"]:  # heads of domains with different classes
                continue
            common = one["kept"] * other["kept"] / one["total"]
            both += common
            either += one["kept"] + other["kept"] - common
        indices.append(both / either if either else 0.0)
    return fmean(indices) if indices else None


def overlap_maps(results: Mapping[str, Any]) -> Figure:
    """A heat map per method: Jaccard index of two sources' keep masks, and below it the chance level."""
    overlap = results["overlap"]
    methods = _methods(overlap)
    domains = in_order(results, (entry[side] for entry in overlap for side in ("a", "b")))
    shape, panel = (1, len(methods)), (max(2.3, 0.74 * len(domains) + 0.6), max(2.2, 0.7 * len(domains)))
    title = "Overlap of keep masks between domains"
    note = f"below: by chance at the same densities; {seeds_note(overlap)}"
    figure, axes = canvas(results, title, note, shape, panel, sharey=True)
    for axis, method in zip(axes[0], methods, strict=True):
        image = _overlap_map(axis, results, method, domains)
        axis.set_title(method, color=colour(method))
        axis.set_xticks(range(len(domains)), domains, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(domains)), domains)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes[0], label="Jaccard index\n(kept by both / kept by either)", shrink=0.8)
    return figure


def _overlap_map(axis: Axes, results: Mapping[str, Any], method: str, domains: list[str]) -> Any:
    grid = [[float("nan")] * len(domains) for _ in domains]
    for i, a in enumerate(domains):
        for j, b in enumerate(domains):
            values = [e["jaccard"] for e in results["overlap"] if e["method"] == method and {e["a"], e["b"]} == {a, b}]
            if i == j or not values:
                axis.text(j, i, MISSING, ha="center", va="center", color="#999999")
                continue
            grid[i][j] = fmean(values)
            shade = "black" if grid[i][j] > 0.5 else "white"
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": shade}
            spread = f" ±{stdev(values):.2f}" if len(values) > 1 else ""
            axis.text(j, i - 0.12, f"{grid[i][j]:.2f}{spread}", fontsize=7.5, **style)
            chance = chance_overlap(results, method, a, b)
            if chance is not None:
                axis.text(j, i + 0.2, f"{chance:.2f}", fontsize=6.5, **style)
    axis.grid(False)
    return axis.imshow(grid, vmin=0, vmax=1, cmap="cividis")
