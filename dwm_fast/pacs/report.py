"""One HTML file that tells a study: the finding in words, the table, the figures, and how to run it again.

The file needs no network and no other file: styles are inline and images are data URIs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dwm_fast.pacs.finding import finding
from dwm_fast.pacs.report_parts import (
    data_section,
    definitions,
    figure,
    header,
    html_number,
    one_each,
    reproduce,
    section,
    swatch,
    table,
    told,
    write_page,
)
from dwm_fast.pacs.report_style import CAPTIONS, DEFINITIONS, VIEWS
from dwm_fast.pacs.table import (
    INITS,
    METHODS,
    MISSING,
    PUBLISHED,
    Cell,
    Stat,
    TableRow,
    at,
    columns,
    coverage_note,
    in_order,
    paper_table,
    rank,
    stat,
    uniform_coverage,
)

COMMAND = "dwm-fast pacs --config config.yaml"


def write_report(
    results: Mapping[str, Any], folder: Path | str, figures: Iterable[Path | str], command: str = COMMAND
) -> Path:
    """Write `report.html` into `folder`.

    Args:
        results: a study's results; any part of the grid may be missing.
        folder: where the report goes; made when missing.
        figures: image files to inline; where a figure is there as SVG and as PNG, the SVG is taken.
        command: what to type, in the run folder, to get these results again.

    Returns:
        The report's path.

    Raises:
        DataError: a figure cannot be read or the report cannot be written.
    """
    rows = paper_table(results)
    data = results["data"]
    body = [
        _header(results),
        section("Finding", told(finding(results))),
        section("S gain and T drop", _gain_tables(rows, data["real"])),
        section("Figures", "".join(figure(path, CAPTIONS) for path in one_each(figures))),
        section("Accuracies", _accuracy_table(rows)),
        section("Source networks and masks", _mask_table(results)),
        section("What the words mean", definitions(DEFINITIONS, "terms")),
        section("Data", data_section(data)),
        section("How to reproduce", reproduce(results, command)),
    ]
    return write_page(f"Weight masks for domain transfer: {data['name']}", body, folder)


def _header(results: Mapping[str, Any]) -> str:
    data = results["data"]
    pairs = len({(run["source"], run["target"]) for run in results["rows"]})
    seeds = len({run["seed"] for run in results["rows"]})
    facts = (
        f"{pairs} pair{'s' * (pairs != 1)}",
        f"{seeds} seed{'s' * (seeds != 1)}",
        f"{len(data['classes'])} classes at {data['image_size']} px",
        f"on {results['versions'].get('device', 'an unknown device')}",
    )
    return header("Weight masks for domain transfer", data, facts)


def _label(row: TableRow, rate: bool = False) -> str:
    way = f"batch norm {row.bn_policy}" + (f", rate {row.rate}" if rate else "")
    return f"{swatch(row.method)}{escape(row.label)}<small>{escape(way)}</small>"


def _gain_cell(one: Cell | None, best: bool, cover: bool) -> str:
    if one is None:
        return MISSING
    gain = html_number(one.s_gain, True)
    text = f"<strong>{gain}</strong>" if best else f"<span>{gain}</span>"
    text += f'<small class="drop">{html_number(one.t_drop, True)}</small>'
    return text + (f'<small class="cover">{escape(one.coverage)}</small>' if cover else "")


def _gain_tables(rows: Sequence[TableRow], real: bool) -> str:
    if not rows:
        return "<p>No run has finished yet.</p>"
    cover = uniform_coverage(row.cells.get(source) for row in rows for source in row.sources) is None
    bold = "" if cover else "; bold is the highest S gain of its column"
    parts = [f"<p>In each cell S gain stands above T drop{bold}.</p>"]
    for view in sorted({row.view for row in rows}, key=lambda one: rank(list(VIEWS), one)):
        chosen = [row for row in rows if row.view == view and not row.baseline]
        best: dict[str, float] = {}
        for column in columns(rows):
            cells = [at(row, column) for row in chosen]
            gains = [one.s_gain.mean for one in cells if one is not None and one.s_gain.mean is not None]
            best[column] = max(gains, default=math.inf)
        body = []
        for row in chosen:
            cells = [at(row, column) for column in columns(rows)]
            marks = [
                one is not None and not cover and one.s_gain.mean == best[column]
                for one, column in zip(cells, columns(rows), strict=True)
            ]
            kept = html_number(Stat(row.overall.fraction_kept.mean, None))
            gains_html = [_gain_cell(one, mark, cover) for one, mark in zip(cells, marks, strict=True)]
            body.append([_label(row), kept, escape(row.rate), *gains_html])
        if body:
            names = ["method", "kept", "learning rate", *map(escape, columns(rows))]
            parts.append(table(names, body, VIEWS.get(view, view)))
    parts.append(f'<p class="note">{escape(coverage_note(rows))}</p>')
    return "".join(parts) + (_published() if real else "")


def _published() -> str:
    domains = list(PUBLISHED["S_start"])
    body = [
        [escape(init), *(_html_pair(*PUBLISHED[init][domain]) for domain in domains)]
        for init in sorted(PUBLISHED, key=lambda one: rank(INITS, one))
    ]
    return table(["init", *domains], body, "Published table, S gain above T drop (arXiv 2308.13957)")


def _html_pair(gain: float, drop: float) -> str:
    top, below = html_number(Stat(gain, None), True), html_number(Stat(drop, None), True)
    return f'<span>{top}</span><small class="drop">{below}</small>'


def _accuracy_table(rows: Sequence[TableRow]) -> str:
    body = []
    for row in rows:
        cells = []
        for column in columns(rows):
            one = at(row, column)
            if one is None:
                cells.append(MISSING)
                continue
            source = f"{html_number(Stat(one.source_before.mean, None))} → {html_number(one.source_after)}"
            cells.append(f'<span>{source}</span><small class="drop">{html_number(one.target_after)}</small>')
        body.append([_label(row, row.ambiguous), escape(row.view), *cells])
    if not body:
        return ""
    names = ["method", "view", *map(escape, columns(rows))]
    return table(names, body, "Source accuracy before → after, above target accuracy after")


def _mask_table(results: Mapping[str, Any]) -> str:
    """One line per source and method: how the source does, what the mask keeps, if it met its budget."""
    body = []
    for source in in_order(results, (entry["source"] for entry in results["sources"])):
        alone = [entry for entry in results["sources"] if entry["source"] == source]
        masks = [mask for mask in results["masks"] if mask["source"] == source]
        whole = html_number(stat(alone, "accuracy"))
        body.append([escape(source), "no mask", MISSING, whole, MISSING, MISSING, str(len(alone))])
        for method in sorted({mask["method"] for mask in masks}, key=lambda one: rank(METHODS, one)):
            body.append([escape(source), *_mask_line([mask for mask in masks if mask["method"] == method])])
    if not body:
        return ""
    names = ["source", "mask", "kept", "source accuracy", "within budget", "coefficient", "seeds"]
    return table(names, body, "Accuracy on the source's own test images, whole and under the mask")


def _mask_line(masks: Sequence[Mapping[str, Any]]) -> list[str]:
    method = masks[0]["method"]
    judged = [mask["within_budget"] for mask in masks if mask["within_budget"] is not None]
    coefficients = [f"{mask['coefficient']:.3g}" for mask in masks if mask["coefficient"] is not None]
    return [
        swatch(method) + escape(method),
        html_number(stat(masks, "fraction_kept")),
        html_number(stat(masks, "masked_accuracy")),
        f"{sum(judged)} of {len(judged)}" if judged else MISSING,
        ", ".join(coefficients) or MISSING,
        str(len(masks)),
    ]
