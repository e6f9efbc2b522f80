"""What the page of a study of pairs shows: S gain and T drop, accuracies, and what is known of every mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dwm_fast.pacs.page.html import Cell, Table, counted, facts, render
from dwm_fast.pacs.pairs.config import METHODS
from dwm_fast.pacs.pairs.finding import finding
from dwm_fast.pacs.pairs.published import PUBLISHED
from dwm_fast.pacs.pairs.table import (
    INITS,
    TableRow,
    at,
    columns,
    coverage_note,
    headings,
    in_order,
    masked_once,
    paper_table,
    rank,
    stat,
    uniform_coverage,
)
from dwm_fast.pacs.pairs.table import Cell as Measured
from dwm_fast.pacs.tables import MISSING, Stat
from dwm_fast.pacs.words import classes_of, of_pacs

NEAR_CHANCE = 1.25
"""Accuracies up to so many times that of guessing are called chance."""


def page(results: Mapping[str, Any], drawn: Mapping[str, bytes], command: str) -> str:
    """The HTML page of a study's results; arguments as `dwm_fast.pacs.page.html.render`."""
    rows = paper_table(results)
    uneven = uniform_coverage(row.cells.get(source) for row in rows for source in row.sources) is None
    pairs = len({(run["source"], run["target"]) for run in results["rows"]})
    seeds = len({run["seed"] for run in results["rows"]})
    return render(
        "pairs.html",
        results,
        drawn,
        command,
        facts=facts(results, counted(pairs, "pair"), counted(seeds, "seed")),
        finding=finding(results),
        nothing="Plain fine-tuning alone has run." if rows else "No run has finished yet.",
        bold="" if uneven else "; bold is the highest S gain of its column",
        shared=_gains([row for row in rows if row.view == "shared" and not row.baseline], uneven),
        masked=_gains(masked_once(rows), uneven),
        coverage=coverage_note(rows),
        published=_published() if of_pacs(results) else None,
        accuracies=_accuracies(rows),
        masks=_masks(results),
    )


def _label(row: TableRow) -> Cell:
    pull = "" if row.kept_decay is None else f", pull {row.kept_decay:g}"
    return Cell(f"{row.method}{pull}" if row.view == "masked" else row.label, method=row.method)


CAPTIONS = {
    "shared": "View “shared” (the paper's): one network, fine-tuned on the target, serves both domains",
    "masked": "View “masked”: the source under its own bits, with its own batch norm and head; S gain",
}


def _gains(rows: Sequence[TableRow], uneven: bool) -> Table:
    """A table of one view, the highest S gain of each column in bold where the columns can be compared."""
    if not rows:
        return Table([], [])
    masked = rows[0].view == "masked"
    best = {
        column: max((one.s_gain.rank for one in (at(row, column) for row in rows) if one is not None), default=math.inf)
        for column in columns(rows)
    }

    def gain(one: Measured | None, column: str) -> Any:
        if one is None:
            return MISSING
        small = (*(() if masked else (one.t_drop,)), *((one.coverage,) if uneven else ()))
        return Cell(one.s_gain, small, strong=not uneven and one.s_gain.rank == best[column], signed=True)

    body = []
    for row in rows:
        ways = [] if masked else [row.bn_policy, row.rate]
        kept = Cell(Stat(row.overall.fraction_kept.mean))
        body.append([_label(row), *ways, kept, *(gain(at(row, column), column) for column in columns(rows))])
    names = ["method", *([] if masked else ["batch norm", "learning rate"]), "kept", *headings(rows)]
    return Table(names, body, CAPTIONS[rows[0].view]).lean()


def _published() -> Table:
    domains = list(PUBLISHED["S_start"])
    body = []
    for init in sorted(PUBLISHED, key=lambda one: rank(INITS, one)):
        pairs = (PUBLISHED[init][domain] for domain in domains)
        body.append([init, *(Cell(Stat(gain), (Stat(drop),), signed=True) for gain, drop in pairs)])
    return Table(["init", *domains], body, "Published table, S gain above T drop (arXiv 2308.13957)")


