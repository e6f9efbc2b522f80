"""What a sequence comes to: final accuracies, forgetting, backward transfer, storage and time, per method and view.

With a[i][j] the accuracy on task j after task i was learned, and n tasks:

    average            mean over j of a[n-1][j]
    forgetting         mean over j < n-1 of (max over j <= i < n-1 of a[i][j]) - a[n-1][j]     Chaudhry et al. 2018
    backward transfer  mean over j < n-1 of a[n-1][j] - a[j][j]                      Lopez-Paz and Ranzato 2017
    incremental        mean over i of the mean over j <= i of a[i][j]                Rebuffi et al. 2017
    weighted           forgetting, each task counted by its number of test images
    forward transfer   mean over 0 < j of a[j][j] - b[j], b[j] the accuracy of a network trained on task j alone:
                       intransigence of Chaudhry et al. 2018 with its sign turned round
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dwm_fast.pacs.tables import MISSING, Stat, csv_text, markdown, number, over_seeds, terminal_table

if TYPE_CHECKING:
    from rich.table import Table

RAW_COLUMNS = ("method", "seed", "view", "position", "after", "on", "accuracy", "loss")
METRICS = ("average", "backward_transfer", "forgetting", "bits_added", "seconds")
LATER_METRICS = ("incremental_average", "weighted_forgetting", "forward_transfer")
"""What runs of earlier releases, or those without networks of single domains, have not recorded."""

_BITS_IN_MB = 8e6
_DOMAIN_COLUMNS = 36
"""Characters that a terminal of 80 columns has for the domains."""


def forgetting(matrix: Sequence[Sequence[float]], sizes: Sequence[float] | None = None) -> float:
    """Mean over all tasks but the last of the best earlier accuracy minus the final one.

    Args:
        matrix: row i holds the accuracies on tasks 0 to i after task i; at least two rows.
        sizes: how much each task but the last counts; all the same by default.

    >>> forgetting([[0.9], [0.95, 0.8], [0.7, 0.8, 0.6]])
    0.125
    """
    last = len(matrix) - 1
    lost = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
    return fmean(lost, None if sizes is None else sizes[:last])


def incremental_average(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over the stages of the sequence of the mean accuracy on all tasks seen by then; `matrix` as above."""
    return fmean(map(fmean, matrix))


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of the final accuracy minus the one just after learning; `matrix` as above."""
    last = len(matrix) - 1
    return fmean(matrix[last][j] - matrix[j][j] for j in range(last))


def forward_transfer(matrix: Sequence[Sequence[float]], alone: Sequence[float]) -> float:
    """Mean over all tasks but the first of the accuracy just after learning minus that of a network of its own.

    Args:
        matrix: as above.
        alone: accuracy on each task but the first of a network that was trained on it alone.
    """
    return fmean(matrix[j][j] - own for j, own in enumerate(alone, start=1))


def measures(
    sequence: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    sizes: Mapping[str, int],
    alone: Mapping[tuple[str, int], float] | None = None,
) -> list[dict[str, Any]]:
    """One entry per method, view and seed.

    Args:
        sequence: the domains in order.
        rows: one per method, seed, view and pair of domains "after" and "on", with "accuracy".
        tasks: one per method, seed and "position", with "bits" and "seconds" of that domain.
        sizes: number of test images of every domain.
        alone: (domain, seed) -> accuracy of a network trained on it alone, for every domain but the first.

    Returns:
        "final" (domain -> accuracy), "average", "forgetting", "backward_transfer", "incremental_average",
        "weighted_forgetting" and, with `alone`, "forward_transfer"; "bits_added" and "seconds" are means over
        the domains that were added to the first one, "bits_total" the sum over all.
    """
    accuracy = {(r["method"], r["view"], r["seed"], r["after"], r["on"]): r["accuracy"] for r in rows}
    found = []
    for method, view, seed in dict.fromkeys((r["method"], r["view"], r["seed"]) for r in rows):
        matrix = [
            [accuracy[method, view, seed, after, on] for on in sequence[: position + 1]]
            for position, after in enumerate(sequence)
        ]
        own = [task for task in tasks if (task["method"], task["seed"]) == (method, seed)]
        added = [task for task in own if task["position"] > 0]
        found.append(
            {
                "method": method,
                "view": view,
                "seed": seed,
                "final": dict(zip(sequence, matrix[-1], strict=True)),
                "average": fmean(matrix[-1]),
                "forgetting": forgetting(matrix),
                "backward_transfer": backward_transfer(matrix),
                "incremental_average": incremental_average(matrix),
                "weighted_forgetting": forgetting(matrix, [sizes[domain] for domain in sequence]),
                **_forward(sequence, matrix, seed, alone),
                "bits_added": fmean(task["bits"] for task in added),
                "bits_total": sum(task["bits"] for task in own),
                "seconds": fmean(task["seconds"] for task in added),
            }
        )
    return found


def measures_of(
    orders: Sequence[Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    sizes: Mapping[str, int],
    alone: Mapping[tuple[str, int], float] | None = None,
) -> list[dict[str, Any]]:
    """As `measures`, for each of several orders whose rows and tasks say which they are of in "order"."""
    if len(orders) == 1:
        return measures(orders[0], rows, tasks, sizes, alone)
    found: list[dict[str, Any]] = []
    for order in orders:
        name = ",".join(order)
        own_rows, own_tasks = ([one for one in part if one["order"] == name] for part in (rows, tasks))
        found += [{"order": name, **one} for one in measures(order, own_rows, own_tasks, sizes, alone)]
    return found


def _forward(
    sequence: Sequence[str],
    matrix: Sequence[Sequence[float]],
    seed: int,
    alone: Mapping[tuple[str, int], float] | None,
) -> dict[str, float]:
    if alone is None:
        return {}
    return {"forward_transfer": forward_transfer(matrix, [alone[domain, seed] for domain in sequence[1:]])}


@dataclass(frozen=True)
class SequenceRow:
    """One method in one view: means and spreads over orders and seeds; `final` by domain in the first order."""

    data: str
    method: str
    view: str
    final: dict[str, Stat]
    average: Stat
    backward_transfer: Stat
    forgetting: Stat
    bits_added: Stat
    seconds: Stat
    incremental_average: Stat
    weighted_forgetting: Stat
    forward_transfer: Stat
    seeds: int
    orders: int = 1


def sequence_table(results: Mapping[str, Any]) -> list[SequenceRow]:
    """One row per method and view of a sequence's results, in the order in which they were run."""
    found = results["measures"]
    order = list(dict.fromkeys(one["method"] for one in found))
    groups = dict.fromkeys(sorted(((m["method"], m["view"]) for m in found), key=lambda key: order.index(key[0])))
    table = []
    for method, view in groups:
        runs = [one for one in found if (one["method"], one["view"]) == (method, view)]
        table.append(
            SequenceRow(
                str(results["data"]["name"]),
                method,
                view,
                {domain: over_seeds([run["final"][domain] for run in runs]) for domain in results["sequence"]},
                **{metric: over_seeds([run[metric] for run in runs]) for metric in METRICS},
                **{metric: _where_recorded(runs, metric) for metric in LATER_METRICS},
                seeds=len({run["seed"] for run in runs}),
                orders=len({run.get("order") for run in runs}),
            )
        )
    return table


