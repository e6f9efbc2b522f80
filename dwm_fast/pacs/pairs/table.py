"""The paper's table from a study's results: S gain and T drop per source domain, with spread and coverage.

S gain is the accuracy on the source domain after fine-tuning on the target, minus what plain fine-tuning
(`none`) leaves there; T drop is the same difference on the target (negative: below plain fine-tuning). Both
are differences of accuracies in [0, 1], as published in arXiv 2308.13957.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from dwm_fast.methods import BATCH_NORM_POLICIES
from dwm_fast.pacs.pairs.config import METHODS
from dwm_fast.pacs.tables import MISSING, Stat, csv_text, markdown, number, terminal_table

if TYPE_CHECKING:
    from rich.table import Table

INITS = ("-", "S_start", "S_end", "random")
VIEWS = ("shared", "masked")
METRICS = ("s_gain", "t_drop", "source_before", "source_after", "target_after", "fraction_kept")
RAW_COLUMNS = (
    "source",
    "target",
    "method",
    "init",
    "seed",
    "bn_policy",
    "lr",
    "kept_decay",
    "view",
    "source_before",
    "source_after",
    "target_after",
    "fraction_kept",
    "s_gain",
    "t_drop",
    "seconds",
)


class Rate(NamedTuple):
    """The learning rate, and by what kept weights were pulled to their start where they were not frozen."""

    lr: float | None
    kept_decay: float | None = None

    def __str__(self) -> str:
        """'0.0005', '0.0005, pull 100', or a dash."""
        rate = MISSING if self.lr is None else f"{self.lr:g}"
        return rate if self.kept_decay is None else f"{rate}, pull {self.kept_decay:g}"


Key = tuple[str, str, str, str, Rate]
"""A configuration: method, init, bn_policy, view, rate."""
ALL = "all pairs"


@dataclass(frozen=True)
class Cell:
    """What one configuration reaches from one source, or from all, and how many runs that averages."""

    s_gain: Stat
    t_drop: Stat
    source_before: Stat
    source_after: Stat
    target_after: Stat
    fraction_kept: Stat
    pairs: int
    seeds: int
    runs: int

    @property
    def coverage(self) -> str:
        """What the cell averages, in words: '3 pairs × 2 seeds', or '5 runs of 3 pairs × 2 seeds'."""
        grid = f"{self.pairs} pair{'s' * (self.pairs != 1)} × {self.seeds} seed{'s' * (self.seeds != 1)}"
        return grid if self.runs == self.pairs * self.seeds else f"{self.runs} runs of {grid}"


@dataclass(frozen=True)
class TableRow:
    """One configuration of method, re-initialisation, batch-norm policy, view and rate: a cell per source.

    `data` names the data set, `sources` every column of the table in the data set's order (a source without runs of
    this row has no cell), `targets` what each was fine-tuned on; `overall` is over all pairs. `baseline` is what S gain
    and T drop compare with, `ambiguous` says that another row differs in the rate alone.
    """

    data: str
    method: str
    init: str
    bn_policy: str
    view: str
    lr: float | None
    kept_decay: float | None
    baseline: bool
    ambiguous: bool
    sources: tuple[str, ...]
    targets: dict[str, tuple[str, ...]]
    cells: dict[str, Cell]
    overall: Cell

    @property
    def label(self) -> str:
        """'binary S_start', or 'none' for plain fine-tuning."""
        return self.method if self.init == "-" else f"{self.method} {self.init}"

    @property
    def rate(self) -> str:
        """As `Rate` writes it."""
        return str(Rate(self.lr, self.kept_decay))


def rank(order: Sequence[str], value: str) -> tuple[int, str]:
    """Sort key: the known names in their order, then the others by name."""
    return (order.index(value) if value in order else len(order), value)


def in_order(results: Mapping[str, Any], domains: Iterable[str]) -> list[str]:
    """The distinct `domains` in the data set's order."""
    return sorted(set(domains), key=lambda name: rank(results["data"]["domains"], name))


def row_key(row: Mapping[str, Any]) -> Key:
    """The configuration of a run."""
    return row["method"], row["init"], row["bn_policy"], row["view"], Rate(row.get("lr"), row.get("kept_decay"))


def baseline_key(results: Mapping[str, Any]) -> Key | None:
    """The configuration that S gain and T drop compare with: the first way of `none`."""
    return next((row_key(run) for run in results["rows"] if run["method"] == "none"), None)


def ambiguous(key: Key, keys: Iterable[Key]) -> bool:
    """Whether another of the `keys` differs from this one in the rate alone."""
    return any(other[:4] == key[:4] and other != key for other in keys)


