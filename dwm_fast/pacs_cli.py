"""dwm-fast pacs and dwm-fast pacs sequence: the study of pairs, and of domains learned one after the other."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dwm_fast.errors import InputError
from dwm_fast.pacs_options import (
    Address,
    Alone,
    Amp,
    Backbone,
    BatchSize,
    Collect,
    Columns,
    Config,
    CropScale,
    Data,
    DataRoot,
    Device,
    Download,
    EngineName,
    GpusPerStage,
    Holdout,
    ImageSize,
    ListStages,
    OneStage,
    Orders,
    Out,
    OwnClasses,
    Seeds,
    Settings,
    SourceEpochs,
    SourceLr,
    SplitClasses,
    Splits,
    TaskEpochs,
    Threads,
    TrainSize,
    Validation,
    Weights,
    Workers,
)

if TYPE_CHECKING:
    from dwm_fast.pacs.config import StudyConfig
    from dwm_fast.pacs.engines import Engine

pacs_app = typer.Typer(invoke_without_command=True)


@pacs_app.callback()
def pairs(
    context: typer.Context,
    data: Data = None,
    splits: Splits = None,
    download: Download = False,
    data_root: DataRoot = None,
    split_classes: SplitClasses = None,
    classes: OwnClasses = None,
    columns: Columns = None,
    holdout: Holdout = None,
    out: Out = None,
    config: Config = None,
    settings: Settings = None,
    validation: Validation = None,
    sources: Annotated[str | None, typer.Option(help="Source domains, comma-separated.")] = None,
    targets: Annotated[str | None, typer.Option(help="Target domains, comma-separated.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated, yours as file.py:Class.")] = None,
    inits: Annotated[str | None, typer.Option(help="Some of S_start,S_end,random.")] = None,
    sequence: Annotated[
        str | None, typer.Option(help="The same as the command sequence; with its --task-epochs.")
    ] = None,
    seeds: Seeds = None,
    backbone: Backbone = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    train_size: TrainSize = None,
    crop_scale: CropScale = None,
    tune_size: Annotated[int | None, typer.Option(help="Side of crops fine-tuned on; image size by default.")] = None,
    tune_scale: Annotated[float | None, typer.Option(help="As --crop-scale, for fine-tuning.")] = None,
    batch_size: BatchSize = None,
    source_epochs: SourceEpochs = None,
    mask_epochs: Annotated[int | None, typer.Option(help="Epochs of mask learning.")] = None,
    tune_epochs: Annotated[int | None, typer.Option(help="Epochs of fine-tuning on the target.")] = None,
    task_epochs: Annotated[int | None, typer.Option(hidden=True, help="Of the command sequence.")] = None,
    source_lr: SourceLr = None,
    mask_lr: Annotated[float | None, typer.Option(help="Rate of mask learning.")] = None,
    tune_lr: Annotated[list[str] | None, typer.Option(help="METHOD=RATE[,RATE]; repeatable.")] = None,
    batch_norm: Annotated[
        list[str] | None, typer.Option(help="METHOD=POLICY[,POLICY] of frozen, shared, per-domain; repeatable.")
    ] = None,
    source_budget: Annotated[
        float | None, typer.Option(help="Allowed rise of the source cross-entropy under a mask, nats.")
    ] = None,
    coefficient: Annotated[float | None, typer.Option(help="Fixed coefficient of the regulariser instead.")] = None,
    amp: Amp = None,
    device: Device = None,
    threads: Threads = None,
    list_stages: ListStages = False,
    stage: OneStage = None,
    collect: Collect = False,
    engine: EngineName = None,
    workers: Workers = None,
    address: Address = None,
    gpus_per_stage: GpusPerStage = None,
) -> None:
    """Run the PACS study: source training, masks, re-initialisation, fine-tuning, evaluation, report.

    The run folder holds results.json and .csv, the table (S gain, T drop), figures, the masks and report.html.
    """
    given = {**context.params, "out": out, "config": config, "settings": settings}  # older typers' params hold text
    if context.invoked_subcommand is not None:
        early = [name for name in given if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
        if early:
            flag = f"--{early[0].replace('_', '-')}"
            raise InputError(f"{flag} stands before '{context.invoked_subcommand}'; give the options after it")
        return
    learned = {"epochs": mask_epochs, "lr": mask_lr, "source_budget": source_budget, "coefficient": coefficient}
    base = _base(given)
    tunes = _tunes(base, tune_epochs, _per_method("--batch-norm", batch_norm), _per_method("--tune-lr", tune_lr))
    _run(base, given, {"tune": tunes, "binary": learned, "edit": learned})


@pacs_app.command()
def search(
    grid: Annotated[Path, typer.Argument(help="File of settings with a section 'search': what is tried, and why.")],
    data: Data = None,
    splits: Splits = None,
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="Folder of the search; a stopped one goes on where it was.")] = Path(
        "runs/search"
    ),
    amp: Amp = None,
    device: Device = None,
) -> None:
    """Choose settings on a validation part of the training images; test images are never read.

    The grid's section has pairs of domains, or a sequence. The folder holds search.json: every trial with its reason,
    and the choice, for --settings of 'dwm-fast pacs' or 'dwm-fast pacs sequence'.
    """
    from dwm_fast.pacs.terminal import run_search

    flags = {"data": data, "splits": splits, "weights": weights, "amp": amp, "device": device}
    run_search(grid, {name: value for name, value in flags.items() if value is not None}, out)


@pacs_app.command()
def bank(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished study of pairs.")],
    out: Annotated[Path, typer.Option(help="Folder of the bank.")] = Path("domains"),
    method: Annotated[str, typer.Option(help="Whose masks.")] = "binary",
    seed: Annotated[int, typer.Option(help="Of which seed.")] = 0,
) -> None:
    """Take a study's masks into a bank: every source under its own bits, over one network."""
    from dwm_fast._screen import Screen
    from dwm_fast.pacs.pairs.banking import save_bank

    Screen().print(save_bank(run, out, method, seed))