def orders_in(results: Mapping[str, Any]) -> list[list[str]]:
    """The orders of a sequence's results; of earlier releases' its one."""
    return list(results.get("orders", [results["sequence"]]))


def by_order(results: Mapping[str, Any]) -> list[tuple[list[str], SequenceRow]]:
    """(order, row) of every method in every order by itself; none where there is one order."""
    found = []
    for order in results.get("orders", ()):
        own = [one for one in results["measures"] if one["order"] == ",".join(order)]
        found += [(order, row) for row in sequence_table({**results, "measures": own})]
    return found


def over_what(rows: Sequence[SequenceRow]) -> str:
    """What means and spreads are over: '3 orders × 2 seeds', '2 seeds', 'one seed'."""
    seeds, orders = (max((getattr(row, what) for row in rows), default=0) for what in ("seeds", "orders"))
    counted = f"{seeds} seeds" if seeds > 1 else "one seed"
    return f"{orders} orders × {counted}" if orders > 1 else counted


def _where_recorded(runs: Sequence[Mapping[str, Any]], metric: str) -> Stat:
    return over_seeds([run[metric] for run in runs]) if all(metric in run for run in runs) else Stat(None)


def storage(value: Stat) -> str:
    """Bits as people read them: '0', '512 bit', '21.3 kB', '1.396 MB'."""
    bits = value.mean
    if bits is None:
        return MISSING
    if bits < 8000:
        return f"{bits:.0f} bit" if bits else "0"
    return f"{bits / 8000:.1f} kB" if bits < _BITS_IN_MB else f"{bits / _BITS_IN_MB:.3f} MB"


