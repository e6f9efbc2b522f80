"""A study in a terminal: progress bar with accuracies, one line a stage, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dwm_fast._screen import Screen
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.data.any import is_other
from dwm_fast.pacs.engines import Engine
from dwm_fast.pacs.search import RECORD, Search, read_grid
from dwm_fast.pacs.study import Stage, Study
from dwm_fast.pacs.words import said_of

_SECONDS_BETWEEN_FIGURES = 0.5


def run_with_progress(config: StudyConfig, folder: Path) -> None:
    """Run a study and show it: what is being done, what came out, and where the report is."""
    console = Screen()
    study = _opened(console, config, folder)
    begun = time.perf_counter()
    with _bar(console) as bar:
        task = bar.add_task("starting")
        shown = _Figures(bar, task)

        def progress(done: int, total: int, stage: Stage, says: str | None) -> None:
            bar.update(task, completed=done, total=total, description=stage.label)
            shown.label = stage.label
            if says is not None:
                _line(console, f"[{done}/{total}] {stage.label}: {says}")

        results = study.run(progress, shown)
    _show(console, study, results, f"{time.perf_counter() - begun:.0f} s; ")


def run_on_engine(config: StudyConfig, folder: Path, engine: Engine) -> None:
    """As `run_with_progress`, with a line for each stage that is being done, on whatever process."""
    console = Screen()
    study = _opened(console, config, folder)
    begun, stages = time.perf_counter(), {stage.name: stage for stage in study.stages()}
    done = sum(map(study.done, stages.values()))
    with _bar(console) as bar:
        whole = bar.add_task("all stages", completed=done, total=len(stages))
        rows: dict[str, Any] = {}

        def tell(kind: str, name: str, text: str) -> None:
            nonlocal done
            label = stages[name].label
            if kind == "begun" and name not in rows:
                rows[name] = bar.add_task(label, total=1)
            elif kind == "at":
                bar.update(rows[name], description=f"{label} ({text})")
            elif kind == "done":
                done += 1
                bar.remove_task(rows.pop(name))
                bar.update(whole, completed=done)
                _line(console, f"[{done}/{len(stages)}] {label}: {text}")

        results = study.run_on(engine, tell)
    _show(console, study, results, f"{time.perf_counter() - begun:.0f} s; ")


def list_stages(config: StudyConfig, folder: Path) -> None:
    """Print a line for each stage, with tabs: its state, its name, and the names of those that it needs."""
    study = Study(config, folder)
    for stage in study.stages():
        print(study.state(stage), stage.name, ",".join(stage.needs) or "-", sep="\t")


def run_stage(config: StudyConfig, folder: Path, name: str) -> None:
    """Do one stage of a study, and what it needs, and show what came out."""
    console = Screen()
    study = _opened(console, config, folder)
    with _bar(console) as bar:
        study.lab.report = shown = _Figures(bar, bar.add_task(name, total=1))
        shown.label = name
        says = study.run_stage(name)
    _line(console, f"{name}: {says}")


def collect(config: StudyConfig, folder: Path) -> None:
    """Write everything from the finished stages of a study, and show it."""
    study = Study(config, folder)
    _show(Screen(), study, study.collect())


def _opened(console: Screen, config: StudyConfig, folder: Path) -> Study:
    """The study, after lines that say what it is made of."""
    kind = "real images" if is_other(config.data) else "real PACS"
    _line(console, f"images: {f'{kind} from {config.data}' if config.data else 'procedural stand-in (not PACS)'}")
    study = Study(config, folder)
    if is_other(config.data):
        _line(console, f"images: {said_of(study.described())}")
    study.lab.stages.waits = lambda name: _line(console, f"{name}: another process is at it; waiting")
    if study.data.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(study.data.left_out.items()))
        _line(console, f"images: left out: {reasons}")
    weights = study.weights_report()
    if weights is not None:
        _line(console, f"weights: from {config.weights}, {weights.summary()}")
        if weights.left_over():
            _line(console, f"weights: {weights.left_over()}")
    return study


def _bar(console: Screen) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _show(console: Screen, study: Study, results: dict[str, Any], took: str = "") -> None:
    table, sentences = study.summary(results)
    console.print(table)
    for sentence in sentences:
        console.print(sentence)
    _line(console, f"{took}report: {study.folder / 'report.html'}")


def run_search(grid: Path, flags: Mapping[str, Any], folder: Path) -> None:
    """Run a search and show each trial's accuracies on the validation images, then the choice."""
    console = Screen()
    search = Search(*read_grid(grid, flags), folder)
    _line(console, f"images: {search.data.name}; test images are not read")
    record = search.run(lambda text: _line(console, text))
    for method, number in record["chosen"].items():
        trial = record["trials"][number]
        _line(
            console,
            f"{method}: trial {number + 1}, {trial['settings']}: {search.says(trial)} on validation images",
        )
    sequence = search.config.sequence
    taken = "pacs" if sequence is None else f"pacs sequence {','.join(sequence)}"
    _line(console, f"record: {folder / RECORD}; 'dwm-fast {taken} --settings {folder / RECORD}' takes the choice")


def _line(console: Screen, text: str) -> None:
    console.print(text, soft_wrap=True)


class _Figures:
    """Shows the figures of the training steps, read from the device a few times a second at most."""

    def __init__(self, bar: Progress, task: object) -> None:
        self.bar, self.task, self.label = bar, task, ""
        self.last = 0.0

    def __call__(self, figures: Mapping[str, Tensor]) -> None:
        now = time.monotonic()
        if self.bar.disable or now - self.last < _SECONDS_BETWEEN_FIGURES:
            return
        self.last = now
        text = ", ".join(f"{name} {float(value):.3g}" for name, value in figures.items())
        self.bar.update(self.task, description=f"{self.label} ({text})")  # type: ignore[arg-type]
