"""The study of sequences: every method learns the domains one after the other, and what it keeps is measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dwm_fast._options import recorded
from dwm_fast.pacs.sequence import figures, report, table
from dwm_fast.pacs.sequence.finding import finding
from dwm_fast.pacs.sequence.lab import SequenceLab, says
from dwm_fast.pacs.study import Stage, Study
from dwm_fast.pacs.words import said_of

if TYPE_CHECKING:
    from rich.table import Table


class SequenceStudy(Study):
    """Runs a configuration that has a sequence in a folder; arguments, resuming and progress as `Study`."""

    lab: SequenceLab

    def make_lab(self) -> SequenceLab:
        return SequenceLab(self.config, self.data, self.folder, self.device)

    def _first(self) -> list[str]:
        """The domains that some order begins with."""
        return list(dict.fromkeys(order[0] for order in self.lab.orders))

    def _alone(self) -> list[str]:
        """The domains that some order has later, where each is trained by itself too."""
        later = (domain for domain in self.lab.sequence if any(order[0] != domain for order in self.lab.orders))
        return list(later) if self.config.alone else []

    def sources(self) -> list[str]:
        return list(dict.fromkeys([*self._first(), *self._alone()]))

    def stages(self) -> Iterator[Stage]:
        first = self._first()
        for seed, domain in itertools.product(self.config.seeds, first):
            yield self.source_stage(domain, seed, f"network of {domain}, seed {seed}")
        for seed, domain in itertools.product(self.config.seeds, self.sources()[len(first) :]):
            yield self.source_stage(domain, seed, f"network of {domain} alone, seed {seed}")
        shared: set[str] = set()
        for seed, method, order in itertools.product(self.config.seeds, self.config.methods, self.lab.orders):
            for position in range(len(order)):
                stage = self._task_stage(order, method, position, seed)
                if stage.name not in shared:  # orders that begin alike
                    yield stage
                shared.add(stage.name)

    def _task_stage(self, order: tuple[str, ...], method: str, position: int, seed: int) -> Stage:
        cell, lab = (method, position, seed), self.lab.in_order(order)
        planned = lab.task_stage(*cell)
        what = order[position] if len(self.lab.orders) == 1 else " → ".join(order[: position + 1])
        before = lab.task_stage(method, position - 1, seed) if position else lab.source_stage(order[0], seed)

        def run() -> str:
            return says(self.lab.in_order(order).learned(*cell))

        return Stage(planned[0], f"{position + 1}. {what}, {method}, seed {seed}", run, [planned], (before[0],))

    def results(self) -> dict[str, Any]:
        orders, methods, seeds = self.lab.orders, self.config.methods, self.config.seeds
        rows, tasks = self.lab.everything(methods)
        sizes = {domain: len(self.data.domains[domain].test) for domain in orders[0]}
        first, alone = (
            [self.lab.source(domain, seed).figures for seed, domain in itertools.product(seeds, domains)]
            for domains in (self._first(), self._alone())
        )
        own = {(one["source"], one["seed"]): one["accuracy"] for one in alone}
        options = {m: recorded(self.config.sequential_method(m)) for m in methods}
        return {
            "format": 1,
            "kind": "sequence",
            **self.measured(
                sequence=list(orders[0]),
                **({"orders": [list(order) for order in orders]} if len(orders) > 1 else {}),
                methods=json.loads(json.dumps(options)),
                sources=first,
                tasks=tasks,
                rows=rows,
                measures=table.measures_of(orders, rows, tasks, sizes, own or None),
                **({"alone": alone} if alone else {}),
            ),
        }

    def files(self, results: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
        rows = table.sequence_table(results)
        yield "results.csv", table.rows_csv(results)
        yield "table.csv", table.to_csv(rows)
        tables = table.to_markdown(rows) + table.orders_markdown(results)
        yield "table.md", f"{tables}\n{said_of(results['data'])}\n"
        drawn = figures.draw_all(results)
        yield from ((f"figures/{name}", content) for name, content in drawn.items())
        yield "report.html", report.page(results, drawn, self.command())

    def summary(self, results: dict[str, Any]) -> tuple[Table, list[str]]:
        return table.to_rich(table.sequence_table(results)), finding(results)
