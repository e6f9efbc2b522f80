"""One HTML file that tells a study: the finding in words, the table, the figures, and how to run it again.

The file needs no network and no other file: styles are inline and images are data URIs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dwm_fast._files import write_atomic
from dwm_fast.errors import DataError
from dwm_fast.pacs.figure_style import colour
from dwm_fast.pacs.finding import finding
from dwm_fast.pacs.report_style import CAPTIONS, CSS, DEFINITIONS, NATURE, VIEWS
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
    number,
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
    title = f"Weight masks for domain transfer: {data['name']}"
    body = [
        _header(results),
        _section("Finding", _finding(finding(results))),
        _section("S gain and T drop", _gain_tables(rows, data["real"])),
        _section("Figures", "".join(_figure(path) for path in _one_each(figures))),
        _section("Accuracies", _accuracy_table(rows)),
        _section("Source networks and masks", _mask_table(results)),
        _section("What the words mean", _pairs(DEFINITIONS, "terms")),
        _section("Data", _data(data)),
        _section("How to reproduce", _reproduce(results, command)),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = Path(folder) / "report.html"
    write_atomic(path, page)
    return path


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _header(results: Mapping[str, Any]) -> str:
    data = results["data"]
    kind = "real" if data["real"] else "standin"
    pairs = len({(run["source"], run["target"]) for run in results["rows"]})
    seeds = len({run["seed"] for run in results["rows"]})
    facts = (
        f"{pairs} pair{'s' * (pairs != 1)}",
        f"{seeds} seed{'s' * (seeds != 1)}",
        f"{len(data['classes'])} classes at {data['image_size']} px",
        f"on {results['versions'].get('device', 'an unknown device')}",
    )
    return (
        "<header><h1>Weight masks for domain transfer</h1>"
        f'<p><span class="badge {kind}">{escape(data["name"])}</span> {escape(", ".join(facts))}</p></header>'
    )


def _finding(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences[2:])
    return f'<p class="lead">{escape(" ".join(sentences[:2]))}</p>' + (f"<ul>{items}</ul>" if items else "")


def _table(header: Iterable[str], body: Iterable[Iterable[str]], caption: str = "") -> str:
    """A table from cells that are HTML already; the first column is the row's header."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for name, *cells in body:
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _swatch(method: str) -> str:
    return f'<i class="swatch" style="background:{colour(method)}"></i>'


def _label(row: TableRow) -> str:
    return f"{_swatch(row.method)}{escape(row.label)}<small>batch norm {escape(row.bn_policy)}</small>"


def _html_number(value: Stat, signed: bool = False) -> str:
    """The mean, with a true minus sign, and the spread small beside it."""
    mean, _, spread = number(value, signed).partition(" ± ")
    return mean.replace("-", "−") + (f' <span class="spread">± {spread}</span>' if spread else "")


def _gain_cell(one: Cell | None, best: bool, cover: bool) -> str:
    if one is None:
        return MISSING
    gain = _html_number(one.s_gain, True)
    text = f"<strong>{gain}</strong>" if best else f"<span>{gain}</span>"
    text += f'<small class="drop">{_html_number(one.t_drop, True)}</small>'
    return text + (f'<small class="cover">{escape(one.coverage)}</small>' if cover else "")


def _gain_tables(rows: Sequence[TableRow], real: bool) -> str:
    if not rows:
        return "<p>No run has finished yet.</p>"
    cover = uniform_coverage(row.cells.get(source) for row in rows for source in row.sources) is None
    bold = "" if cover else "; bold is the highest S gain of its column"
    parts = [f"<p>In each cell S gain stands above T drop{bold}.</p>"]
    for view in sorted({row.view for row in rows}, key=lambda one: rank(list(VIEWS), one)):
        chosen = [row for row in rows if row.view == view and row.method != "none"]
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
            kept = _html_number(Stat(row.overall.fraction_kept.mean, None))
            lrs = escape(", ".join(f"{lr:g}" for lr in row.lrs) or MISSING)
            gains_html = [_gain_cell(one, mark, cover) for one, mark in zip(cells, marks, strict=True)]
            body.append([_label(row), kept, lrs, *gains_html])
        if body:
            header = ["method", "kept", "learning rate", *map(escape, columns(rows))]
            parts.append(_table(header, body, VIEWS.get(view, view)))
    parts.append(f'<p class="note">{escape(coverage_note(rows))}</p>')
    return "".join(parts) + (_published() if real else "")


