"""The study of sequences: every method learns the domains one after the other, and what it keeps is measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from dwm_fast._files import write_atomic
from dwm_fast.pacs import sequence_figures, sequence_report, sequence_table
from dwm_fast.pacs.lab import Lab
from dwm_fast.pacs.sequence_lab import SequenceLab
from dwm_fast.pacs.study import Stage, Study, versions


class SequenceStudy(Study):
    """Runs a configuration that has a sequence in a folder; arguments, resuming and progress as `Study`."""

    lab: SequenceLab
    lab_type: ClassVar[type[Lab]] = SequenceLab

    def _sources(self) -> list[str]:
        return [self.lab.sequence[0]]

    def _refuse_other_settings(self) -> None:
        for seed in self.config.seeds:
            self.lab.stages.check(*self.lab.source_stage(self.lab.sequence[0], seed))
        for cell in self._cells():
            self.lab.stages.check(*self.lab.task_stage(*cell))

    def _cells(self) -> Iterator[tuple[str, int, int]]:
        """(method, position, seed) of every task stage, in order."""
        for seed, method in itertools.product(self.config.seeds, self.config.methods):
            for position in range(len(self.lab.sequence)):
                yield method, position, seed

    def stages(self) -> Iterator[Stage]:
        """Every stage in order; running one reads it from the folder where it is done."""
        first = self.lab.sequence[0]
        yield from (self._source_stage(first, seed) for seed in self.config.seeds)
        for method, position, seed in self._cells():
            yield Stage(
                self.lab.task_stage(method, position, seed)[0],
                f"{position + 1}. {self.lab.sequence[position]}, {method}, seed {seed}",
                lambda m=method, p=position, s=seed: _says(self.lab.learned(m, p, s)),  # type: ignore[misc]
            )

    def _source_stage(self, first: str, seed: int) -> Stage:
        def run() -> str:
            return f"accuracy {self.lab.source(first, seed).figures['accuracy']:.3f}"

        return Stage(self.lab.source_stage(first, seed)[0], f"network of {first}, seed {seed}", run)

    def results(self) -> dict[str, Any]:
        """Everything that was measured, from the folder, as plain data."""
        config, first = self.config, self.lab.sequence[0]
        learned = [self.lab.learned(*cell) for cell in self._cells()]
        rows = [
            {"method": one["method"], "seed": one["seed"], "position": one["position"], **row}
            for one in learned
            for row in one["rows"]
        ]
        tasks = [_task(one, learned) for one in learned]
        options = {m: dataclasses.asdict(config.sequential_method(m)) for m in config.methods}  # type: ignore[call-overload]
        return {
            "format": 1,
            "kind": "sequence",
            "data": self.described(),
            "config": config.to_dict(),
            "versions": versions(self.device),
            "sequence": list(self.lab.sequence),
            "methods": json.loads(json.dumps(options)),
            "sources": [self.lab.source(first, seed).figures for seed in config.seeds],
            "tasks": tasks,
            "rows": rows,
            "measures": sequence_table.measures(list(self.lab.sequence), rows, tasks),
        }

    def write(self, results: dict[str, Any]) -> None:
        """Write results, tables, figures and report into the folder."""
        write_atomic(self.folder / "results.json", json.dumps(results, indent=1))
        sequence_table.write_rows_csv(results, self.folder / "results.csv")
        rows = sequence_table.sequence_table(results)
        sequence_table.to_csv(rows, self.folder / "table.csv")
        write_atomic(self.folder / "table.md", sequence_table.to_markdown(rows))
        drawn = sequence_figures.draw_all(results, self.folder / "figures")
        sequence_report.write_report(results, self.folder, drawn, command=self.command())


def _task(one: Mapping[str, Any], learned: list[dict[str, Any]]) -> dict[str, Any]:
    """What learning one domain took, and the bits stored for it when the sequence has ended."""
    last = [other for other in learned if (other["method"], other["seed"]) == (one["method"], one["seed"])][-1]
    return {
        **{key: one[key] for key in ("method", "seed", "position", "domain")},
        "bits": last["bits"][one["domain"]],
        "seconds": one["learning"]["seconds"],
        "figures": one["learning"]["figures"],
    }


def _says(figures: Mapping[str, Any]) -> str:
    """Accuracies in the method's first view, the domain just learned first."""
    view = figures["rows"][0]["view"]
    rows = [row for row in figures["rows"] if row["view"] == view][::-1]
    return ", ".join(f"{row['on']} {row['accuracy']:.3f}" for row in rows)
