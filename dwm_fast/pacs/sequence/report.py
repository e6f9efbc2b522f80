"""What the page of a sequence shows: the final table, accuracies after every domain, and what was stored."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dwm_fast.pacs.page.html import Cell, Table, as_text, counted, facts, render
from dwm_fast.pacs.sequence.finding import finding
from dwm_fast.pacs.sequence.table import SequenceRow, by_order, note, orders_in, sequence_table, storage
from dwm_fast.pacs.tables import MISSING, over_seeds


def page(results: Mapping[str, Any], drawn: Mapping[str, bytes], command: str) -> str:
    """The HTML page of a sequence's results; arguments as `dwm_fast.pacs.page.html.render`."""
    rows = sequence_table(results)
    seeds = counted(len({one["seed"] for one in results["sources"]}), "seed")
    domains = [" → ".join(order) for order in orders_in(results)]
    order = domains[0] if len(domains) == 1 else f"{len(results['sequence'])} domains in {len(domains)} orders"
    return render(
        "sequence.html",
        results,
        drawn,
        command,
        facts=facts(results, order, seeds),
        finding=finding(results),
        final=_final(rows),
        orders=_orders(results),
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


def _orders(results: Mapping[str, Any]) -> Table | None:
    """Every method in every order by itself; None where there is one order."""
    body = []
    last = ""
    for order, row in by_order(results):
        shown = " → ".join(order)
        cells = [row.average, Cell(row.backward_transfer, signed=True), Cell(row.forgetting, signed=True)]
        body.append([shown if shown != last else "", _label(row.method, row.view), *row.final.values(), *cells])
        last = shown
    names = ["order", "method", *results["sequence"], "average", "backward transfer", "forgetting"]
    return Table(names, body) if body else None


def _matrices(results: Mapping[str, Any], rows: Sequence[SequenceRow]) -> Table:
    """For each method, view and order, one line per domain learned: the accuracies on all domains seen by then."""
    orders = orders_in(results)
    found: dict[tuple[Any, ...], list[float]] = {}
    for one in results["rows"]:
        key = (one.get("order"), one["method"], one["view"], one["after"], one["on"])
        found.setdefault(key, []).append(one["accuracy"])
    body = []
    for row, order in itertools.product(rows, orders):
        name = ",".join(order) if len(orders) > 1 else None
        for position, after in enumerate(order):
            seen = order[: position + 1]
            cells = [
                over_seeds(found[name, row.method, row.view, after, on]) if on in seen else ""
                for on in results["sequence"]
            ]
            body.append([_label(row.method, row.view) if position == 0 else "", after, *cells])
    return Table(["method", "after", *(f"on {on}" for on in results["sequence"])], body)


def _tasks(results: Mapping[str, Any]) -> Table:
    """For each method and domain: storage, time, and the figures the method gave, as means over orders and seeds."""
    shared = "ordinary training, shared by all methods"
    body: list[list[Any]] = []
    for first in dict.fromkeys(order[0] for order in orders_in(results)):
        seconds = [one["seconds"] for one in results["sources"] if one["source"] == first]
        body.append(["network of the first domain", first, MISSING, over_seeds(seconds), shared])
    for method in dict.fromkeys(task["method"] for task in results["tasks"]):
        for number, domain in enumerate(results["sequence"]):
            tasks = [t for t in results["tasks"] if (t["method"], t["domain"]) == (method, domain)]
            body.append(
                [
                    Cell(method, method=method) if number == 0 else "",
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
