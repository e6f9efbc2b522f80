"""What a search over pairs of domains tries, measures and chooses; what all searches do: `dwm_fast.pacs.search`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, cast

from dwm_fast._options import at_least, recorded
from dwm_fast.errors import InputError
from dwm_fast.methods import INITS
from dwm_fast.pacs.config import from_dict
from dwm_fast.pacs.data import canonical_domain
from dwm_fast.pacs.data.any import is_other
from dwm_fast.pacs.data.listed import domain_name
from dwm_fast.pacs.lab import Planned
from dwm_fast.pacs.pairs.config import METHODS, offered
from dwm_fast.pacs.pairs.lab import PairLab, Run
from dwm_fast.pacs.pairs.table import rank
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

_OWN = ("deviations", "edit_threshold", "edit_spread", "logit_init", "tau")


@dataclass(frozen=True)
class PairTrial(Trial):
    """One choice to try.

    Attributes:
        method, init: of the study; `init` is "-" for `none`.
        reason: why it is tried, in words.
        settings: dotted entry -> value: ``tune.*`` of the method, ``binary.*`` or ``edit.*`` or, of a registered
            method, its options under its name, or a constant of the study such as ``deviations``.
    """

    init: str = "-"

    def who(self) -> dict[str, str]:
        return {"method": self.method, "init": self.init}

    def entries(self) -> dict[str, Any]:
        """The settings as a file of the study has them; of the method's ways to fine-tune the first alone."""
        entries: dict[str, Any] = {"tune": {self.method: {}}}
        registered = {}
        for name, value in self.settings.items():
            section, _, entry = name.partition(".")
            if section == "tune" and entry:
                entries["tune"][self.method][entry] = value
            elif section == self.method and section in ("binary", "edit") and entry:
                entries.setdefault(section, {})[entry] = value
            elif section == self.method and section not in METHODS and entry:
                registered[entry] = value
            elif name in _OWN:
                entries[name] = value
            else:
                own = "" if self.method in ("none", "naive") else f"{self.method}.*, "
                raise InputError(
                    f"search: a trial of {self.method} sets {name}; expected tune.*, {own}{', '.join(_OWN)}"
                )
        if registered:
            entries["pairwise"] = {self.method: nested(registered, self.method)}
        return entries


@dataclass(frozen=True)
class PairGrid(Grid):
    """What a search over pairs tries.

    Attributes:
        trials, validation: as of `Grid`.
        tolerance: how far below the best plain fine-tuning a trial's target accuracy may lie to be chosen.
        pairs: ordered pairs (source, target); all pairs of the configuration where empty.
    """

    tolerance: Annotated[float, at_least(0, "a difference of accuracies")] = 0.01
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(trial.method != "none" for trial in self.trials):
            raise InputError(
                "search: no trial of none, plain fine-tuning, which the others are chosen against; add one"
            )


def _pair(text: Any) -> tuple[str, str]:
    source, arrow, target = str(text).partition("->")
    if not arrow:
        raise InputError(f"search: pairs: '{text}'; expected 'photo->sketch'")
    return source, target


def _expand(given: Any) -> Iterator[PairTrial]:
    method, reason = method_and_reason(given, offered)
    settings = {name: value for name, value in given.items() if name not in ("method", "init", "reason")}
    inits = given.get("init", "S_end") if method != "none" else "-"
    for chosen in combinations({**dotted(settings), "init": inits}):
        init = chosen.pop("init")
        if init not in ("-", *INITS):
            raise InputError(f"search: init is '{init}'; expected some of {', '.join(INITS)}")
        yield PairTrial(method, reason, chosen, init)


