"""Settings chosen on a validation part of the training images: trials, their record, and the choice it implies.

Every trial is one method under one choice of settings, run on all pairs and seeds of the search. Its stages are those
of the study of pairs, kept in the search's folder under the same names and a mark of what was tried, so the random
numbers of two trials are the same and a search that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch

from dwm_fast._files import write_atomic
from dwm_fast._options import FRACTION, at_least, check_options, recorded
from dwm_fast.errors import InputError
from dwm_fast.methods import INITS
from dwm_fast.pacs.config import StudyConfig, builtin_defaults, from_dict, real_defaults
from dwm_fast.pacs.config_values import read_file
from dwm_fast.pacs.data import PacsData, canonical_domain
from dwm_fast.pacs.data.any import is_other
from dwm_fast.pacs.data.listed import domain_name
from dwm_fast.pacs.pairs.config import METHODS
from dwm_fast.pacs.pairs.lab import PairLab, Run
from dwm_fast.pacs.stages import StageFolder
from dwm_fast.pacs.study import choose_device, load_data, prepared, versions

_OWN = ("deviations", "edit_threshold", "edit_spread", "logit_init", "tau")
_NOT_CHOSEN = ("data", "splits", "weights", "validation", "methods", "sources", "targets", "inits", "seeds")
_MACHINE = ("device", "amp")
RECORD = "search.json"


@dataclass(frozen=True)
class Trial:
    """One choice to try.

    Attributes:
        method, init: of the study; `init` is "-" for `none`.
        reason: why it is tried, in words.
        settings: dotted entry -> value: ``tune.*`` of the method, ``binary.*`` or ``edit.*``, or a constant of the
            study such as ``deviations``.
    """

    method: str
    init: str
    reason: str
    settings: Mapping[str, Any]

    def entries(self) -> dict[str, Any]:
        """The settings as a file of the study has them; of the method's ways to fine-tune the first alone."""
        entries: dict[str, Any] = {"tune": {self.method: {}}}
        for name, value in self.settings.items():
            section, _, entry = name.partition(".")
            if section == "tune" and entry:
                entries["tune"][self.method][entry] = value
            elif section == self.method and section in ("binary", "edit") and entry:
                entries.setdefault(section, {})[entry] = value
            elif name in _OWN:
                entries[name] = value
            else:
                own = f"{self.method}.*, " if self.method in ("binary", "edit") else ""
                raise InputError(
                    f"search: a trial of {self.method} sets {name}; expected tune.*, {own}{', '.join(_OWN)}"
                )
        return entries


