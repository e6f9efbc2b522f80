"""The command line: dwm-fast pacs, doctor, build and masks."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

import dwm_fast
from dwm_fast.doctor import diagnose
from dwm_fast.errors import DwmError, InputError
from dwm_fast.masks_cli import masks_app

app = typer.Typer(
    help="Learn, store and serve one-bit weight masks over a shared backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(masks_app, name="masks")
_debug = False


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dwm-fast {dwm_fast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    global _debug
    _debug = debug


def _comma(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _per_method(option: str, entries: list[str] | None) -> dict[str, list[str]]:
    """METHOD=VALUE[,VALUE] entries as a mapping."""
    found = {}
    for entry in entries or []:
        method, sign, values = entry.partition("=")
        if not sign or not values:
            raise InputError(f"{option} {entry}: expected METHOD=VALUE, such as binary=frozen")
        found[method] = values.split(",")
    return found


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: '{text}' is not a number") from None


def _tunes(
    base: Any, epochs: int | None, policies: dict[str, list[str]], rates: dict[str, list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Entries of the configuration's `tune` section that the flags ask for."""
    unknown = (policies.keys() | rates.keys()) - base.keys()
    if unknown:
        raise InputError(f"unknown method '{sorted(unknown)[0]}'; expected some of {', '.join(base)}")
    tunes: dict[str, list[dict[str, Any]]] = {}
    for method, ways in base.items():
        if epochs is None and method not in policies and method not in rates:
            continue
        tunes[method] = [
            {
                **dataclasses.asdict(ways[0]),
                **({} if epochs is None else {"epochs": epochs}),
                "batch_norm": policy,
                "lr": lr,
            }
            for policy in policies.get(method, [ways[0].batch_norm])
            for lr in [_number("--tune-lr", r) for r in rates.get(method, [str(ways[0].lr)])]
        ]
    return tunes


@app.command()
def pacs(
    data: Annotated[
        str | None,
        typer.Option(
            help="Real PACS: a folder (domain/class, kfold or Dassl layout) or a Hugging Face parquet file or folder. "
            "Without it: built-in procedural images, which are not PACS."
        ),
    ] = None,
    splits: Annotated[str | None, typer.Option(help="Folder of the official train and crossval lists.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch flwrlabs/pacs into the folder --data names, then use it.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Run folder; a stopped study goes on where it was.")] = Path("runs/pacs"),
    config: Annotated[Path | None, typer.Option(help="TOML, YAML or JSON file of settings; flags win over it.")] = None,
    sources: Annotated[str | None, typer.Option(help="Source domains, comma-separated.")] = None,
    targets: Annotated[str | None, typer.Option(help="Target domains, comma-separated.")] = None,
    methods: Annotated[str | None, typer.Option(help="Some of none,naive,edit,binary.")] = None,
    inits: Annotated[str | None, typer.Option(help="Some of S_start,S_end,random.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, comma-separated.")] = None,
    backbone: Annotated[str | None, typer.Option(help="'small' or any torchvision classifier.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint, .safetensors or .pth; may be partial.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images, pixels.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Side of the crops trained on, pixels.")] = None,
    crop_scale: Annotated[float | None, typer.Option(help="Smallest fraction of the area a crop covers.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    source_epochs: Annotated[int | None, typer.Option(help="Epochs of source training.")] = None,
    mask_epochs: Annotated[int | None, typer.Option(help="Epochs of mask learning.")] = None,
    tune_epochs: Annotated[int | None, typer.Option(help="Epochs of fine-tuning on the target.")] = None,
    source_lr: Annotated[float | None, typer.Option(help="Rate of source training.")] = None,
    mask_lr: Annotated[float | None, typer.Option(help="Rate of mask learning.")] = None,
    tune_lr: Annotated[list[str] | None, typer.Option(help="METHOD=RATE[,RATE]; repeatable.")] = None,
    batch_norm: Annotated[
        list[str] | None, typer.Option(help="METHOD=POLICY[,POLICY] of frozen, shared, per-domain; repeatable.")
    ] = None,
    source_budget: Annotated[
        float | None, typer.Option(help="Allowed rise of the source cross-entropy under a mask, nats.")
    ] = None,
    coefficient: Annotated[float | None, typer.Option(help="Fixed coefficient of the regulariser instead.")] = None,
    amp: Annotated[str | None, typer.Option(help="auto (bf16 on a GPU), bf16 or off.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Run the PACS study: source training, masks, re-initialisation, fine-tuning, evaluation, report.

    The run folder holds results.json and .csv, the table (S gain, T drop), figures, the masks and report.html.
    """
    from dwm_fast.pacs.config import builtin_defaults, from_dict, load_config, real_defaults
    from dwm_fast.pacs.data import download_pacs
    from dwm_fast.pacs.terminal import run_with_progress

    if download:
        if data is None:
            raise InputError("--download needs --data FOLDER, the folder to put the images in")
        data = str(download_pacs(data))
    base = real_defaults() if data is not None else builtin_defaults()
    if config is not None:
        base = load_config(config, base)
    policies, rates = _per_method("--batch-norm", batch_norm), _per_method("--tune-lr", tune_lr)
    tunes = _tunes(base.tune, tune_epochs, policies, rates)
    learned = {"epochs": mask_epochs, "lr": mask_lr, "source_budget": source_budget, "coefficient": coefficient}
    sections = {
        "source": {"epochs": source_epochs, "lr": source_lr},
        "binary": learned,
        "edit": learned,
    }
    given: dict[str, Any] = {
        "data": data, "splits": splits, "sources": _comma(sources), "targets": _comma(targets),
        "methods": _comma(methods), "inits": _comma(inits), "seeds": _comma(seeds), "backbone": backbone,
        "weights": weights, "image_size": image_size, "train_size": train_size, "crop_scale": crop_scale,
        "batch_size": batch_size,
        "amp": amp, "device": device, "tune": tunes or None,
        **{k: {n: v for n, v in s.items() if v is not None} or None for k, s in sections.items()},
    }  # fmt: skip
    run_with_progress(from_dict({k: v for k, v in given.items() if v is not None}, base), out)


@app.command()
def doctor() -> None:
    """Say what works here, what does not, and what to type."""
    for line in diagnose():
        typer.echo(line)


@app.command()
def build(
    force: Annotated[bool, typer.Option("--force", help="Build again even if a build is cached.")] = False,
    cuda: Annotated[bool | None, typer.Option("--cuda/--no-cuda", help="Build the CUDA part or not.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the compiler's commands.")] = False,
) -> None:
    """Build the optional C++/CUDA extension now instead of at its first use."""
    from dwm_fast.ops import _build

    typer.echo(f"built {_build.build(force=force, cuda=cuda, verbose=verbose)}")


def main() -> None:
    """Entry point of the dwm-fast command: errors are one line on stderr, with a traceback only under --debug."""
    try:
        app(standalone_mode=True)
    except DwmError as error:
        if _debug:
            traceback.print_exc()
        print(f"dwm-fast: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("dwm-fast: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
