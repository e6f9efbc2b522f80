"""Options that several commands of the study have, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str | None,
    typer.Option(
        help="Real images: a folder (domain/class or class), a Hugging Face data set on disk, torchvision:NAME, or "
        "PACS in any layout. Without it: built-in procedural images, which are not PACS."
    ),
]
Splits = Annotated[str | None, typer.Option(help="Folder of lists: PACS' train and crossval, or DOMAIN_train.txt.")]
Download = Annotated[
    bool,
    typer.Option("--download", help="Fetch what --data names first: torchvision's set, or PACS into that folder."),
]
_OTHERS = "Data sets other than PACS"
DataRoot = Annotated[
    str | None, typer.Option(help="Folder where torchvision keeps its data sets.", rich_help_panel=_OTHERS)
]
SplitClasses = Annotated[
    str | None,
    typer.Option(help="Cut one domain by class: 10, or pets=cat+dog,wheels=car+van.", rich_help_panel=_OTHERS),
]
OwnClasses = Annotated[
    str | None,
    typer.Option("--classes", help="same: every domain has all; own: each has its own.", rich_help_panel=_OTHERS),
]
Columns = Annotated[
    str | None,
    typer.Option(help="Of a Hugging Face set: image=NAME,label=NAME,domain=NAME.", rich_help_panel=_OTHERS),
]
Holdout = Annotated[
    float | None,
    typer.Option(help="Fraction of each class to test on, where nothing else says.", rich_help_panel=_OTHERS),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Run folder, by default runs/pacs (runs/sequence for a sequence); a stopped study goes on there."
    ),
]
Config = Annotated[Path | None, typer.Option(help="TOML, YAML or JSON file of settings; flags win over it.")]
Settings = Annotated[
    Path | None,
    typer.Option(help="search.json of a search: what it chose; flags win over it."),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds, comma-separated.")]
Backbone = Annotated[str | None, typer.Option(help="'small' or any torchvision classifier.")]
Weights = Annotated[
    str | None, typer.Option(help="Checkpoint, .safetensors or .pth, may be partial; or 'torchvision'.")
]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images, pixels.")]
TrainSize = Annotated[int | None, typer.Option(help="Side of the crops trained on, pixels.")]
CropScale = Annotated[float | None, typer.Option(help="Smallest fraction of the area a crop covers.")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
SourceEpochs = Annotated[int | None, typer.Option(help="Epochs of source training.")]
SourceLr = Annotated[float | None, typer.Option(help="Rate of source training.")]
Amp = Annotated[str | None, typer.Option(help="Precision: auto (bf16 on a GPU), bf16 or off.")]
Device = Annotated[str | None, typer.Option(help="Where it runs: auto, cpu, cuda, cuda:1, ...")]
Validation = Annotated[
    float | None, typer.Option(help="Fraction of the training images to evaluate on; test images stay unread.")
]
Threads = Annotated[int | None, typer.Option(help="Threads on the CPU; by default torch's choice.")]
_BY_STAGE = "Stage by stage"
ListStages = Annotated[
    bool,
    typer.Option(
        "--list-stages",
        help="Print each stage, a line: done, running, ready or waiting; its name; the stages it needs.",
        rich_help_panel=_BY_STAGE,
    ),
]
OneStage = Annotated[
    str | None,
    typer.Option("--stage", help="Do this stage, and what it needs, and nothing else.", rich_help_panel=_BY_STAGE),
]
Collect = Annotated[
    bool,
    typer.Option("--collect", help="Write results and report from the finished stages.", rich_help_panel=_BY_STAGE),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine", help="Who does the stages: processes (a pool here) or ray (a cluster).", rich_help_panel=_BY_STAGE
    ),
]
Workers = Annotated[
    int | None, typer.Option(help="Processes of --engine; by default the cores.", rich_help_panel=_BY_STAGE)
]
Address = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster, or auto; without it Ray is begun here.", rich_help_panel=_BY_STAGE),
]
GpusPerStage = Annotated[
    float | None,
    typer.Option(help="With --engine ray: GPUs of a stage, such as 0.25; by default 0.", rich_help_panel=_BY_STAGE),
]
Alone = Annotated[
    bool | None,
    typer.Option("--alone", help="Train each later domain by itself too: the table has the forward transfer."),
]
TaskEpochs = Annotated[int | None, typer.Option(help="Epochs of every later domain, for every method.")]
Orders = Annotated[
    int | None,
    typer.Option(help="Learn the domains in so many orders: rotations, each beginning one domain later."),
]