@dataclass(frozen=True)
class Grid:
    """What a search tries.

    Attributes:
        trials: in order.
        pairs: ordered pairs (source, target); all pairs of the configuration where empty.
        validation: fraction of each class of the training images that is held out to choose on.
        tolerance: how far below the best plain fine-tuning a trial's target accuracy may lie to be chosen.
    """

    trials: tuple[Trial, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    validation: Annotated[float, FRACTION] = 0.1
    tolerance: Annotated[float, at_least(0, "a difference of accuracies")] = 0.01

    def __post_init__(self) -> None:
        check_options(self)
        if all(trial.method != "none" for trial in self.trials):
            raise InputError(
                "search: no trial of none, plain fine-tuning, which the others are chosen against; add one"
            )


def read_grid(path: str | Path, flags: Mapping[str, Any] | None = None) -> tuple[StudyConfig, Grid]:
    """A file of settings with a section `search`: the study it varies, and what it tries. `flags` win over its entries.

    In a trial (``[[search.trials]]``) a list is tried value by value, several lists in every combination.
    """
    entries = {**read_file(Path(path)), **(flags or {})}
    section = entries.pop("search", None)
    if not isinstance(section, Mapping) or not isinstance(section.get("trials"), list):
        raise InputError(f"{path}: no section 'search' with a list 'trials'; see docs/study.md for one")
    given = dict(section)
    trials = tuple(itertools.chain.from_iterable(map(_expand, given.pop("trials"))))
    texts = [_pair(pair) for pair in given.pop("pairs", [])]
    if given.keys() - {"validation", "tolerance"}:
        raise InputError(f"{path}: search: unknown entry '{min(given)}'; expected trials, pairs, validation, tolerance")
    base = builtin_defaults() if entries.get("data") is None else real_defaults()
    name = domain_name if is_other(entries.get("data")) else canonical_domain
    pairs = tuple((name(source), name(target)) for source, target in texts)
    grid = Grid(trials, pairs, **given)
    domains = {"sources": [s for s, _ in pairs], "targets": [t for _, t in pairs]} if pairs else {}
    return replace(from_dict({**entries, **domains}, base), validation=grid.validation), grid


def _pair(text: Any) -> tuple[str, str]:
    source, arrow, target = str(text).partition("->")
    if not arrow:
        raise InputError(f"search: pairs: '{text}'; expected 'photo->sketch'")
    return source, target


def _expand(given: Any) -> list[Trial]:
    if not isinstance(given, Mapping) or given.get("method") not in METHODS or not given.get("reason"):
        raise InputError(f"search: a trial has no method of {', '.join(METHODS)}, or no reason; it needs both")
    settings = {name: value for name, value in given.items() if name not in ("method", "init", "reason")}
    inits = given.get("init", "S_end") if given["method"] != "none" else "-"
    settings["init"] = inits
    choices = [value if isinstance(value, list) else [value] for value in settings.values()]
    found = []
    for values in itertools.product(*choices):
        chosen = dict(zip(settings, values, strict=True))
        init = chosen.pop("init")
        if init not in ("-", *INITS):
            raise InputError(f"search: init is '{init}'; expected some of {', '.join(INITS)}")
        found.append(Trial(given["method"], init, str(given["reason"]), chosen))
    return found


class _MarkedStages(StageFolder):
    """The stages of one trial in the folder that all share: by kind of stage a mark of what was tried."""

    def __init__(self, folder: Path, device: torch.device, marks: Mapping[str, str]) -> None:
        super().__init__(folder, device)
        self._marks = marks

    def path(self, name: str) -> Path:
        mark = self._marks.get(name.partition("-")[0])
        return super().path(f"{name}-{mark}" if mark else name)


class Search:
    """Tries every choice of a grid on validation images, resuming where it was.

    Args:
        config: the study that the trials vary; its `validation` says what is held out.
        grid: what is tried.
        folder: where stages and the record, search.json, lie.
        data: the images, by default those of the configuration. Test images are not among them.
    """

    def __init__(self, config: StudyConfig, grid: Grid, folder: Path | str, data: PacsData | None = None) -> None:
        self.grid = grid
        self.folder = Path(folder)
        self.device = choose_device(config.device)
        self.data = (load_data(config) if data is None else data).to(self.device)
        self.config = config.with_domains(tuple(self.data.domains))
        self.pairs = list(grid.pairs or self.config.pairs())
        self.labs = [self._lab(trial) for trial in grid.trials]
        self.outcomes: list[dict[str, Any]] = [{"status": "pending"} for _ in grid.trials]
        for trial, lab in zip(grid.trials, self.labs, strict=True):
            for planned in itertools.chain.from_iterable(self._planned(lab, run) for run in self._runs(trial)):
                lab.stages.check(*planned)

    def _lab(self, trial: Trial) -> PairLab:
        lab = PairLab(from_dict(trial.entries(), self.config), self.data, self.folder, self.device)
        mask = recorded(lab.method(trial.method))
        marks = {"mask": _mark(mask), "tune": _mark([mask, recorded(lab.config.tune[trial.method][0])])}
        lab.stages = _MarkedStages(self.folder / "stages", self.device, marks)
        return lab

    def _runs(self, trial: Trial) -> list[Run]:
        cells = itertools.product(self.pairs, self.config.seeds)
        return [Run(s, t, trial.method, trial.init, seed) for (s, t), seed in cells]

    def _planned(self, lab: PairLab, run: Run) -> list[tuple[str, dict[str, Any]]]:
        mask = (
            []
            if run.method == "none"
            else [lab.mask_stage(run.source, run.method, run.seed, lab.seen(run.method, run.target))]
        )
        return [lab.source_stage(run.source, run.seed), *mask, *lab.tune_stages(run)]

    def run(self, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Run what is not done yet, writing the record after every trial; returns it.

        A trial that diverges is recorded as failed.
        """
        with prepared(self.device):
            for number, trial in enumerate(self.grid.trials):
                self.outcomes[number] = self._try(number, trial, progress)
                write_atomic(self.folder / RECORD, json.dumps(self.record(), indent=1, allow_nan=False))
        return self.record()

    def _try(self, number: int, trial: Trial, progress: Callable[[str], None]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        name = f"[{number + 1}/{len(self.labs)}] {trial.method} {trial.init} {dict(trial.settings)}"
        try:
            for run in self._runs(trial):
                found = self.labs[number].rows(run)
                rows += found
                source, target = found[0]["source_after"], found[0]["target_after"]  # of the view shared
                progress(f"{name}, {run.source} -> {run.target}: source {source:.3f}, target {target:.3f}")
        except InputError as error:
            progress(f"{name}: {error}")
            return {"status": "failed", "error": str(error)}
        return {"status": "done", **_means(rows), "rows": rows}

    def record(self) -> dict[str, Any]:
        """Every trial with its reason and outcome, the choice, and the settings that it gives the study."""
        trials = [
            {"method": t.method, "init": t.init, "reason": t.reason, "settings": dict(t.settings), **outcome}
            for t, outcome in zip(self.grid.trials, self.outcomes, strict=True)
        ]
        chosen = choose(trials, self.grid.tolerance)
        data = self.data
        counts = {n: {"train": len(d.train), "validation": len(d.test)} for n, d in data.domains.items()}
        return {
            "format": 1,
            "kind": "search",
            "data": {"name": data.name, "real": data.real, "fingerprint": data.fingerprint, "counts": counts},
            "pairs": [f"{s}->{t}" for s, t in self.pairs],
            "validation": self.grid.validation,
            "tolerance": self.grid.tolerance,
            "config": self.config.to_dict(),
            "versions": versions(self.device),
            "trials": trials,
            "pending": sum(trial["status"] == "pending" for trial in trials),
            "chosen": chosen,
            "settings": self._settings(chosen),
        }

    def _settings(self, chosen: Mapping[str, int]) -> dict[str, Any]:
        config = self.config
        for number in chosen.values():
            config = from_dict(self.grid.trials[number].entries(), config)
        left_out = (*_NOT_CHOSEN, *_MACHINE)
        return {name: value for name, value in config.to_dict().items() if name not in left_out}


def _mark(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


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
    for method in METHODS:
        own = [n for n in done if trials[n]["method"] == method]
        near = [n for n in own if trials[n]["target_after"] >= floor]
        if own:
            view = "source_after" if near else "target_after"
            chosen[method] = max(near or own, key=lambda n: trials[n][view])
    return chosen


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a finished search's record gives the study, for `from_dict`."""
    record = read_file(Path(path))
    if record.get("kind") != "search" or not isinstance(record.get("settings"), Mapping):
        raise InputError(f"{path} is no record of a search; expected the search.json of 'dwm-fast pacs search'")
    if record.get("pending") or not record.get("chosen"):
        raise InputError(
            f"{path}: {record.get('pending')} of {len(record['trials'])} trials are still to do; type the search again "
            "to end it, or leave them out of its grid"
        )
    return dict(record["settings"])