def note(rows: Sequence[SequenceRow]) -> str:
    """One sentence on what the table's numbers are."""
    over = over_what(rows)
    spread = "one seed, so no spread" if over == "one seed" else f"mean ± standard deviation over {over}"
    return f"Accuracy after the last domain ({spread}); bits and seconds are per domain added to the first."


def to_markdown(rows: Sequence[SequenceRow]) -> str:
    """The table in markdown, titled with the data set's name and the order of the domains."""
    if not rows:
        return "No runs yet.\n"
    domains = list(rows[0].final)
    later = any(row.incremental_average.mean is not None for row in rows)
    more = ["incremental average", "forgetting by size"] if later else []
    transfer = any(row.forward_transfer.mean is not None for row in rows)
    more += ["forward transfer"] if transfer else []
    header = ["method", "view", *domains, "average", "backward transfer", "forgetting", *more, "bits added", "seconds"]
    body = [
        [
            row.method,
            row.view,
            *map(number, row.final.values()),
            number(row.average),
            number(row.backward_transfer, True),
            number(row.forgetting, True),
            *([number(row.incremental_average), number(row.weighted_forgetting, True)] if later else []),
            *([number(row.forward_transfer, True)] if transfer else []),
            MISSING if row.bits_added.mean is None else f"{row.bits_added.mean:,.0f}",
            number(row.seconds, digits=1),
        ]
        for row in rows
    ]
    order = "this order" if rows[0].orders == 1 else f"{rows[0].orders} orders"
    title = f"**After {', '.join(domains)} in {order}, on {rows[0].data}**"
    return "\n".join([title, "", markdown(header, body), "", note(rows), ""])


def orders_markdown(results: Mapping[str, Any]) -> str:
    """The rows of single orders in markdown, where there are several; '' where there is one."""
    found = by_order(results)
    if not found:
        return ""
    body = []
    for order, row in found:
        figures = number(row.average), number(row.backward_transfer, True), number(row.forgetting, True)
        body.append([", ".join(order), row.method, row.view, *figures])
    header = ["order", "method", "view", "average", "backward transfer", "forgetting"]
    return "\n".join(["", "**Each order by itself**", "", markdown(header, body), ""])


def to_csv(rows: Sequence[SequenceRow]) -> str:
    """The table, a line per method and view; of several orders with their number."""
    several = any(row.orders > 1 for row in rows)
    domains = list(rows[0].final) if rows else []
    names = [*(f"final_{domain}" for domain in domains), *METRICS, *LATER_METRICS]
    both = [column for name in names for column in (name, f"{name}_spread")]
    lines: list[Sequence[object]] = [["data", "method", "view", *both, "seeds", *(["orders"] if several else [])]]
    for row in rows:
        stats: list[Stat] = [*row.final.values(), *(getattr(row, metric) for metric in (*METRICS, *LATER_METRICS))]
        values = [value for one in stats for value in (one.mean, one.spread)]
        lines.append([row.data, row.method, row.view, *values, row.seeds, *([row.orders] if several else [])])
    return csv_text(lines)


def rows_csv(results: Mapping[str, Any]) -> str:
    """One line per method, seed, view and pair of domains (learned last, evaluated on), of several orders each."""
    name = results["data"]["name"]
    columns = (*(["order"] if "orders" in results else []), *RAW_COLUMNS)
    return csv_text([["data", *columns], *([name, *map(row.get, columns)] for row in results["rows"])])


def to_rich(rows: Sequence[SequenceRow]) -> Table:
    """A table for the terminal, readable at 80 columns."""
    from rich.text import Text

    title = f"After the last domain: {rows[0].data}" if rows else "No runs yet"
    domains = list(rows[0].final) if rows else []
    said = note(rows) if rows else None
    if sum(max(len(domain), 6) + 1 for domain in domains) > _DOMAIN_COLUMNS:
        said = f"{said} Accuracies on each of the {len(domains)} domains are in table.md and the report."
        domains = []
    names = ["method\nview", *domains, "average", "backward\ntransfer", "forgets", "added"]
    table = terminal_table(title, said, names)

    def lines(value: Stat, signed: bool = False) -> str:
        return number(value, signed).replace(" ± ", "\n±")

    for row in rows:
        name = Text(row.method, style="bold")
        name.append(f"\n{row.view}", style="not bold dim")
        seconds = MISSING if row.seconds.mean is None else f"{row.seconds.mean:.0f} s"
        cells = [
            *(lines(row.final[domain]) for domain in domains),
            lines(row.average),
            lines(row.backward_transfer, True),
            lines(row.forgetting, True),
            f"{storage(row.bits_added)}\n{seconds}",
        ]
        table.add_row(name, *map(Text, cells))
    return table