def key_order(key: Key) -> tuple[Any, ...]:
    """Sort key of configurations: the paper's view first, then method, re-initialisation, policy, rate (falling)."""
    method, init, policy, view, (lr, pull) = key
    names = rank(VIEWS, view), rank(METHODS, method), rank(INITS, init), rank(BATCH_NORM_POLICIES, policy)
    return *names, -(lr or 0.0), -1.0 if pull is None else pull


def stat(runs: Sequence[Mapping[str, Any]], metric: str) -> Stat:
    """Mean of `metric` over the runs, and its spread over seeds of the per-seed mean.

    The spread is None unless at least two seeds cover every pair averaged here: a seed that lacks a pair would mix the
    difference between pairs into it.
    """
    if not runs or any(run.get(metric) is None or not math.isfinite(run[metric]) for run in runs):
        return Stat(None, None)
    by_seed: dict[int, list[float]] = defaultdict(list)
    covered: dict[int, set[tuple[str, str | None]]] = defaultdict(set)
    for run in runs:
        by_seed[run["seed"]].append(float(run[metric]))
        covered[run["seed"]].add((run["source"], run.get("target")))
    everything = set().union(*covered.values())
    means = [fmean(values) for seed, values in by_seed.items() if covered[seed] == everything]
    return Stat(fmean(float(run[metric]) for run in runs), stdev(means) if len(means) > 1 else None)


def cell(runs: Sequence[Mapping[str, Any]]) -> Cell:
    """Aggregate runs of one configuration."""
    return Cell(
        **{metric: stat(runs, metric) for metric in METRICS},
        pairs=len({(run["source"], run["target"]) for run in runs}),
        seeds=len({run["seed"] for run in runs}),
        runs=len(runs),
    )


def paper_table(results: Mapping[str, Any]) -> list[TableRow]:
    """Aggregate a study in the paper's shape.

    Args:
        results: a study's results; "data" and "rows" are read. Any part of the grid may be missing.

    Returns:
        One row per (method, init, bn_policy, view, rate) that has runs: the view `shared` first, then `masked`.
        Cells average the targets and seeds that exist and say how many.
    """
    groups: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for run in results["rows"]:
        groups[row_key(run)].append(run)
    sources = tuple(in_order(results, (run["source"] for run in results["rows"])))
    targets = {
        source: tuple(in_order(results, (run["target"] for run in results["rows"] if run["source"] == source)))
        for source in sources
    }
    baseline = baseline_key(results)
    table = []
    for key in sorted(groups, key=key_order):
        runs = groups[key]
        per_source = {source: [run for run in runs if run["source"] == source] for source in sources}
        table.append(
            TableRow(
                str(results["data"]["name"]),
                *key[:4],
                *key[4],
                baseline=key == baseline,
                ambiguous=ambiguous(key, groups),
                sources=sources,
                targets=targets,
                cells={source: cell(part) for source, part in per_source.items() if part},
                overall=cell(runs),
            )
        )
    return table


def uniform_coverage(cells: Iterable[Cell | None]) -> str | None:
    """The coverage that all cells share, or None where they differ or a cell is missing."""
    coverages = {None if one is None else one.coverage for one in cells}
    return coverages.pop() if len(coverages) == 1 else None


def coverage_note(rows: Sequence[TableRow]) -> str:
    """One sentence on what the table's cells average and what `±` means."""
    shared = uniform_coverage(row.cells.get(source) for row in rows for source in row.sources)
    note = f"Each cell averages {shared}" if shared else "The grid is uneven: each cell says what it averages"
    if any(one.s_gain.spread is not None for row in rows for one in row.cells.values()):
        return f"{note}; ± is the standard deviation over seeds of the per-seed mean."
    return f"{note}; no spread, for want of two seeds that cover the same pairs."


def columns(rows: Sequence[TableRow]) -> list[str]:
    """The table's column names: every source and, where there are several, `ALL`."""
    sources = list(rows[0].sources) if rows else []
    return [*sources, ALL] if len(sources) > 1 else sources


def headings(rows: Sequence[TableRow]) -> list[str]:
    """The columns as people read them: 'photo → art, sketch'."""
    return [column if column == ALL else f"{column} → {', '.join(rows[0].targets[column])}" for column in columns(rows)]


def at(row: TableRow, column: str) -> Cell | None:
    """The row's cell in a column of `columns`; None where it has no runs."""
    return row.overall if column == ALL else row.cells.get(column)


def _gains(one: Cell | None, baseline: bool, cover: bool) -> str:
    if one is None:
        return MISSING
    text = "baseline" if baseline else f"{number(one.s_gain, True)} / {number(one.t_drop, True)}"
    return f"{text} ({one.coverage})" if cover else text


def _accuracies(one: Cell | None) -> str:
    if one is None:
        return MISSING
    return f"{number(one.source_before)} → {number(one.source_after)} / {number(one.target_after)}"


