"""The command line: dwm-fast pacs, doctor, build, bench and masks."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import dwm_fast
from dwm_fast.doctor import diagnose
from dwm_fast.errors import DwmError, InputError
from dwm_fast.masks_cli import masks_app

_INTERRUPTED = 130

app = typer.Typer(
    help="Learn, store and serve one-bit weight masks over a shared backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(masks_app, name="masks")
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Click's error about the command line itself, wherever the installed typer keeps click."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dwm-fast {dwm_fast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Learn, store and serve one-bit weight masks over a shared backbone."""


def _comma(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _per_method(option: str, example: str, entries: list[str] | None) -> dict[str, list[str]]:
    """METHOD=VALUE[,VALUE] entries as a mapping; entries of one method add up."""
    found: dict[str, list[str]] = {}
    for entry in entries or []:
        method, _, values = entry.partition("=")
        if not _comma(values):
            raise InputError(f"{option} {entry}: expected METHOD=VALUE, such as {example}")
        found.setdefault(method.strip(), []).extend(_comma(values) or [])
    return found


def _tunes(
    base: Any, epochs: int | None, policies: dict[str, list[str]], rates: dict[str, list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Entries of the configuration's `tune` section that the flags ask for."""
    unknown = (policies.keys() | rates.keys()) - base.keys()
    if unknown:
        raise InputError(f"unknown method '{sorted(unknown)[0]}'; expected some of {', '.join(base)}")
    tunes: dict[str, list[dict[str, Any]]] = {}
    for method, ways in base.items():
        plain = [dataclasses.asdict(way) for way in ways]
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


def _refuse_flags_of_pairs(is_sequence: bool, task_epochs: int | None, given: dict[str, Any]) -> None:
    """Raise InputError for a flag that the kind of study does not read."""
    if not is_sequence and task_epochs is not None:
        raise InputError("--task-epochs needs --sequence; the epochs of pairs are --mask-epochs and --tune-epochs")
    useless = [flag for flag, value in given.items() if value is not None] if is_sequence else []
    if useless:
        raise InputError(
            f"{useless[0]} is of the study of pairs and a sequence does not read it; leave it or --sequence out (a "
            "method's options in a sequence: section 'sequential' of --config)"
        )


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
    methods: Annotated[
        str | None,
        typer.Option(
            help="Some of none,naive,edit,binary; with --sequence some of none,piggyback,ksm,spg,packnet,binary."
        ),
    ] = None,
    inits: Annotated[str | None, typer.Option(help="Some of S_start,S_end,random.")] = None,
    sequence: Annotated[
        str | None, typer.Option(help="Domains to learn one after the other, instead of pairs; at least two.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, comma-separated.")] = None,
    backbone: Annotated[str | None, typer.Option(help="'small' or any torchvision classifier.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Checkpoint, .safetensors or .pth, may be partial; or 'torchvision'.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images, pixels.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Side of the crops trained on, pixels.")] = None,
    crop_scale: Annotated[float | None, typer.Option(help="Smallest fraction of the area a crop covers.")] = None,
    tune_size: Annotated[int | None, typer.Option(help="Side of crops fine-tuned on; image size by default.")] = None,
    tune_scale: Annotated[float | None, typer.Option(help="As --crop-scale, for fine-tuning.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    source_epochs: Annotated[int | None, typer.Option(help="Epochs of source training.")] = None,
    mask_epochs: Annotated[int | None, typer.Option(help="Epochs of mask learning.")] = None,
    tune_epochs: Annotated[int | None, typer.Option(help="Epochs of fine-tuning on the target.")] = None,
    task_epochs: Annotated[
        int | None, typer.Option(help="With --sequence: epochs of every later domain, for every method.")
    ] = None,
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
    amp: Annotated[str | None, typer.Option(help="Precision: auto (bf16 on a GPU), bf16 or off.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs: auto, cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Run the PACS study: source training, masks, re-initialisation, fine-tuning, evaluation, report.

    The run folder holds results.json and .csv, the table (S gain, T drop), figures, the masks and report.html. With
    --sequence every method learns the domains one after the other, and the table says what it keeps of the earlier.
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
        base = load_config(config, real_defaults() if data is not None else None)
    _refuse_flags_of_pairs(
        base.sequence is not None or sequence is not None,
        task_epochs,
        {
            "--sources": sources,
            "--targets": targets,
            "--inits": inits,
            "--mask-epochs": mask_epochs,
            "--mask-lr": mask_lr,
            "--source-budget": source_budget,
            "--coefficient": coefficient,
            "--tune-epochs": tune_epochs,
            "--tune-lr": tune_lr,
            "--batch-norm": batch_norm,
        },
    )
    policies = _per_method("--batch-norm", "binary=frozen", batch_norm)
    tunes = _tunes(base.tune, tune_epochs, policies, _per_method("--tune-lr", "binary=0.0003", tune_lr))
    learned = {"epochs": mask_epochs, "lr": mask_lr, "source_budget": source_budget, "coefficient": coefficient}
    sections = {
        "source": {"epochs": source_epochs, "lr": source_lr},
        "binary": learned,
        "edit": learned,
    }
    given: dict[str, Any] = {
        "data": data,
        "splits": splits,
        "sequence": _comma(sequence),
        "sources": _comma(sources),
        "targets": _comma(targets),
        "methods": _comma(methods),
        "inits": _comma(inits),
        "seeds": _comma(seeds),
        "backbone": backbone,
        "weights": weights,
        "image_size": image_size,
        "train_size": train_size,
        "crop_scale": crop_scale,
        "tune_size": tune_size,
        "tune_scale": tune_scale,
        "batch_size": batch_size,
        "amp": amp,
        "device": device,
        "tune": tunes or None,
        **{k: {n: v for n, v in s.items() if v is not None} or None for k, s in sections.items()},
    }
    study = from_dict({k: v for k, v in given.items() if v is not None}, base)
    if task_epochs is not None:
        study = study.with_task_epochs(task_epochs)
    run_with_progress(study, out)


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


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller problems, no torch.compile.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    only: Annotated[str, typer.Option(help="Beginnings of case names, comma-separated.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = Path("dwm-fast-bench"),
) -> None:
    """Measure this machine: eager PyTorch, torch.compile, the dense limit and ours, side by side."""
    from dwm_fast._bench.run import bench as measure

    raise typer.Exit(measure(device, quick, only, out))


def main() -> None:
    """Entry point of the dwm-fast command: errors are one line on stderr, with a traceback only under --debug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv[1:])
    try:
        code = app(arguments, prog_name="dwm-fast", standalone_mode=False)
    except typer.Abort:
        _fail("stopped; the same command goes on where it was", _INTERRUPTED)
    except _UsageError as error:
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        if not message:  # no command was given: the help is printed already
            raise SystemExit(2) from None
        _fail(f"{message}; see {context.command_path if context else 'dwm-fast'} --help", 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = str(error) or type(error).__name__
        if not isinstance(error, DwmError):
            text = f"{type(error).__name__}: {error}" + ("" if debug else " (--debug shows where)")
        _fail(text, 2 if isinstance(error, DwmError) else 1)
    if code == _INTERRUPTED:  # as newer releases of typer tell it
        _fail("stopped; the same command goes on where it was", _INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int) -> NoReturn:
    print(f"dwm-fast: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)
