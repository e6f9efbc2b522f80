"""The command line: dwm-fast pacs, language, doctor, build, bench and masks."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import dwm_fast
from dwm_fast._screen import accept_any_text, plain
from dwm_fast.doctor import diagnose
from dwm_fast.errors import DwmError
from dwm_fast.masks_cli import masks_app
from dwm_fast.pacs_cli import pacs_app

_INTERRUPTED = 130

app = typer.Typer(
    help="Learn, store and serve one-bit weight masks over a shared backbone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pacs_app, name="pacs")
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


@app.command()
def language(
    out: Annotated[Path, typer.Option(help="Folder of the table, the figure and results.json.")] = Path(
        "runs/language"
    ),
    steps: Annotated[int | None, typer.Option(help="Training steps of the network.")] = None,
    mask_steps: Annotated[int | None, typer.Option(help="Training steps of a learned mask.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything; with --formats the first of three.")] = 0,
    formats: Annotated[
        bool, typer.Option("--formats", help="Compare formats of logits and moments instead, over three seeds.")
    ] = False,
) -> None:
    """Prune a small language model to 50 % and 2:4: magnitude, Wanda, LEAP, MaskLLM, perplexity side by side."""
    from dwm_fast.language.formats import FormatStudy, compare
    from dwm_fast.language.study import LanguageStudy, run

    sizes = {name: value for name, value in (("steps", steps), ("mask_steps", mask_steps)) if value is not None}
    study = LanguageStudy(**sizes, seed=seed)
    if formats:
        compare(FormatStudy(study), out, typer.echo)
    else:
        run(study, out, typer.echo)


def main() -> None:
    """Entry point of the dwm-fast command: errors are one line on stderr, with a traceback only under --debug."""
    accept_any_text()
    arguments = [_at_home(argument) for argument in sys.argv[1:] if argument != "--debug"]
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


def _at_home(argument: str) -> str:
    """--out=~/x with the home folder in place of ~: shells replace it at the beginning of a word alone."""
    option, equals, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and option.startswith("--") else argument


def _fail(text: str, code: int) -> NoReturn:
    print(f"dwm-fast: {plain(' '.join(text.split()))}", file=sys.stderr)
    raise SystemExit(code)
