"""What the study's figures share: colours, markers, a canvas that names the data set, and how files are written."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart under every common colour blindness, and dark enough on white.
COLOURS = {
    "none": "#4d4d4d",
    "naive": "#d98200",
    "edit": "#009e73",
    "binary": "#0072b2",
    "piggyback": "#cc5f9f",
    "ksm": "#a63d00",
    "spg": "#3aa0d8",
    "packnet": "#7b3fa0",
}
MARKERS = {"-": "*", "S_start": "o", "S_end": "s", "random": "^"}
INK, DASHES = "#222222", (0, (4, 3))
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "dwm-fast",
    "svg.fonttype": "path",
}
IDENTITY = ("source", "target", "method", "init", "bn_policy", "view", "a", "b")
ACCURACY = "accuracy (fraction of test images)"
NARROWEST = 0.1  # accuracy range of an axis: a narrower one would make noise look like an effect


def colour(method: str) -> str:
    """The method's colour in every figure, a preset's that of its method; grey for a method without one."""
    return COLOURS.get(method, COLOURS.get(method.partition("-")[0], "#888888"))


def as_files(
    drawings: Mapping[str, Callable[[Mapping[str, Any]], Figure]], results: Mapping[str, Any]
) -> dict[str, bytes]:
    """Draw each: file name -> content, `name.png` before `name.svg`."""
    from matplotlib import rc_context

    files: dict[str, bytes] = {}
    with rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw(results)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                stream = io.BytesIO()
                figure.savefig(stream, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.15, metadata=metadata)
                files[f"{name}.{kind}"] = stream.getvalue()
    return files


def canvas(
    results: Mapping[str, Any],
    title: str,
    note: str,
    shape: tuple[int, int],
    panel: tuple[float, float],
    **axes: Any,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of (rows, columns) panels of that size in inches, under title, data set's name and note."""
    from matplotlib.figure import Figure

    width, height = max(shape[1] * panel[0], 5.6), shape[0] * panel[1] + 1.3
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.55 / height))  # type: ignore[union-attr, call-arg]
    data = f"{results['data']['name']}, {results['data']['image_size']} px"
    figure.text(0.5, 1, title, ha="center", va="top", fontsize=12, fontweight="bold")
    figure.text(0.5, 1 - 0.26 / height, f"{data}; {note}", ha="center", va="top", color="#666666")
    return figure, figure.subplots(*shape, squeeze=False, **axes).tolist()


def legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=8, handletextpad=0.5)


def mark(marker: str, label: str, colour: str = INK, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"linestyle": "", "marker": marker, "color": colour, "label": label} | style)


def seeds_note(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many seeds stand behind the points of a figure."""
    seeds: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    for row in rows:
        seeds[tuple(row.get(part) for part in IDENTITY)].add(row["seed"])
    counts = set(map(len, seeds.values()))
    if counts == {1}:
        return "one seed"
    return f"mean and standard deviation over {'up to ' * (len(counts) > 1)}{max(counts)} seeds"
