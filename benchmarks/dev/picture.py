"""The README's picture and its caption, drawn from a recorded run of the study.

python -m benchmarks.dev.picture
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkout import TREE

RUN = "photo-sketch-seeds"
FIGURE = Path("docs/figures") / f"{RUN}.svg"
_BLOCK = re.compile(r"(<!-- generated: picture -->\n).*?(<!-- end generated -->)", re.DOTALL)

WAYS: dict[str, dict[str, Any]] = {
    "fine-tuning every weight": {"method": "none", "view": "shared", "lr": 3e-4},
    "fine-tuning what the mask lets go": {"method": "binary", "view": "shared"},
    "the same, photo under its own bits": {"method": "binary", "view": "masked"},
}
"""Legend -> the rows of the run that it stands for; the first is what the others are compared with."""
_LOOKS = (("#4d4d4d", "o"), ("#0072b2", "s"), ("#009e73", "D"))


def rows_of(results: Mapping[str, Any], way: str) -> list[Mapping[str, Any]]:
    """The rows of a way, one a seed."""
    wanted = WAYS[way].items()
    return [row for row in results["rows"] if all(row[key] == value for key, value in wanted)]


def means(results: Mapping[str, Any], way: str) -> tuple[float, float]:
    """Accuracy on the target and on the source, mean over seeds."""
    rows = rows_of(results, way)
    return statistics.fmean(r["target_after"] for r in rows), statistics.fmean(r["source_after"] for r in rows)


def before(results: Mapping[str, Any]) -> float:
    """Accuracy on the source before fine-tuning, mean over seeds."""
    return statistics.fmean(row["source_before"] for row in rows_of(results, next(iter(WAYS))))


def megabytes(results: Mapping[str, Any]) -> float:
    """Size of one mask at one bit a weight, in MB."""
    return float(results["masks"][0]["total"]) / 8e6


def caption(results: Mapping[str, Any]) -> str:
    """What the picture shows, in one paragraph of Markdown."""
    plain, kept, own = WAYS
    seeds = len(rows_of(results, plain))
    images = results["data"]["counts"]
    row = results["rows"][0]
    source, target = row["source"], row["target"]
    (plain_target, plain_source), (kept_target, kept_source), (_, own_source) = (
        means(results, way) for way in (plain, kept, own)
    )
    return (
        f"A ResNet-18 that knows {source} learns {target} (real {results['data']['name']}, "
        f"{results['config']['image_size']} px, mean of {seeds} seeds). Fine-tuning every weight reaches "
        f"{plain_target:.3f} on {target} and leaves {plain_source:.3f} of {before(results):.3f} on {source}. With the "
        f"masked weights frozen it is {kept_target:.3f} and {kept_source:.3f}. Under its own bits, "
        f"{megabytes(results):.1f} MB, {source} stays at {own_source:.3f} whatever was learned since. Tested on "
        f"{images[source]['test']} and {images[target]['test']} images; "
        f"[recorded here](docs/results/README.md#{RUN})."
    )


def readme(text: str, results: Mapping[str, Any]) -> str:
    """The README with its generated block written anew."""
    row = results["rows"][0]
    alt = f"accuracy kept on {row['source']} against accuracy reached on {row['target']}"
    body = f"![{alt}]({FIGURE.as_posix()})\n\n{caption(results)}\n"
    return _BLOCK.sub(lambda match: match.group(1) + body + match.group(2), text)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture: small marks are seeds, large ones their mean."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from dwm_fast.pacs.page.figure_style import INK, STYLE

    row = results["rows"][0]
    with rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        known = before(results)
        axes.axhline(known, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(f"{row['source']} before", (0.802, known), xytext=(0, 4), textcoords="offset points", fontsize=9)
        for way, (colour, marker) in zip(WAYS, _LOOKS, strict=True):
            rows = rows_of(results, way)
            points = [r["target_after"] for r in rows], [r["source_after"] for r in rows]
            axes.scatter(*points, s=18, color=colour, marker=marker, alpha=0.45, linewidths=0)
            axes.scatter(*means(results, way), s=90, color=colour, marker=marker, label=way)
        axes.set(xlim=(0.8, 1.0), ylim=(0.0, 1.05))
        axes.set_xlabel(f"reached on {row['target']} (accuracy)")
        axes.set_ylabel(f"kept on {row['source']} (accuracy)")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.02))
        figure.savefig(path, metadata={"Date": None})


def recorded(tree: Path) -> Any:
    """The run behind the picture."""
    return json.loads((tree / "docs" / "results" / RUN / "results.json").read_text(encoding="utf-8"))


def main() -> None:
    results = recorded(TREE)
    draw(results, TREE / FIGURE)
    path = TREE / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
