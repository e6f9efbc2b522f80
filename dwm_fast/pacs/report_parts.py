"""What the HTML reports are made of: tables, numbers, figures as data URIs, and the page around them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dwm_fast._files import write_atomic
from dwm_fast.errors import DataError
from dwm_fast.pacs.figure_style import colour
from dwm_fast.pacs.report_style import CSS, NATURE
from dwm_fast.pacs.table import MISSING, Stat, number


def write_page(title: str, body: Iterable[str], folder: Path | str) -> Path:
    """Write `report.html` into `folder`, one file that needs no other; returns its path.

    Raises:
        DataError: it cannot be written.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = Path(folder) / "report.html"
    write_atomic(path, page)
    return path


def header(heading: str, data: Mapping[str, Any], facts: Iterable[str]) -> str:
    """The page's heading, the data set's name as a badge, and facts beside it."""
    kind = "real" if data["real"] else "standin"
    return (
        f"<header><h1>{escape(heading)}</h1>"
        f'<p><span class="badge {kind}">{escape(data["name"])}</span> {escape(", ".join(facts))}</p></header>'
    )


def section(title: str, content: str) -> str:
    """A section under its heading; nothing where there is no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def told(sentences: Sequence[str]) -> str:
    """The finding: the first two sentences large, the others as a list."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences[2:])
    return f'<p class="lead">{escape(" ".join(sentences[:2]))}</p>' + (f"<ul>{items}</ul>" if items else "")


def table(header: Iterable[str], body: Iterable[Iterable[str]], caption: str = "") -> str:
    """A table from cells that are HTML already; the first column is the row's header."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for name, *cells in body:
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def swatch(method: str) -> str:
    """A dot in the method's colour."""
    return f'<i class="swatch" style="background:{colour(method)}"></i>'


def html_number(value: Stat, signed: bool = False) -> str:
    """The mean, with a true minus sign, and the spread small beside it."""
    mean, _, spread = number(value, signed).partition(" ± ")
    return mean.replace("-", "−") + (f' <span class="spread">± {spread}</span>' if spread else "")


def one_each(figures: Iterable[Path | str]) -> list[Path]:
    """One file per figure, SVG where there is one, in the order given."""
    chosen: dict[str, Path] = {}
    for path in map(Path, figures):
        if path.stem not in chosen or path.suffix == ".svg":
            chosen[path.stem] = path
    return list(chosen.values())


def figure(path: Path, captions: Mapping[str, str]) -> str:
    """An image file as part of the page, with the caption of its name.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read figure {path}: {error.strerror}; draw the figures again") from error
    kind = "image/svg+xml" if path.suffix == ".svg" else "image/png"
    caption = escape(captions.get(path.stem, path.stem))
    image = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return f'<figure><img alt="{caption}" src="{image}"><figcaption>{caption}</figcaption></figure>'


def data_section(data: Mapping[str, Any]) -> str:
    """What the images are, and how many."""
    counts = [
        [escape(domain), str(data["counts"][domain]["train"]), str(data["counts"][domain]["test"])]
        for domain in data["domains"]
        if domain in data["counts"]
    ]
    classes = f"Classes: {', '.join(map(str, data['classes']))}."
    text = f"<p><b>{escape(data['name'])}</b>. {escape(NATURE[bool(data['real'])])} {escape(classes)}</p>"
    return text + table(["domain", "training images", "test images"], counts)


def reproduce(results: Mapping[str, Any], command: str) -> str:
    """The command, versions and every option."""
    versions = definitions(((name, as_text(value)) for name, value in results["versions"].items()), "settings")
    config = definitions(((name, as_text(value)) for name, value in flat(results["config"])), "settings")
    return (
        f"<pre>{escape(command)}</pre>"
        "<p>Same seeds, versions and device give the same numbers; <code>results.json</code> has them.</p>"
        f"<h3>Versions</h3>{versions}<details><summary>Every option</summary>{config}</details>"
    )


def definitions(pairs: Iterable[tuple[str, str]], kind: str) -> str:
    """A list of terms and what they mean; `kind` is its class in the style sheet."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f'<dl class="{kind}">{lines}</dl>'


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested options as (dotted name, value)."""
    pairs: list[tuple[str, Any]] = []
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        pairs += flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return pairs


def as_text(value: Any) -> str:
    """A plain value as people read it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value)) or MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)
