"""A study in a run folder: its stages in order, resuming, and everything that is written from the results."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dwm_fast
from dwm_fast._files import write_atomic
from dwm_fast.errors import InputError
from dwm_fast.pacs.backbones import LoadReport, load_weights
from dwm_fast.pacs.claims import check_folder
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.data import PacsData, load_pacs, validation_part
from dwm_fast.pacs.data.any import ImageOptions, Place, is_other, load_any
from dwm_fast.pacs.data.procedural import procedural
from dwm_fast.pacs.engines import Engine, Told, in_order
from dwm_fast.pacs.lab import Lab, Planned
from dwm_fast.pacs.stages import device_name

if TYPE_CHECKING:
    from rich.table import Table

LATER_WORDS = ("images", "split", "classes_of")
"""What results of earlier releases do not say of their images."""
_IN_DEVICE_MEMORY = 0.25
"""Largest fraction of the device's free memory that the decoded images may take there."""


@dataclass(frozen=True)
class Stage:
    """One line of progress: what is being done, how to do it, the files of the run folder that it leaves, and the
    names of the stages that it starts from."""

    name: str
    label: str
    run: Callable[[], str]
    planned: list[Planned]
    needs: tuple[str, ...] = ()


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{name}' cannot be used here: {reason}; try --device cpu") from error
    return device


def load_data(config: StudyConfig) -> PacsData:
    """The images a configuration asks for: PACS or another data set from `config.data`, or the built-in ones."""
    wanted, validation, options = config.domains() or None, config.validation, config.images
    if config.data is not None and is_other(config.data):
        place = Place(config.data, config.data_root, config.splits)
        return load_any(place, options, config.image_size, wanted, validation)
    what = "PACS" if config.data is not None else "the built-in images"
    for name in ("classes", "split_classes", "columns"):
        there = config.data is None or Path(config.data).exists()  # what is not there is told by load_pacs
        if there and getattr(options, name) != getattr(ImageOptions(), name):
            raise InputError(f"images.{name} does not go with {what}, whose classes are known; leave it out")
    if config.data is not None:
        return load_pacs(
            config.data, config.splits, config.image_size, wanted, holdout=options.holdout, validation=validation
        )
    data = procedural(image_size=config.image_size)
    return data if config.validation is None else validation_part(data, config.validation)


