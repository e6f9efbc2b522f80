"""Settings chosen on a validation part of the training images: trials, their record, and the choice it implies.

Every trial is one method under one choice of settings, run on all that the search is about: pairs of domains, or a
sequence of them. Its stages are those of the study, kept in the search's folder under the same names and a mark of what
was tried, so the random numbers of two trials are the same and a search that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from dwm_fast._files import write_atomic
from dwm_fast._options import FRACTION, at_least, check_options
from dwm_fast.errors import InputError
from dwm_fast.methods import load_method
from dwm_fast.pacs.config import StudyConfig, builtin_defaults, from_dict, real_defaults
from dwm_fast.pacs.config_values import read_file, sequence
from dwm_fast.pacs.data import PacsData
from dwm_fast.pacs.lab import Lab, Planned
from dwm_fast.pacs.stages import StageFolder
from dwm_fast.pacs.study import choose_device, load_data, on_threads, prepared, versions

_PLACES = ("data", "data_root", "splits", "weights", "validation")
_GRID = ("methods", "sources", "targets", "inits", "sequence", "orders", "alone", "seeds")
_MACHINE = ("device", "amp")
RECORD = "search.json"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One choice to try. Abstract: a wing says in `entries` which settings there are.

    Attributes:
        method: of the study.
        reason: why it is tried, in words.
        settings: dotted entry -> value.
    """

    method: str
    reason: str
    settings: Mapping[str, Any]

    def who(self) -> dict[str, str]:
        """What the record calls it."""
        return {"method": self.method}

    def entries(self) -> dict[str, Any]:
        """The settings as a file of the study has them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Grid:
    """What a search tries.

    Attributes:
        trials: in order.
        validation: fraction of each class of the training images that is held out to choose on.
        tolerance: a difference of accuracies that the choice does not mind; what of, the wing says.
    """

    trials: tuple[Trial, ...]
    validation: Annotated[float, FRACTION] = 0.1
    tolerance: Annotated[float, at_least(0, "a difference of accuracies")] = 0.0

    def __post_init__(self) -> None:
        check_options(self)


def read_grid(path: str | Path, flags: Mapping[str, Any] | None = None) -> tuple[StudyConfig, Grid]:
    """A file of settings with a section `search`: the study it varies, and what it tries. `flags` win over its entries.

    In a trial (``[[search.trials]]``) a list is tried value by value, several lists in every combination.
    """
    entries = {**read_file(Path(path)), **(flags or {})}
    section = entries.pop("search", None)
    if not isinstance(section, Mapping) or not isinstance(section.get("trials"), list):
        raise InputError(f"{path}: no section 'search' with a list 'trials'; see docs/study.md for one")
    base = builtin_defaults() if entries.get("data") is None else real_defaults()
    for place in sequence(entries.get("own_methods", ())):
        load_method(str(place))  # a trial may name what the file loads
    changes, grid = _wing("sequence" in section).read(dict(section), entries.get("data"))
    return replace(from_dict({**entries, **changes}, base), validation=grid.validation), grid


def known_entries(section: Mapping[str, Any], *known: str) -> None:
    """Raise InputError for an entry of the section `search` that is not known."""
    unknown = [name for name in section if name not in known]
    if unknown:
        raise InputError(f"search: unknown entry '{min(unknown)}'; expected {', '.join(known)}")


def dotted(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries by dotted names, as a trial may have them in either way.

    >>> dotted({"options": {"lr": 0.1}, "kind.threshold": 0.01})
    {'options.lr': 0.1, 'kind.threshold': 0.01}
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def nested(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """`dotted` undone: a method's options by section; InputError for an option beside its whole section.

    >>> nested({"options.lr": 0.1, "kind.threshold": 0.01}, "piggyback")
    {'options': {'lr': 0.1}, 'kind': {'threshold': 0.01}}
    """
    own: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, entry = name.split(".")
        place: Any = own
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"search: a trial of {method} sets {name} and {section} too; give one")
        place[entry] = value
    return own


def combinations(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a trial's entries: a list is tried value by value.

    >>> [choice["lr"] for choice in combinations({"lr": [0.1, 0.01], "epochs": 3})]
    [0.1, 0.01]
    """
    choices = [value if isinstance(value, list) else [value] for value in given.values()]
    for values in itertools.product(*choices):
        yield dict(zip(given, values, strict=True))