def _published() -> str:
    domains = list(PUBLISHED["S_start"])
    body = [
        [escape(init), *(_html_pair(*PUBLISHED[init][domain]) for domain in domains)]
        for init in sorted(PUBLISHED, key=lambda one: rank(INITS, one))
    ]
    return _table(["init", *domains], body, "Published table, S gain above T drop (arXiv 2308.13957)")


def _html_pair(gain: float, drop: float) -> str:
    top, below = _html_number(Stat(gain, None), True), _html_number(Stat(drop, None), True)
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
            source = f"{_html_number(Stat(one.source_before.mean, None))} → {_html_number(one.source_after)}"
            cells.append(f'<span>{source}</span><small class="drop">{_html_number(one.target_after)}</small>')
        body.append([_label(row), escape(row.view), *cells])
    if not body:
        return ""
    header = ["method", "view", *map(escape, columns(rows))]
    return _table(header, body, "Source accuracy before → after, above target accuracy after")


def _mask_table(results: Mapping[str, Any]) -> str:
    """One line per source and method: how the source does, what the mask keeps, if it met its budget."""
    body = []
    for source in in_order(results, (entry["source"] for entry in results["sources"])):
        alone = [entry for entry in results["sources"] if entry["source"] == source]
        masks = [mask for mask in results["masks"] if mask["source"] == source]
        whole = _html_number(stat(alone, "accuracy"))
        body.append([escape(source), "no mask", MISSING, whole, MISSING, MISSING, str(len(alone))])
        for method in sorted({mask["method"] for mask in masks}, key=lambda one: rank(METHODS, one)):
            body.append([escape(source), *_mask_line([mask for mask in masks if mask["method"] == method])])
    if not body:
        return ""
    header = ["source", "mask", "kept", "source accuracy", "within budget", "coefficient", "seeds"]
    return _table(header, body, "Accuracy on the source's own test images, whole and under the mask")


def _mask_line(masks: Sequence[Mapping[str, Any]]) -> list[str]:
    method = masks[0]["method"]
    judged = [mask["within_budget"] for mask in masks if mask["within_budget"] is not None]
    coefficients = [f"{mask['coefficient']:.3g}" for mask in masks if mask["coefficient"] is not None]
    return [
        _swatch(method) + escape(method),
        _html_number(stat(masks, "fraction_kept")),
        _html_number(stat(masks, "masked_accuracy")),
        f"{sum(judged)} of {len(judged)}" if judged else MISSING,
        ", ".join(coefficients) or MISSING,
        str(len(masks)),
    ]


def _one_each(figures: Iterable[Path | str]) -> list[Path]:
    """One file per figure, SVG where there is one, in the order given."""
    chosen: dict[str, Path] = {}
    for path in map(Path, figures):
        if path.stem not in chosen or path.suffix == ".svg":
            chosen[path.stem] = path
    return list(chosen.values())


def _figure(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read figure {path}: {error.strerror}; draw the figures again") from error
    kind = "image/svg+xml" if path.suffix == ".svg" else "image/png"
    caption = escape(CAPTIONS.get(path.stem, path.stem))
    image = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return f'<figure><img alt="{caption}" src="{image}"><figcaption>{caption}</figcaption></figure>'


def _data(data: Mapping[str, Any]) -> str:
    counts = [
        [escape(domain), str(data["counts"][domain]["train"]), str(data["counts"][domain]["test"])]
        for domain in data["domains"]
        if domain in data["counts"]
    ]
    classes = f"Classes: {', '.join(map(str, data['classes']))}."
    text = f"<p><b>{escape(data['name'])}</b>. {escape(NATURE[bool(data['real'])])} {escape(classes)}</p>"
    return text + _table(["domain", "training images", "test images"], counts)


def _reproduce(results: Mapping[str, Any], command: str) -> str:
    versions = _pairs(((name, _text(value)) for name, value in results["versions"].items()), "settings")
    config = _pairs(((name, _text(value)) for name, value in _flat(results["config"])), "settings")
    return (
        f"<pre>{escape(command)}</pre>"
        "<p>Same seeds, versions and device give the same numbers; <code>results.json</code> has them.</p>"
        f"<h3>Versions</h3>{versions}<details><summary>Every option</summary>{config}</details>"
    )


def _pairs(pairs: Iterable[tuple[str, str]], kind: str) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f'<dl class="{kind}">{lines}</dl>'


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        pairs += _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return pairs


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)