@contextlib.contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """Settings of the process while a study runs: speed on a CPU, the same sums in every run on a GPU."""
    cudnn = torch.backends.cudnn
    deterministic, benchmark, flushing = cudnn.deterministic, cudnn.benchmark, sys.float_info.min / 2 == 0
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
    if device.type == "cpu":
        # Second moments of logit gradients are often subnormal, and arithmetic on those takes a hundred times longer.
        torch.set_flush_denormal(True)
        _keep_freed_memory()
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        torch.set_flush_denormal(flushing)


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """So many threads of the CPU for torch; None leaves their number alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """A step's tensors are many megabytes each, and fresh pages cost more than the arithmetic."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class Study:
    """Runs a configuration in a folder; an interrupted one goes on where it was.

    Abstract: ``Study(config, folder)`` makes a `PairStudy`, or a `SequenceStudy` where there is a sequence.
    A wing says in `stages`, `results`, `files` and `summary` what it does, measures, writes and shows.

    Args:
        config: what to run.
        folder: the run folder; made by the first stage. A finished stage in it that was made with other settings is
            refused, and so are a study of the other kind and results that this one would lose.
        data: the images; loaded from the configuration by default.
    """

    lab: Lab

    def __new__(cls, config: StudyConfig, *_: Any, **__: Any) -> Study:
        return super().__new__(_wing(config) if cls is Study else cls)

    def __init__(self, config: StudyConfig, folder: Path | str, data: PacsData | None = None) -> None:
        self.folder = Path(folder)
        if config.domains():
            check_folder(self.folder, config)
        self.device = choose_device(config.device)
        data = load_data(config) if data is None else data
        self.config = config = config.with_domains(tuple(data.domains))
        check_folder(self.folder, config)
        self.data = data.to(self.device) if self._fits(data) else data
        self.lab = self.make_lab()
        for name, settings in (planned for stage in self.stages() for planned in stage.planned):
            self.lab.stages.check(name, settings)

    def make_lab(self) -> Lab:
        """What does single stages."""
        raise NotImplementedError

    def stages(self) -> Iterator[Stage]:
        """Every stage in order; running one reads it from the folder where it is done."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """Everything that was measured, from the folder, as plain data."""
        raise NotImplementedError

    def files(self, results: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
        """Name in the run folder and content of everything that people look at, made one by one."""
        raise NotImplementedError

    def summary(self, results: dict[str, Any]) -> tuple[Table, list[str]]:
        """What the terminal shows at the end: a table, and the finding in sentences."""
        raise NotImplementedError

    def sources(self) -> list[str]:
        """The domains that a network of their own is trained on."""
        raise NotImplementedError

    def _fits(self, data: PacsData) -> bool:
        if self.device.type != "cuda":
            return self.device.type == "cpu"
        return data.nbytes < _IN_DEVICE_MEMORY * torch.cuda.mem_get_info(self.device)[0]

    def weights_report(self) -> LoadReport | None:
        """What the checkpoint gives the network; None where there is none, or no source network left to train."""
        cells = [(source, seed) for source in self.sources() for seed in self.config.seeds]
        to_train = not all(self.lab.stages.check(*self.lab.source_stage(*cell)) for cell in cells)
        if self.config.weights is None or not to_train:
            return None
        return load_weights(
            self.lab.network(classes=self.lab.classes(cells[0][0])), self.config.weights, self.config.backbone
        )

    def source_stage(self, source: str, seed: int, label: str) -> Stage:
        """The stage that trains a source network."""

        def run() -> str:
            return f"accuracy {self.lab.source(source, seed).figures['accuracy']:.3f}"

        planned = self.lab.source_stage(source, seed)
        return Stage(planned[0], label, run, [planned])

    def run(
        self,
        progress: Callable[[int, int, Stage, str | None], None] = lambda *_: None,
        report_step: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Do the stages that are not done yet, one after the other, then `collect`.

        Args:
            progress: called with (done, total, stage, None) before a stage and (done, total, stage, figures) after.
            report_step: called with the figures of every training step (tensors on the device).

        Returns:
            The results as in results.json.
        """
        self.lab.report = report_step
        stages = list(self.stages())
        with self._at_work(), prepared(self.device):
            for number, stage in enumerate(stages):
                progress(number, len(stages), stage, None)
                progress(number + 1, len(stages), stage, stage.run())
        return self.collect()

    def run_on(self, engine: Engine, tell: Told = lambda *_: None) -> dict[str, Any]:
        """As `run`, the stages done by an engine; `tell` is told of them as `Engine.run` says."""
        with self._at_work():
            engine.run(self, list(in_order([stage for stage in self.stages() if not self.done(stage)])), tell)
        return self.collect()

    def state(self, stage: Stage) -> str:
        """How far a stage is: done, running (a process is at it), ready (to be done), or waiting for those it needs."""
        if self.done(stage):
            return "done"
        if any(self.lab.stages.taken(name) for name, _ in stage.planned):
            return "running"
        needed = [other for other in self.stages() if other.name in stage.needs]
        return "ready" if all(map(self.done, needed)) else "waiting"

    def done(self, stage: Stage) -> bool:
        """Whether a stage is finished."""
        return all(self.lab.stages.check(*planned) for planned in stage.planned)

    def run_stage(self, name: str) -> str:
        """Do one stage, and those that it needs where they are not done; returns its figures in words.

        A stage that another process is at is waited for. Raises InputError for a name that no stage has.
        """
        stages = {stage.name: stage for stage in self.stages()}
        if name not in stages:
            near = difflib.get_close_matches(name, stages, n=1, cutoff=0.0)
            raise InputError(f"no stage '{name}' in this study (the nearest is '{near[0]}'); see --list-stages")
        with self._at_work(), prepared(self.device):
            return stages[name].run()

    def collect(self) -> dict[str, Any]:
        """Write everything the folder is for from the finished stages; returns the results as in results.json.

        Raises InputError, with nothing written, where a stage is not done.
        """
        stages = list(self.stages())
        missing = [stage.name for stage in stages if not self.done(stage)]
        if missing:
            first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise InputError(
                f"{self.folder}: {len(missing)} of {len(stages)} stages are not done ({first}); --list-stages lists "
                "them, --stage does one, and the command without --collect does all"
            )
        with self._at_work():
            results = self.results()
            self.write(results)
        return results

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Refuse those that come with another configuration, and compute on as many threads as this one says."""
        with self.lab.stages.claims.study(self.config), on_threads(self.config.threads):
            yield

    def write(self, results: dict[str, Any]) -> None:
        """Write results.json and config.json, and after them the other `files`, each made when it is written."""
        write_atomic(self.folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
        write_atomic(self.folder / "config.json", json.dumps(self.config.to_dict(), indent=1))
        for name, content in self.files(results):
            write_atomic(self.folder / name, content)

    def measured(self, **what: Any) -> dict[str, Any]:
        """Results: `what` was measured, after what it was measured on and with."""
        config = self.config.to_dict()
        return {"data": self.described(), "config": config, "versions": versions(self.device), **what}

    def described(self) -> dict[str, Any]:
        """What the images are, as results have it."""
        data = self.data
        return {
            "name": data.name,
            "real": data.real,
            "domains": list(data.domains),
            "classes": list(data.classes),
            "image_size": data.image_size,
            "fingerprint": data.fingerprint,
            "counts": {n: {"train": len(d.train), "test": len(d.test)} for n, d in data.domains.items()},
            "images": sum(len(d.labels) for d in data.domains.values()),
            "split": data.split,
            "classes_of": {name: list(data.classes_of(name)) for name in data.domains},
        }

    def command(self) -> str:
        """A command line that repeats the study."""
        return "dwm-fast " + shlex.join(sys.argv[1:]) if sys.argv[0].endswith("dwm-fast") else "dwm-fast pacs"


def _wing(config: StudyConfig) -> type[Study]:
    from dwm_fast.pacs.pairs.study import PairStudy
    from dwm_fast.pacs.sequence.study import SequenceStudy

    return PairStudy if config.sequence is None else SequenceStudy


def versions(device: torch.device) -> dict[str, str]:
    """Versions and hardware that a result depends on."""
    import torchvision

    name = device_name(device)
    if device.type != "cuda":
        name += f", {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return {
        "dwm_fast": dwm_fast.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": name,
    }
