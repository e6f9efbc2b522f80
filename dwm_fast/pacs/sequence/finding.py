"""What a sequence found, in words made from its numbers: who is best in the end, and who forgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dwm_fast.pacs.sequence.table import SequenceRow, orders_in, sequence_table, storage
from dwm_fast.pacs.tables import number
from dwm_fast.pacs.words import data_name, limits

_NOTHING = 5e-4
"""Forgetting that rounds to 0.000."""


def finding(results: Mapping[str, Any]) -> list[str]:
    """Sentences in plain text, the answer first, then what limits it."""
    rows = sequence_table(results)
    data = data_name(results)
    if not rows:
        return [f"No sequence on {data} has finished yet."]
    best = max(rows, key=lambda row: row.average.rank)
    orders = [" → ".join(order) for order in orders_in(results)]
    order = "this order" if len(orders) == 1 else f"{len(orders)} orders"
    return [
        f"On {data}, after {_listed(results['sequence'])} in {order}, {_name(best)} has the highest average "
        f"accuracy: {number(best.average)}{_against(best, rows)}.",
        _forgetting(rows),
        *_cost(best),
        *([f"The orders are {'; '.join(orders)}."] if len(orders) > 1 else []),
        *_limits(results, rows, best),
    ]


def _name(row: SequenceRow) -> str:
    return row.method if row.view == "shared" else f"{row.method} (view {row.view})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(rows: Sequence[SequenceRow]) -> SequenceRow | None:
    return next((row for row in rows if row.method == "none" and row.view == "shared"), None)


def _against(best: SequenceRow, rows: Sequence[SequenceRow]) -> str:
    plain = _plain(rows)
    if plain is None or plain is best:
        return ""
    return f", against {number(plain.average)} with plain fine-tuning (none)"


def _forgetting(rows: Sequence[SequenceRow]) -> str:
    nothing = [_name(row) for row in rows if row.forgetting.rank < _NOTHING]
    others = [f"{_name(row)} {number(row.forgetting, True)}" for row in rows if _name(row) not in nothing]
    if not nothing:
        return f"Every method forgets: {', '.join(others)}."
    said = f"Nothing is forgotten by {_listed(nothing)}"
    return f"{said}; forgetting of the others: {', '.join(others)}." if others else f"{said}."


def _cost(best: SequenceRow) -> list[str]:
    seconds = number(best.seconds, digits=1)
    return [f"For each domain added, {_name(best)} stores {storage(best.bits_added)} and learns for {seconds} s."]


def _limits(results: Mapping[str, Any], rows: Sequence[SequenceRow], best: SequenceRow) -> list[str]:
    order = "in one order of domains" if best.orders == 1 else f"in {best.orders} orders of domains"
    return [
        "Every domain has a head of its own: which domain an image is from is known when it is classified.",
        *limits(results, best.seeds * best.orders, len(rows), "best", "rows", order),
    ]
