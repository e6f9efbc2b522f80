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

    def sources(self) -> list[str]:
        return list(self.lab.sequence if self.config.alone else self.lab.sequence[:1])

    def _cells(self) -> Iterator[tuple[str, int, int]]:
        """(method, position, seed) of every task stage, in order."""
        for seed, method in itertools.product(self.config.seeds, self.config.methods):
            for position in range(len(self.lab.sequence)):
                yield method, position, seed

    def stages(self) -> Iterator[Stage]:
        first = self.lab.sequence[0]
        for seed in self.config.seeds:
            yield self.source_stage(first, seed, f"network of {first}, seed {seed}")
        for seed, domain in itertools.product(self.config.seeds, self.sources()[1:]):
            yield self.source_stage(domain, seed, f"network of {domain} alone, seed {seed}")
        yield from itertools.starmap(self._task_stage, self._cells())

    def _task_stage(self, method: str, position: int, seed: int) -> Stage:
        cell, first = (method, position, seed), self.lab.sequence[0]
        planned = self.lab.task_stage(*cell)
        label = f"{position + 1}. {self.lab.sequence[position]}, {method}, seed {seed}"
        before = self.lab.task_stage(method, position - 1, seed) if position else self.lab.source_stage(first, seed)
        return Stage(planned[0], label, lambda: says(self.lab.learned(*cell)), [planned], (before[0],))

    def results(self) -> dict[str, Any]:
        sequence, methods = list(self.lab.sequence), self.config.methods
        found = [self.lab.whole(method, seed) for seed, method in itertools.product(self.config.seeds, methods)]
        rows, tasks = ([one for part in parts for one in part] for parts in zip(*found, strict=True))
        sizes = {domain: len(self.data.domains[domain].test) for domain in sequence}
        alone = [self.lab.source(d, seed).figures for seed in self.config.seeds for d in self.sources()[1:]]
        own = {(one["source"], one["seed"]): one["accuracy"] for one in alone}
        options = {m: recorded(self.config.sequential_method(m)) for m in methods}
        return {
            "format": 1,
            "kind": "sequence",
            **self.measured(
                sequence=sequence,
                methods=json.loads(json.dumps(options)),
                sources=[self.lab.source(sequence[0], seed).figures for seed in self.config.seeds],
                tasks=tasks,
                rows=rows,
                measures=table.measures(sequence, rows, tasks, sizes, own or None),
                **({"alone": alone} if alone else {}),
            ),
        }

    def files(self, results: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
        rows = table.sequence_table(results)
        yield "results.csv", table.rows_csv(results)
        yield "table.csv", table.to_csv(rows)
        yield "table.md", f"{table.to_markdown(rows)}\n{said_of(results['data'])}\n"
        drawn = figures.draw_all(results)
        yield from ((f"figures/{name}", content) for name, content in drawn.items())
        yield "report.html", report.page(results, drawn, self.command())

    def summary(self, results: dict[str, Any]) -> tuple[Table, list[str]]:
        return table.to_rich(table.sequence_table(results)), finding(results)
