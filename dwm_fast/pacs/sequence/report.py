"""What the page of a sequence shows: the final table, accuracies after every domain, and what was stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dwm_fast.pacs.page.html import Cell, Table, as_text, counted, facts, render
from dwm_fast.pacs.sequence.finding import finding
from dwm_fast.pacs.sequence.table import SequenceRow, note, sequence_table, storage
from dwm_fast.pacs.tables import MISSING, over_seeds


def page(results: Mapping[str, Any], drawn: Mapping[str, bytes], command: str) -> str:
    """The HTML page of a sequence's results; arguments as `dwm_fast.pacs.page.html.render`."""
    rows = sequence_table(results)
    seeds = counted(len(results["sources"]), "seed")
    return render(
        "sequence.html",
        results,
        drawn,
        command,
        facts=facts(results, " → ".join(results["sequence"]), seeds),
        finding=finding(results),
        final=_final(rows),
        matrices=_matrices(results, rows),
        tasks=_tasks(results),
    )


def _label(method: str, view: str) -> Cell:
    return Cell(method, (view,), method=method)


def _final(rows: Sequence[SequenceRow]) -> Table:
    best = max((row.average.rank for row in rows), default=0.0)
    transfer = any(row.forward_transfer.mean is not None for row in rows)
    body = [
        [
            _label(row.method, row.view),
            *row.final.values(),
            Cell(row.average, strong=row.average.rank == best),
            Cell(row.backward_transfer, signed=True),
            Cell(row.forgetting, signed=True),
            row.incremental_average,
            Cell(row.weighted_forgetting, signed=True),
            *([Cell(row.forward_transfer, signed=True)] if transfer else []),
            storage(row.bits_added),
            MISSING if row.seconds.mean is None else f"{row.seconds.mean:.1f}",
        ]
        for row in rows
    ]
    domains = list(rows[0].final) if rows else []
    later = ["incremental average", "forgetting by size", *(["forward transfer"] if transfer else [])]
    names = ["method", *domains, "average", "backward transfer", "forgetting", *later, "added per domain", "seconds"]
    return Table(names, body, note=f"{note(rows)} Bold is the highest average.")


def _matrices(results: Mapping[str, Any], rows: Sequence[SequenceRow]) -> Table:
    """For each method and view, one line per domain learned: the accuracies on all domains seen by then."""
    sequence = results["sequence"]
    found: dict[tuple[Any, ...], list[float]] = {}
    for one in results["rows"]:
        found.setdefault((one["method"], one["view"], one["after"], one["on"]), []).append(one["accuracy"])
    body = []
    for row in rows:
        for position, after in enumerate(sequence):
            cells = [over_seeds(found[row.method, row.view, after, on]) for on in sequence[: position + 1]]
            blank = [""] * (len(sequence) - len(cells))
            body.append([_label(row.method, row.view) if position == 0 else "", after, *cells, *blank])
    return Table(["method", "after", *(f"on {on}" for on in sequence)], body)


def _tasks(results: Mapping[str, Any]) -> Table:
    """For each method and domain: storage, time, and the figures the method gave, as means over seeds."""
    first = over_seeds([one["seconds"] for one in results["sources"]])
    shared = "ordinary training, shared by all methods"
    body: list[list[Any]] = [["network of the first domain", results["sequence"][0], MISSING, first, shared]]
    for method in dict.fromkeys(task["method"] for task in results["tasks"]):
        for position, domain in enumerate(results["sequence"]):
            tasks = [t for t in results["tasks"] if (t["method"], t["position"]) == (method, position)]
            body.append(
                [
                    Cell(method, method=method) if position == 0 else "",
                    domain,
                    storage(over_seeds([t["bits"] for t in tasks])),
                    over_seeds([t["seconds"] for t in tasks]),
                    _figures([t["figures"] for t in tasks]),
                ]
            )
    return Table(["method", "domain", "stored", "seconds", "figures"], body)


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