def to_markdown(rows: Sequence[TableRow]) -> str:
    """Two markdown tables (S gain / T drop; accuracies) titled with the data set's name, and the coverage."""
    if not rows:
        return "No runs yet.\n"
    header = columns(rows)
    cover = uniform_coverage(row.cells.get(source) for row in rows for source in rows[0].sources) is None
    gains, absolute = [], []
    for row in rows:
        name = [row.method, row.init, row.bn_policy, row.view, row.rate]
        kept = number(Stat(row.overall.fraction_kept.mean))
        gains.append([*name, kept, *(_gains(at(row, column), row.baseline, cover) for column in header)])
        absolute.append([*name, *(_accuracies(at(row, column)) for column in header)])
    names, data = ["method", "init", "batch norm", "view", "rate"], rows[0].data
    return "\n".join(
        [
            f"**S gain / T drop by source domain, on {data}** (differences of accuracy to plain fine-tuning)",
            "",
            markdown([*names, "kept", *header], gains),
            "",
            f"**Source accuracy before → after / target accuracy after, by source domain, on {data}**",
            "",
            markdown([*names, *header], absolute),
            "",
            coverage_note(rows),
            "",
        ]
    )


def to_csv(rows: Sequence[TableRow]) -> str:
    """The table in long form, a line per (row, source) and one with source `all`; what is not there is empty."""
    lines: list[Sequence[object]] = [
        ["data", "method", "init", "bn_policy", "view", "lr", "kept_decay", "source"]
        + [name for metric in METRICS for name in (metric, f"{metric}_spread")]
        + ["pairs", "seeds", "runs"]
    ]
    for row in rows:
        for source, one in [*row.cells.items(), ("all", row.overall)]:
            stats: list[Stat] = [getattr(one, metric) for metric in METRICS]
            values = [value for each in stats for value in (each.mean, each.spread)]
            rate = [f"{value:g}" if value is not None else "" for value in (row.lr, row.kept_decay)]
            name = [row.data, row.method, row.init, row.bn_policy, row.view, *rate, source]
            lines.append([*name, *values, one.pairs, one.seeds, one.runs])
    return csv_text(lines)


def rows_csv(results: Mapping[str, Any]) -> str:
    """Every run as one line, the data set's name first."""
    name = results["data"]["name"]
    return csv_text([["data", *RAW_COLUMNS], *([name, *map(run.get, RAW_COLUMNS)] for run in results["rows"])])


def masked_once(rows: Iterable[TableRow]) -> list[TableRow]:
    """The rows of the masked view, those that repeat one left out: the view does not depend on fine-tuning."""
    found: dict[Any, TableRow] = {}
    for row in rows:
        if row.view == "masked":
            found.setdefault((row.method, *((s, one.s_gain, one.source_after) for s, one in row.cells.items())), row)
    return list(found.values())


def to_rich(rows: Sequence[TableRow]) -> Table:
    """A table for the terminal, readable at 80 columns: S gain and T drop side by side, a block for each source."""
    from rich.text import Text

    title = f"S gain and T drop: {rows[0].data}" if rows else "No runs yet"
    uneven = uniform_coverage(row.cells.get(source) for row in rows for source in row.sources) is None
    caption = coverage_note(rows) + (" (2p×3s: 2 pairs, 3 seeds.)" if uneven else "") if rows else None
    policies, rates = len({row.bn_policy for row in rows}) > 1, any(row.ambiguous for row in rows)
    ways = [*(["batch norm"] if policies else []), *(["rate"] if rates else [])]
    names = ["method", *ways, "kept", "S gain", "T drop", *(["runs"] if uneven else [])]
    table = terminal_table(title, caption, names)
    shown = [*(row for row in rows if row.view == "shared"), *masked_once(rows)]
    for column, heading in zip(columns(rows), headings(rows), strict=True):
        table.add_row(Text(heading, style="bold"))
        for row in shown:
            one = at(row, column)
            if one is None:
                continue
            own = row.view == "masked"
            way = [*([row.bn_policy] if policies else []), *([row.rate] if rates else [])]
            gains = ["baseline", ""] if row.baseline else [number(one.s_gain, True), number(one.t_drop, True)]
            covered = f"{'' if one.runs == one.pairs * one.seeds else f'{one.runs} of '}{one.pairs}p×{one.seeds}s"
            cells = [
                f"  {row.method}, masked" if own else f"  {row.label}",
                *([""] * len(way) if own and row.kept_decay is None else way),
                number(Stat(one.fraction_kept.mean), digits=2),
                gains[0].replace(" ", ""),
                MISSING if own else gains[1].replace(" ", ""),
                *([covered] if uneven else []),
            ]
            table.add_row(*map(Text, cells), style="dim" if row.baseline else "")
        table.add_section()
    return table