class PairSearch(Search):
    """Tries a grid on pairs of domains; arguments and resuming as `Search`."""

    grid: PairGrid

    @staticmethod
    def read(section: dict[str, Any], data: str | None) -> tuple[dict[str, Any], Grid]:
        known_entries(section, "trials", "pairs", "validation", "tolerance")
        given = section.pop("trials")
        trials = tuple(itertools.chain.from_iterable(map(_expand, given)))
        texts = [_pair(pair) for pair in section.pop("pairs", [])]
        name = domain_name if is_other(data) else canonical_domain
        pairs = tuple((name(source), name(target)) for source, target in texts)
        domains = {"sources": [s for s, _ in pairs], "targets": [t for _, t in pairs]} if pairs else {}
        others = dict.fromkeys(one["method"] for one in given if one["method"] not in METHODS)
        return {**domains, "methods": [*METHODS, *others]}, PairGrid(trials, **section, pairs=pairs)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs that every trial runs on."""
        return list(self.grid.pairs or self.config.pairs())

    def make_lab(self, trial: Trial) -> PairLab:
        lab = PairLab(from_dict(trial.entries(), self.config), self.data, self.folder, self.device)
        mask = recorded(lab.method(trial.method))
        marks = {"mask": mark(mask), "tune": mark([mask, recorded(lab.config.tune[trial.method][0])])}
        lab.stages = MarkedStages(self.folder / "stages", self.device, marks)
        return lab

    def _runs(self, trial: Trial) -> list[Run]:
        init = cast(PairTrial, trial).init
        cells = itertools.product(self.pairs, self.config.seeds)
        return [Run(s, t, trial.method, init, seed) for (s, t), seed in cells]

    def planned(self, lab: Any, trial: Trial) -> Iterator[Planned]:
        for run in self._runs(trial):
            yield lab.source_stage(run.source, run.seed)
            if run.method != "none":
                yield lab.mask_stage(run.source, run.method, run.seed, lab.seen(run.method, run.target))
            yield from lab.tune_stages(run)

    def measure(self, lab: Any, trial: Trial, tell: Tell) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for run in self._runs(trial):
            found = lab.rows(run)
            rows += found
            source, target = found[0]["source_after"], found[0]["target_after"]  # of the view shared
            tell(f"{run.source} -> {run.target}: source {source:.3f}, target {target:.3f}")
        return {**_means(rows), "rows": rows}

    def about(self) -> dict[str, Any]:
        return {"pairs": [f"{s}->{t}" for s, t in self.pairs]}

    def choose(self, trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        return choose(trials, self.grid.tolerance)

    def says(self, trial: Mapping[str, Any]) -> str:
        return f"source {trial['source_after']:.3f}, target {trial['target_after']:.3f}"


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over pairs and seeds: accuracies in the view shared, source accuracy in the view masked, weights kept."""
    shared, masked = ([row for row in rows if row["view"] == view] for view in ("shared", "masked"))
    return {
        "source_after": fmean(row["source_after"] for row in shared),
        "target_after": fmean(row["target_after"] for row in shared),
        "masked_source": fmean(row["source_after"] for row in masked) if masked else None,
        "fraction_kept": fmean(row["fraction_kept"] for row in shared),
    }


def choose(trials: Sequence[Mapping[str, Any]], tolerance: float) -> dict[str, int]:
    """Method -> number of its chosen trial, for every method with a finished one.

    The floor is the best target accuracy of plain fine-tuning, less `tolerance`. Of a method's trials at or above the
    floor the one with the highest source accuracy is chosen; where all lie below, the one with the highest target
    accuracy. The same rule holds for plain fine-tuning. Of equals the first counts. {} without a finished `none`.
    """
    done = [n for n, trial in enumerate(trials) if trial["status"] == "done"]
    plain = [trials[n]["target_after"] for n in done if trials[n]["method"] == "none"]
    if not plain:
        return {}
    floor = max(plain) - tolerance
    chosen = {}
    for method in sorted({trials[n]["method"] for n in done}, key=lambda one: rank(METHODS, one)):
        own = [n for n in done if trials[n]["method"] == method]
        near = [n for n in own if trials[n]["target_after"] >= floor]
        if own:
            view = "source_after" if near else "target_after"
            chosen[method] = max(near or own, key=lambda n: trials[n][view])
    return chosen