@pacs_app.command()
def sequence(
    context: typer.Context,
    domains: Annotated[
        str,
        typer.Argument(
            help="At least two, comma-separated, in the order of learning; or all. Two orders: 'photo,art;art,photo'."
        ),
    ],
    orders: Orders = None,
    data: Data = None,
    splits: Splits = None,
    download: Download = False,
    data_root: DataRoot = None,
    split_classes: SplitClasses = None,
    classes: OwnClasses = None,
    columns: Columns = None,
    holdout: Holdout = None,
    out: Out = None,
    config: Config = None,
    settings: Settings = None,
    validation: Validation = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of none,piggyback,ksm,spg,packnet,binary,hat,top-scores,fggm,cpg,low-rank; a preset, file.py:Class"
        ),
    ] = None,
    seeds: Seeds = None,
    backbone: Backbone = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    train_size: TrainSize = None,
    crop_scale: CropScale = None,
    batch_size: BatchSize = None,
    source_epochs: SourceEpochs = None,
    task_epochs: TaskEpochs = None,
    source_lr: SourceLr = None,
    alone: Alone = None,
    amp: Amp = None,
    device: Device = None,
    threads: Threads = None,
    list_stages: ListStages = False,
    stage: OneStage = None,
    collect: Collect = False,
    engine: EngineName = None,
    workers: Workers = None,
    address: Address = None,
    gpus_per_stage: GpusPerStage = None,
) -> None:
    """Let every method learn the domains one after the other, and measure what it keeps of the earlier ones.

    The run folder holds results.json and .csv, the table (final accuracies, forgetting, storage), figures and
    report.html.
    """
    given = {**context.params, "sequence": domains, "out": out, "config": config, "settings": settings}
    _run(_base(given), given, {})


_LISTS = ("sources", "targets", "methods", "inits", "seeds")
_IMAGES = ("split_classes", "classes", "columns", "holdout")
_PLAIN = ("data", "data_root", "splits", "validation", "backbone", "weights", "amp", "device", "threads")
_OF_SEQUENCE = ("sequence", "orders", "alone")
_SIZES = ("image_size", "train_size", "crop_scale", "tune_size", "tune_scale", "batch_size")


def _base(given: dict[str, Any]) -> StudyConfig:
    """What flags are put over: the file of --config, or the defaults for the images; `given` has its data ready."""
    from dwm_fast.pacs.config import builtin_defaults, from_dict, load_config, real_defaults
    from dwm_fast.pacs.data import download_pacs
    from dwm_fast.pacs.data.vision import PREFIX, download_torchvision
    from dwm_fast.pacs.search import read_settings

    if given["download"]:
        if given["data"] is None:
            raise InputError("--download needs --data FOLDER to put PACS in, or --data torchvision:NAME")
        if given["data"].startswith(PREFIX):
            download_torchvision(given["data"], given["data_root"])
        else:
            given["data"] = str(download_pacs(given["data"]))
    base = builtin_defaults() if given["data"] is None else real_defaults()
    if given["config"] is not None:
        base = load_config(given["config"], None if given["data"] is None else base)
    if given["settings"] is None:
        return base
    of_sequence = given["sequence"] is not None or base.sequence is not None
    return from_dict(read_settings(given["settings"], of_sequence), base)


