"""What a search over a sequence tries, measures and chooses; what all searches do: `dwm_fast.pacs.search`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dwm_fast._options import recorded
from dwm_fast.pacs.config import from_dict
from dwm_fast.pacs.lab import Planned
from dwm_fast.pacs.search import (
    Grid,
    MarkedStages,
    Search,
    Tell,
    Trial,
    combinations,
    dotted,
    known_entries,
    mark,
    method_and_reason,
    nested,
)
from dwm_fast.pacs.sequence.config import offered
from dwm_fast.pacs.sequence.lab import SequenceLab, says
from dwm_fast.pacs.sequence.table import measures_of

_MEANS = ("average", "forgetting", "backward_transfer", "incremental_average", "bits_added", "seconds")
_ROUNDING = 1e-9
"""Averages of accuracies that differ by less are equal: one image more or less is far above it."""


@dataclass(frozen=True)
class SequenceTrial(Trial):
    """One choice to try; `settings`: dotted option of the method, such as ``options.lr``, -> value."""

    def entries(self) -> dict[str, Any]:
        return {"sequential": {self.method: nested(self.settings, self.method)}}


def _expand(given: Any) -> Iterator[SequenceTrial]:
    method, reason = method_and_reason(given, offered)
    settings = {entry: value for entry, value in given.items() if entry not in ("method", "reason")}
    for chosen in combinations(dotted(settings)):
        yield SequenceTrial(method, reason, chosen)


class SequenceSearch(Search):
    """Tries a grid on a sequence of domains; arguments and resuming as `Search`."""

    @staticmethod
    def read(section: dict[str, Any], data: str | None) -> tuple[dict[str, Any], Grid]:
        known_entries(section, "trials", "sequence", "validation", "tolerance")
        given = section.pop("trials")
        trials = tuple(itertools.chain.from_iterable(map(_expand, given)))
        methods = list(dict.fromkeys(str(trial["method"]) for trial in given))
        return {"sequence": section.pop("sequence"), "methods": methods}, Grid(trials, **section)

    def make_lab(self, trial: Trial) -> SequenceLab:
        lab = SequenceLab(from_dict(trial.entries(), self.config), self.data, self.folder, self.device)
        marks = {"sequence": mark(recorded(lab.config.sequential_method(trial.method)))}
        lab.stages = MarkedStages(self.folder / "stages", self.device, marks)
        return lab

    def _runs(self, lab: SequenceLab) -> Iterator[tuple[SequenceLab, int]]:
        """Every order, as the lab that learns in it, and seed."""
        for seed, order in itertools.product(self.config.seeds, lab.orders):
            yield lab.in_order(order), seed

    def planned(self, lab: Any, trial: Trial) -> Iterator[Planned]:
        for run, seed in self._runs(lab):
            yield run.source_stage(run.sequence[0], seed)
            for position in range(len(run.sequence)):
                yield run.task_stage(trial.method, position, seed)

    def measure(self, lab: Any, trial: Trial, tell: Tell) -> dict[str, Any]:
        for run, seed in self._runs(lab):
            for position in range(len(run.sequence)):
                start = 0 if len(lab.orders) > 1 else position
                seen = ", ".join(run.sequence[start : position + 1])
                tell(f"after {seen}: {says(run.learned(trial.method, position, seed))}")
            run.stages.thin(run.task_stage(trial.method, position, seed)[0])  # a trial is judged, not used
        rows, tasks = lab.everything([trial.method])
        sizes = {domain: len(self.data.domains[domain].test) for domain in lab.sequence}
        found = measures_of(lab.orders, rows, tasks, sizes)
        return {**_means(found), "measures": found, "rows": rows}

    def about(self) -> dict[str, Any]:
        orders = [list(order) for order in self.config.in_orders()]
        return {"sequence": orders[0], **({"orders": orders} if len(orders) > 1 else {})}

    def choose(self, trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        return choose(trials, self.grid.tolerance)

    def says(self, trial: Mapping[str, Any]) -> str:
        return f"average {trial['average']:.3f}, forgetting {trial['forgetting']:.3f}"


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over orders and seeds of a method's measures in its first view."""
    judged = [one for one in found if one["view"] == found[0]["view"]]
    final = {domain: fmean(one["final"][domain] for one in judged) for domain in judged[0]["final"]}
    return {"view": judged[0]["view"], **{name: fmean(one[name] for one in judged) for name in _MEANS}, "final": final}


def choose(trials: Sequence[Mapping[str, Any]], tolerance: float = 0.0) -> dict[str, int]:
    """Method -> number of its chosen trial, for every method with a finished one.

    Of a method's trials the one with the highest average final accuracy is chosen. Those at most `tolerance` below it
    count as equal to it: of equals the one that forgets least, and of these the first.
    """
    chosen = {}
    done = [n for n, trial in enumerate(trials) if trial["status"] == "done"]
    for method in dict.fromkeys(trials[n]["method"] for n in done):
        own = [n for n in done if trials[n]["method"] == method]
        floor = max(trials[n]["average"] for n in own) - tolerance - _ROUNDING
        near = [n for n in own if trials[n]["average"] >= floor]
        chosen[method] = min(near, key=lambda n: trials[n]["forgetting"])
    return chosen
