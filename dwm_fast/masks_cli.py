"""dwm-fast masks: what is in a mask file, how domains differ and overlap, and other programs' forms."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dwm_fast import ops
from dwm_fast._screen import Screen
from dwm_fast.bank import (
    DomainMasks,
    MaskFile,
    make_domain,
    read_foreign,
    read_rows,
    read_ternary,
    write_foreign,
    write_mask_file,
)
from dwm_fast.bank.folder import check_folder, load_domain, read_domain
from dwm_fast.bank.header import is_mask_file
from dwm_fast.bank.sets import overlap as count_overlap
from dwm_fast.errors import InputError, MaskFileError

masks_app = typer.Typer(help="Look into mask files, compare domains, convert them.", no_args_is_help=True)

FileArgument = Annotated[Path, typer.Argument(help="A mask file, <domain>.safetensors.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print data instead of tables.")]


class Coding(StrEnum):
    """How masks are stored."""

    raw = "raw"
    coded = "coded"


class Form(StrEnum):
    """What other programs read."""

    bool = "bool"
    uint8 = "uint8"
    float32 = "float32"
    packbits = "packbits"


class Measure(StrEnum):
    """What an overlap counts."""

    jaccard = "jaccard"
    both = "and"
    either = "or"
    differ = "xor"


class BitOrder(StrEnum):
    """Which bit of a byte of packbits comes first."""

    big = "big"
    little = "little"


def _print(*things: Table | str) -> None:
    console = Screen()
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


@masks_app.command()
def inspect(file: FileArgument, as_json: JsonOption = False) -> None:
    """Show what a mask file holds: domain, method, sizes, and how much of each tensor is kept."""
    opened = MaskFile(file)
    info = opened.info
    sizes = {"file": opened.nbytes, "header": opened.header_nbytes, "masks": opened.payload_nbytes}
    tensors: list[dict[str, Any]] = [
        {"name": name, "shape": list(shape), "weights": n, "kept": ones, "coding": opened.stored[name].plan.coding}
        for name, shape, n, ones in zip(
            info.layout.names, info.layout.shapes, info.layout.numels, info.ones, strict=True
        )
    ]
    about = asdict(info)
    about.pop("layout")
    about |= {"coding": opened.coding, "reference": opened.reference, "bytes": sizes, "tensors": tensors}
    about["extras"] = list(opened.extra_names)
    if as_json:
        typer.echo(json.dumps(about, indent=1))
        return
    kept, weights = sum(info.ones), sum(info.layout.numels)
    facts = Table(title=str(file), show_header=False)
    for label, value in {
        "domain": info.domain,
        "method": f"{info.method or '-'} ({info.form})",
        "classes": f"{len(info.classes)}: {', '.join(info.classes)}" if info.classes else "-",
        "kept": f"{kept:,} of {weights:,} weights ({_percent(kept, weights)})",
        "stored": f"{opened.coding}, {8 * opened.payload_nbytes / max(weights, 1):.4f} bits a weight",
        "bytes": ", ".join(f"{what} {size:,}" for what, size in sizes.items()),
        "reference": opened.reference[0] if opened.reference else "-",
        "backbone": info.fingerprint or "unknown",
        "options": json.dumps(dict(info.options)),
        "own tensors": str(len(opened.extra_names)),
    }.items():
        facts.add_row(label, value)
    table = Table("mask", "shape", "weights", "kept", "stored")
    for row in tensors:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, f"{row['weights']:,}", _percent(row["kept"], row["weights"]), row["coding"])
    _print(facts, table)


@masks_app.command()
def diff(a: FileArgument, b: FileArgument, as_json: JsonOption = False) -> None:
    """Compare two domains weight by weight. Exit status 0: equal masks, 1: they differ."""
    first, second = read_domain(a), read_domain(b)
    mine, theirs = first.masks(), second.masks()
    rows: list[dict[str, Any]] = []
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        x, y = mine.get(name), theirs.get(name)
        if x is None or y is None or x.shape != y.shape:
            why = "only in B" if x is None else "only in A" if y is None else "other shapes"
            rows.append({"name": name, "note": why})
        else:
            rows.append({"name": name, **_compare(x, y)})
    total = {key: sum(row.get(key, 0) for row in rows) for key in ("both", "only_a", "only_b", "neither")}
    about = {
        key: [getattr(first.info, key), getattr(second.info, key)]
        for key in ("domain", "form", "method", "classes", "options", "fingerprint")
        if getattr(first.info, key) != getattr(second.info, key)
    }
    equal = not any(row.get("note") or row["only_a"] or row["only_b"] for row in rows)
    if as_json:
        typer.echo(json.dumps({"equal": equal, "total": total, "tensors": rows, "description": about}, indent=1))
        raise typer.Exit(0 if equal else 1)
    table = Table("mask", "both keep", "only A", "only B", "Jaccard", title=f"A = {a}\nB = {b}")
    for row in [*rows, {"name": "total", **total}]:
        if "note" in row:
            table.add_row(row["name"], row["note"])
        else:
            counts = [f"{row[key]:,}" for key in ("both", "only_a", "only_b")]
            table.add_row(row["name"], *counts, f"{_jaccard(row):.4f}")
    _print(table)
    for key, (one, other) in about.items():
        _print(f"{key}: A {one!r}, B {other!r}")
    raise typer.Exit(0 if equal else 1)


def _compare(x: Tensor, y: Tensor) -> dict[str, int]:
    both, either = ops.overlap(ops.pack([x]), ops.pack([y]), [x.numel()])[0].tolist()
    ones = int(x.sum())
    return {"both": both, "only_a": ones - both, "only_b": either - ones, "neither": x.numel() - either}


def _jaccard(row: dict[str, Any]) -> float:
    either = row["both"] + row["only_a"] + row["only_b"]
    return float(row["both"] / either) if either else 1.0


@masks_app.command()
def overlap(
    folder: Annotated[Path, typer.Argument(help="A folder of domains.", show_default=False)],
    measure: Annotated[Measure, typer.Option(help="Jaccard index, or weights kept by both, either, one.")] = (
        Measure.jaccard
    ),
    figure: Annotated[Path | None, typer.Option(help="Draw the heat map to this file (.png, .svg).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much the domains of a folder have in common, as a table that is its own heat map."""
    names = sorted(read_rows(folder))
    if not names:
        raise MaskFileError(f"{folder}: holds no domains")
    matrix = _matrix([load_domain(folder, name) for name in names], measure.value)
    if figure is not None:
        _draw(matrix, names, measure.value, figure)
    if as_json:
        typer.echo(json.dumps({"domains": names, "measure": measure.value, "matrix": matrix.tolist()}, indent=1))
        return
    table = Table("", *names, title=f"{folder}: {measure.value}")
    top = max(float(matrix.max()), 1e-12)
    for name, row in zip(names, matrix.tolist(), strict=True):
        cells = [Text(f"{v:.4f}" if isinstance(v, float) else f"{v:,}", style=_heat(v / top)) for v in row]
        table.add_row(name, *cells)
    _print(table)