def _accuracies(rows: Sequence[TableRow]) -> Table:
    """Source and target accuracy of every way in the shared view, and the masked view's source accuracy once."""
    shared = [row for row in rows if row.view == "shared"]
    once = masked_once(rows)

    def both(one: Measured | None) -> Any:
        return MISSING if one is None else Cell(one.source_after, (one.target_after,))

    def source(one: Measured | None) -> Any:
        return MISSING if one is None else Cell(one.source_after)

    def before(column: str) -> Any:
        one = at(rows[0], column)
        return MISSING if one is None else Cell(Stat(one.source_before.mean))

    if not rows:
        return Table([], [])

    def lines(chosen: Sequence[TableRow], view: str, show: Callable[[Measured | None], Any]) -> list[list[Any]]:
        return [
            [_label(row), view, row.bn_policy, row.rate, *(show(at(row, column)) for column in columns(rows))]
            for row in chosen
        ]

    masked = [[*line[:2], "", "", *line[4:]] for line in lines(once, "masked", source)]
    first = ["before fine-tuning", "", "", "", *map(before, columns(rows))]
    body = [first, *lines(shared, "shared", both), *masked]
    names = ["method", "view", "batch norm", "learning rate", *headings(rows)]
    return Table(names, body, "Source accuracy above target accuracy, after fine-tuning")


def _masks(results: Mapping[str, Any]) -> Table:
    """One line per source and method: how the source does, what the mask keeps, if it met its budget."""
    body: list[list[Any]] = []
    for source in in_order(results, (entry["source"] for entry in results["sources"])):
        chance = NEAR_CHANCE / len(classes_of(results, source))
        alone = [entry for entry in results["sources"] if entry["source"] == source]
        masks = [mask for mask in results["masks"] if mask["source"] == source]
        whole = stat(alone, "accuracy")
        at_chance = "the network itself is at chance" if whole.rank <= chance else MISSING
        body.append([source, "no mask", MISSING, whole, at_chance, MISSING, str(len(alone))])
        for method in sorted({mask["method"] for mask in masks}, key=lambda one: rank(METHODS, one)):
            chosen = [mask for mask in masks if mask["method"] == method]
            body.append([source, *_mask_line(chosen, whole, chance)])
    names = ["source", "mask", "kept", "source accuracy", "source budget", "coefficient", "seeds"]
    return Table(names, body, "Accuracy on the source's own test images, whole and under the mask").lean()


def _mask_line(masks: Sequence[Mapping[str, Any]], whole: Stat, chance: float) -> list[Any]:
    coefficients = [f"{mask['coefficient']:.3g}" for mask in masks if mask["coefficient"] is not None]
    accuracy = stat(masks, "masked_accuracy")
    return [
        Cell(masks[0]["method"], method=masks[0]["method"]),
        stat(masks, "fraction_kept"),
        accuracy,
        _budget(masks, accuracy, whole, chance),
        ", ".join(coefficients) or MISSING,
        str(len({mask["seed"] for mask in masks})),
    ]


def _budget(masks: Sequence[Mapping[str, Any]], accuracy: Stat, whole: Stat, chance: float) -> str:
    """Whether the masks met their budget; beside an accuracy no better than chance, why that may be so."""
    judged = [mask["within_budget"] for mask in masks if mask["within_budget"] is not None]
    met = f"met by {sum(judged)} of {len(judged)}" if len(judged) > 1 else "met" if any(judged) else "not met"
    if accuracy.rank > chance:
        return met if judged else MISSING
    if whole.rank <= chance:
        why = "at chance, as the network without a mask is"
    elif any(judged):
        why = "at chance all the same: the budget is on the loss over training images, not on test accuracy"
    else:
        why = "at chance: the mask keeps too little"
    return f"{met}; {why}" if judged else why
