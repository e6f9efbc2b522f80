"""The HTML report of a sequence: finding, table, figures, accuracies after every domain, what was stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dwm_fast.pacs.report_parts import (
    as_text,
    data_section,
    definitions,
    figure,
    flat,
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
from dwm_fast.pacs.sequence_finding import finding
from dwm_fast.pacs.sequence_table import SequenceRow, note, over_seeds, sequence_table, storage
from dwm_fast.pacs.table import MISSING

CAPTIONS = {
    "sequence": "Accuracy on the test images of each domain, after each domain that was learned. Methods are set a "
    "little apart, so that equal accuracies do not hide each other.",
    "storage": "Average accuracy after the last domain against what each domain added to storage.",
    "forgetting": "What is lost of the best earlier accuracy, mean over all domains but the last. Below 0: "
    "later domains helped earlier ones.",
}
DEFINITIONS = (
    ("sequence", "One backbone learns the domains one after the other. The first is learned by the whole network."),
    ("none", "Plain fine-tuning of every weight on each domain: the baseline."),
    ("average", "Mean accuracy over all domains, after the last was learned."),
    (
        "forgetting",
        "Best accuracy on a domain before the last was learned, minus the final one; mean over all but the "
        "last domain.",
    ),
    (
        "backward transfer",
        "Final accuracy on a domain minus the one just after it was learned; mean over all but the last domain.",
    ),
    (
        "bits added",
        "Masks, real values, batch norm and own weights of a domain, beside the backbone and its head; mean "
        "over the domains after the first.",
    ),
    ("seconds", "Time of learning a domain, evaluation left out; mean over the domains after the first."),
    ("view shared", "The network as it is at that time, with the domain's own head and whatever else is its own."),
    ("view masked", "The domain's own bits over the same weights: what is not its own is zeroed."),
)


def write_report(results: Mapping[str, Any], folder: Path | str, figures: Iterable[Path | str], command: str) -> Path:
    """Write `report.html` into `folder`.

    Args:
        results: a sequence's results.
        folder: where the report goes; made when missing.
        figures: image files to inline; where a figure is there as SVG and as PNG, the SVG is taken.
        command: what to type to get these results again.

    Raises:
        DataError: a figure cannot be read or the report cannot be written.
    """
    rows = sequence_table(results)
    body = [
        _header(results),
        section("Finding", told(finding(results))),
        section("After the last domain", _final(rows)),
        section("Figures", "".join(figure(path, CAPTIONS) for path in one_each(figures))),
        section("Accuracy after every domain", _matrices(results, rows)),
        section("What was learned", _tasks(results)),
        section("What the words mean", definitions(DEFINITIONS, "terms")),
        section("Data", data_section(results["data"])),
        section("How to reproduce", _methods(results) + reproduce(results, command)),
    ]
    return write_page(f"Domain after domain: {results['data']['name']}", body, folder)


def _header(results: Mapping[str, Any]) -> str:
    seeds = len(results["sources"])
    facts = (
        " → ".join(results["sequence"]),
        f"{seeds} seed{'s' * (seeds != 1)}",
        f"{len(results['data']['classes'])} classes at {results['data']['image_size']} px",
        f"on {results['versions'].get('device', 'an unknown device')}",
    )
    return header("Domain after domain, one backbone", results["data"], facts)


def _label(method: str, view: str) -> str:
    return f"{swatch(method)}{escape(method)}<small>{escape(view)}</small>"


def _final(rows: Sequence[SequenceRow]) -> str:
    best = max((row.average.mean or 0.0 for row in rows), default=0.0)
    body = []
    for row in rows:
        average = html_number(row.average)
        seconds = MISSING if row.seconds.mean is None else f"{row.seconds.mean:.1f}"
        body.append(
            [
                _label(row.method, row.view),
                *map(html_number, row.final.values()),
                f"<strong>{average}</strong>" if row.average.mean == best else average,
                html_number(row.backward_transfer, True),
                html_number(row.forgetting, True),
                escape(storage(row.bits_added)),
                seconds,
            ]
        )
    domains = list(rows[0].final) if rows else []
    measured = ["average", "backward transfer", "forgetting", "added per domain", "seconds"]
    said = f'<p class="note">{escape(note(rows))} Bold is the highest average.</p>'
    return table(["method", *map(escape, domains), *measured], body) + said


def _matrices(results: Mapping[str, Any], rows: Sequence[SequenceRow]) -> str:
    """For each method and view, one line per domain learned: the accuracies on all domains seen by then."""
    sequence = results["sequence"]
    body = []
    for row in rows:
        for position, after in enumerate(sequence):
            found = [
                [
                    r["accuracy"]
                    for r in results["rows"]
                    if (r["method"], r["view"], r["after"], r["on"]) == (row.method, row.view, after, on)
                ]
                for on in sequence[: position + 1]
            ]
            cells = [html_number(over_seeds(values)) for values in found]
            blank = [""] * (len(sequence) - len(cells))
            body.append([_label(row.method, row.view) if position == 0 else "", escape(after), *cells, *blank])
    return table(["method", "after", *(f"on {escape(on)}" for on in sequence)], body)


def _tasks(results: Mapping[str, Any]) -> str:
    """For each method and domain: storage, time, and the figures the method gave, as means over seeds."""
    first = html_number(over_seeds([one["seconds"] for one in results["sources"]]))
    shared = "ordinary training, shared by all methods"
    body = [["network of the first domain", escape(results["sequence"][0]), MISSING, first, shared]]
    for method in dict.fromkeys(task["method"] for task in results["tasks"]):
        for position, domain in enumerate(results["sequence"]):
            tasks = [t for t in results["tasks"] if (t["method"], t["position"]) == (method, position)]
            body.append(
                [
                    f"{swatch(method)}{escape(method)}" if position == 0 else "",
                    escape(domain),
                    escape(storage(over_seeds([t["bits"] for t in tasks]))),
                    html_number(over_seeds([t["seconds"] for t in tasks])),
                    escape(_figures([t["figures"] for t in tasks])),
                ]
            )
    return table(["method", "domain", "stored", "seconds", "figures"], body)


def _figures(found: Sequence[Mapping[str, Any]]) -> str:
    """'fraction kept 0.312; epochs 3': numbers as means over seeds, anything else as it is in the first."""
    said = []
    for key in found[0]:
        values = [one.get(key) for one in found]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            text = f"{over_seeds(values).mean:.4g}"  # type: ignore[arg-type]
        else:
            text = ", ".join(dict.fromkeys(map(as_text, values)))
        said.append(f"{key.replace('_', ' ')} {text}")
    return "; ".join(said) or MISSING


def _methods(results: Mapping[str, Any]) -> str:
    """Every option of every method, folded away."""
    parts = []
    for method, options in results["methods"].items():
        pairs = definitions(((name, as_text(value)) for name, value in flat(options)), "settings")
        parts.append(f"<details><summary>{escape(method)}: every option</summary>{pairs}</details>")
    return "".join(parts)