def mark(settings: Any) -> str:
    """A short name of settings, plain data: equal ones have the same, on every machine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def method_and_reason(given: Any, offered: Callable[[], Iterable[str]]) -> tuple[str, str]:
    """A trial's method by name, loaded where it is "file.py:Class", and its reason.

    Raises InputError where one of them is missing, and for a method that is not offered.
    """
    if not isinstance(given, Mapping) or not given.get("method") or not given.get("reason"):
        raise InputError(f"search: a trial has no method of {', '.join(offered())}, or no reason; it needs both")
    method = str(given["method"])
    name = load_method(method) if ":" in method else method
    if name not in offered():
        raise InputError(f"search: unknown method '{name}'; expected some of {', '.join(offered())}")
    return name, str(given["reason"])


class MarkedStages(StageFolder):
    """The stages of one trial in the folder that all share: by kind of stage a mark of what was tried."""

    def __init__(self, folder: Path, device: torch.device, marks: Mapping[str, str]) -> None:
        super().__init__(folder, device)
        self._marks = marks

    def path(self, name: str) -> Path:
        marked = self._marks.get(name.partition("-")[0])
        return super().path(f"{name}-{marked}" if marked else name)


class Search:
    """Tries every choice of a grid on validation images, resuming where it was.

    Abstract: ``Search(config, grid, folder)`` makes one over pairs, or over a sequence where the configuration has one.
    A wing says how a grid is read, what a trial needs, measures and is told with, and which is chosen.

    Args:
        config: the study that the trials vary; its `validation` says what is held out.
        grid: what is tried.
        folder: where stages and the record, search.json, lie.
        data: the images, by default those of the configuration. Test images are not among them.
    """

    def __new__(cls, config: StudyConfig, *_: Any, **__: Any) -> Search:
        return super().__new__(_wing(config.sequence is not None) if cls is Search else cls)

    def __init__(self, config: StudyConfig, grid: Grid, folder: Path | str, data: PacsData | None = None) -> None:
        self.grid = grid
        self.folder = Path(folder)
        self.device = choose_device(config.device)
        self.data = (load_data(config) if data is None else data).to(self.device)
        self.config = config.with_domains(tuple(self.data.domains))
        self.outcomes: list[dict[str, Any]] = [{"status": "pending"} for _ in grid.trials]
        self.labs: list[Any] = [self.make_lab(trial) for trial in grid.trials]
        for lab, trial in zip(self.labs, grid.trials, strict=True):
            for planned in self.planned(lab, trial):
                lab.stages.check(*planned)

    @staticmethod
    def read(section: dict[str, Any], data: str | None) -> tuple[dict[str, Any], Grid]:
        """Entries that the section `search` adds to the study's, and the grid; `data` as the configuration has it."""
        raise NotImplementedError

    def make_lab(self, trial: Trial) -> Lab:
        """What does the stages of a trial."""
        raise NotImplementedError

    def planned(self, lab: Any, trial: Trial) -> Iterator[Planned]:
        """The stages that a trial needs, which its `lab` does."""
        raise NotImplementedError

    def measure(self, lab: Any, trial: Trial, tell: Tell) -> dict[str, Any]:
        """The figures of a trial, done or read, its means first; `tell` is told of every step."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What the trials ran on, as the record has it."""
        raise NotImplementedError

    def choose(self, trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Method -> number of its chosen trial."""
        raise NotImplementedError

    def says(self, trial: Mapping[str, Any]) -> str:
        """A finished trial's figures in words."""
        raise NotImplementedError

    def run(self, progress: Tell = lambda _: None) -> dict[str, Any]:
        """Run what is not done yet, writing the record after every trial; returns it.

        A trial that diverges is recorded as failed.
        """
        with prepared(self.device), on_threads(self.config.threads):
            for number, trial in enumerate(self.grid.trials):
                self.outcomes[number] = self._try(number, trial, progress)
                write_atomic(self.folder / RECORD, json.dumps(self.record(), indent=1, allow_nan=False))
        return self.record()

    def _try(self, number: int, trial: Trial, progress: Tell) -> dict[str, Any]:
        name = f"[{number + 1}/{len(self.grid.trials)}] {' '.join(trial.who().values())} {dict(trial.settings)}"
        try:
            found = self.measure(self.labs[number], trial, lambda text: progress(f"{name}, {text}"))
        except InputError as error:
            progress(f"{name}: {error}")
            return {"status": "failed", "error": str(error)}
        return {"status": "done", **found}

    def record(self) -> dict[str, Any]:
        """Every trial with its reason and outcome, the choice, and the settings that it gives the study."""
        trials = [
            {**trial.who(), "reason": trial.reason, "settings": dict(trial.settings), **outcome}
            for trial, outcome in zip(self.grid.trials, self.outcomes, strict=True)
        ]
        chosen = self.choose(trials)
        data = self.data
        counts = {n: {"train": len(d.train), "validation": len(d.test)} for n, d in data.domains.items()}
        return {
            "format": 1,
            "kind": "search",
            "data": {"name": data.name, "real": data.real, "fingerprint": data.fingerprint, "counts": counts},
            **self.about(),
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
        left_out = (*_PLACES, *_GRID, *_MACHINE)
        return {name: value for name, value in config.to_dict().items() if name not in left_out}


def _wing(of_sequence: bool) -> type[Search]:
    from dwm_fast.pacs.pairs.search import PairSearch
    from dwm_fast.pacs.sequence.search import SequenceSearch

    return SequenceSearch if of_sequence else PairSearch


def read_settings(path: str | Path, of_sequence: bool = False) -> dict[str, Any]:
    """The settings that a finished search's record gives the study, for `from_dict`.

    Raises InputError for another file, a search that is not at its end, and one for the other kind of study.
    """
    record = read_file(Path(path))
    if record.get("kind") != "search" or not isinstance(record.get("settings"), Mapping):
        raise InputError(f"{path} is no record of a search; expected the search.json of 'dwm-fast pacs search'")
    if ("sequence" in record) != of_sequence:
        kinds = {False: "pairs", True: "sequences"}
        raise InputError(
            f"{path} chose settings for {kinds[not of_sequence]}, and this is a study of {kinds[of_sequence]}; give "
            f"the record of a search whose grid has '{'sequence' if of_sequence else 'pairs'}' in its section search"
        )
    if record.get("pending") or not record.get("chosen"):
        raise InputError(
            f"{path}: {record.get('pending')} of {len(record['trials'])} trials are still to do; type the search again "
            "to end it, or leave them out of its grid"
        )
    return dict(record["settings"])