def _run(base: StudyConfig, given: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    from dwm_fast.pacs.config import from_dict

    images = {name: given[name] for name in _IMAGES}
    sections = {"source": {"epochs": given["source_epochs"], "lr": given["source_lr"]}, "images": images, **sections}
    entries: dict[str, Any] = {name: given.get(name) for name in (*_PLAIN, *_OF_SEQUENCE, *_SIZES)}
    entries |= {name: _comma(given.get(name)) for name in _LISTS}
    entries |= {k: {n: v for n, v in s.items() if v is not None} or None for k, s in sections.items()}
    study = from_dict({k: v for k, v in entries.items() if v is not None}, base)
    if given["task_epochs"] is not None:
        study = study.with_task_epochs(given["task_epochs"])
    out = given["out"] or Path("runs/pacs" if study.sequence is None else "runs/sequence")
    _act(study, out, given)


def _act(study: StudyConfig, out: Path, given: dict[str, Any]) -> None:
    """Do what one of the flags asks for, or the whole study."""
    from dwm_fast.pacs import terminal

    asked = [name for name in ("list_stages", "stage", "collect", "engine") if given[name] not in (None, False)]
    if len(asked) > 1:
        one, other = (f"--{name.replace('_', '-')}" for name in asked[:2])
        raise InputError(f"{one} and {other} exclude each other; give one of them")
    engine = _engine(given)
    if engine is not None:
        terminal.run_on_engine(study, out, engine)
    elif given["list_stages"]:
        terminal.list_stages(study, out)
    elif given["stage"] is not None:
        terminal.run_stage(study, out, given["stage"])
    elif given["collect"]:
        terminal.collect(study, out)
    else:
        terminal.run_with_progress(study, out)


def _engine(given: dict[str, Any]) -> Engine | None:
    """The engine that the flags ask for."""
    from dwm_fast.pacs.engine_ray import Ray
    from dwm_fast.pacs.engines import Processes

    name = given["engine"]
    needed = {"workers": "processes or --engine ray", "address": "ray", "gpus_per_stage": "ray"}
    for flag, engine in needed.items():
        if given[flag] is not None and name not in engine.replace("or --engine", "").split():
            raise InputError(f"--{flag.replace('_', '-')} needs --engine {engine}")
    if name not in (None, "processes", "ray"):
        raise InputError(f"--engine {name}; expected processes or ray")
    if name is None:
        return None
    workers = os.cpu_count() or 1 if given["workers"] is None else given["workers"]
    if name == "processes":
        return Processes(workers)
    return Ray(workers, given["address"], given["gpus_per_stage"] or 0.0)


def _comma(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _per_method(option: str, entries: list[str] | None) -> dict[str, list[str]]:
    """METHOD=VALUE[,VALUE] entries as a mapping; entries of one method add up."""
    found: dict[str, list[str]] = {}
    for entry in entries or []:
        method, _, values = entry.partition("=")
        if not _comma(values):
            example = "binary=frozen" if option == "--batch-norm" else "binary=0.0003"
            raise InputError(f"{option} {entry}: expected METHOD=VALUE, such as {example}")
        found.setdefault(method.strip(), []).extend(_comma(values) or [])
    return found


def _tunes(
    base: StudyConfig, epochs: int | None, policies: dict[str, list[str]], rates: dict[str, list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Entries of the configuration's `tune` section that the flags ask for."""
    tunes: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys((*base.tune, *policies, *rates)):
        plain = [dataclasses.asdict(way) for way in base.ways(method)]
        if method in policies or method in rates:
            plain = [
                {**plain[0], "batch_norm": policy, "lr": rate}
                for policy in policies.get(method, list(dict.fromkeys(way["batch_norm"] for way in plain)))
                for rate in rates.get(method, list(dict.fromkeys(way["lr"] for way in plain)))
            ]
        elif epochs is None:
            continue
        tunes[method] = plain if epochs is None else [{**way, "epochs": epochs} for way in plain]
    return tunes