def _matrix(domains: list[DomainMasks], measure: str) -> Tensor:
    shapes: dict[str, tuple[int, ...]] = {}
    for domain in domains:
        for name, shape in zip(domain.info.layout.names, domain.info.layout.shapes, strict=True):
            if shapes.setdefault(name, shape) != shape:
                raise InputError(f"'{name}' has different shapes in these domains; they belong to other backbones")
    return count_overlap(domains, {n: torch.empty(s, device="meta") for n, s in shapes.items()}, measure)


def _heat(share: float) -> str:
    """Background from dark to bright, and a text colour that can be read on it."""
    level = round(235 + 20 * min(max(share, 0.0), 1.0))
    return f"{'black' if level > 245 else 'white'} on color({level})"


def _draw(matrix: Tensor, names: list[str], measure: str, path: Path) -> None:
    from matplotlib.figure import Figure

    size = 2 + 0.5 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix.double().numpy(), cmap="viridis", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"Overlap of keep masks: {measure}")
    figure.colorbar(image)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw to {path}: {error}") from error


@masks_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A mask file, or masks as .safetensors or .npz.")],
    target: Annotated[Path, typer.Argument(help="The mask file to write.")],
    coding: Annotated[Coding, typer.Option(help="One bit per weight, or entropy-coded.")] = Coding.raw,
    domain: Annotated[str | None, typer.Option(help="Name of the domain (default: the file's).")] = None,
    reference: Annotated[Path | None, typer.Option(help="Store against this domain's masks (coded only).")] = None,
    bit_order: Annotated[BitOrder, typer.Option(help="Of np.packbits in an .npz.")] = BitOrder.big,
    ternary: Annotated[bool, typer.Option("--ternary", help="Masks of -1, 0 and 1, as Piggyback's code has.")] = False,
) -> None:
    """Write masks as a mask file: change the coding, or bring in another program's masks."""
    if is_mask_file(source):
        record = read_domain(source)
        if domain is not None and domain != record.info.domain:
            record = _renamed(record, domain)
    elif ternary:
        keep, signs = read_ternary(source)
        record = make_domain(domain or source.stem, keep, form="ternary", values=signs, method="imported")
    else:
        record = make_domain(domain or source.stem, read_foreign(source, bit_order.value), method="imported")
    if not record.info.ones:
        raise MaskFileError(f"{source}: holds no masks")
    base = None if reference is None else read_domain(reference)
    write_mask_file(target, record, coding.value, base)
    written = MaskFile(target)
    _print(f"{target}: {written.coding}, {written.nbytes:,} bytes, {record.info.fraction_kept:.2%} kept")


def _renamed(record: DomainMasks, domain: str) -> DomainMasks:
    info = record.info
    return make_domain(
        domain,
        record.masks(),
        form=info.form,
        method=info.method,
        classes=info.classes,
        options=info.options,
        state=record.state,
        values=record.values,
        fingerprint=info.fingerprint,
    )


@masks_app.command()
def export(
    source: FileArgument,
    target: Annotated[Path, typer.Argument(help="Where to, .safetensors or .npz.")],
    form: Annotated[Form, typer.Option(help="Element type, or np.packbits arrays with shapes (.npz).")] = Form.bool,
) -> None:
    """Write a domain's masks for other programs."""
    masks = read_domain(source).masks()
    write_foreign(target, masks, form.value)
    _print(f"{target}: {len(masks)} masks, {form.value}, {target.stat().st_size:,} bytes")


@masks_app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(help="Mask files, or folders of domains.", show_default=False)],
) -> None:
    """Read everything and compare every checksum. Exit status 1 when something is wrong."""
    failed = False
    for path in paths:
        if path.is_dir():
            wrong = check_folder(path)
            for name, reason in wrong.items():
                _print(f"WRONG {path / name}: {reason}")
            if not wrong:
                _print(f"ok    {path}: {len(read_rows(path))} domains")
            failed |= bool(wrong)
            continue
        try:
            record = read_domain(path)
            _print(f"ok    {path}: '{record.info.domain}', {len(record.info.ones)} masks")
        except MaskFileError as error:
            _print(f"WRONG {error}")
            failed = True
    raise typer.Exit(1 if failed else 0)
