"""The report as one HTML file that needs no other: tables, numbers and figures put into the templates beside this file.

Everything is escaped by the templates; Python hands over plain text and numbers and never HTML.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dwm_fast.pacs.page.figure_style import colour
from dwm_fast.pacs.tables import MISSING, Stat, number
from dwm_fast.pacs.words import classes_of, said_of


@dataclass(frozen=True)
class Cell:
    """A cell of more than plain text: smaller lines below it, a dot in the colour of a method before it."""

    text: Any
    small: tuple[Any, ...] = ()
    strong: bool = False
    signed: bool = False
    method: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells (text, `Stat` or `Cell`) under column names; the first cell of a row is its header.

    `note` is said below the table.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    note: str = ""

    def lean(self) -> Table:
        """The table without the columns in which every row says the same; the note says it once instead."""
        if len(self.rows) < 2:
            return self
        alike = [i for i in range(1, len(self.names)) if all(row[i] == self.rows[0][i] for row in self.rows)]
        alike = [i for i in alike if isinstance(self.rows[0][i], str)]
        told = [f"{self.names[i]} {self.rows[0][i]}" for i in alike if self.rows[0][i] not in ("", MISSING)]
        kept = [i for i in range(len(self.names)) if i not in alike]
        note = f"In every row: {', '.join(told)}. {self.note}".strip() if told else self.note
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, names=[self.names[i] for i in kept], rows=rows, note=note)


def render(template: str, results: Mapping[str, Any], drawn: Mapping[str, bytes], command: str, **values: Any) -> str:
    """The page of a study.

    Args:
        template: its name in the folder `templates`.
        results: the study's results.
        drawn: file name -> content of the figures; the last of those that differ in their ending alone is shown.
        command: what to type to get these results again.
        values: what else the template shows.
    """
    chosen = {name.rpartition(".")[0]: name for name in drawn}
    figures = {stem: _data_uri(name, drawn[name]) for stem, name in chosen.items()}
    data = results["data"]
    counts = Table(
        ["domain", "classes", "training images", "test images"],
        [
            [
                name,
                str(len(classes_of(results, name))),
                *(str(data["counts"][name][part]) for part in ("train", "test")),
            ]
            for name in data["domains"]
            if name in data["counts"]
        ],
    )
    known = {"results": results, "data": data, "figures": figures, "command": command, "counts": counts}
    known["about"] = said_of(data)
    return _templates().get_template(template).render({**known, **values})


@functools.cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("dwm_fast.pacs.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"shown": _shown, "colour": colour, "as_text": as_text, "flat": flat}
    made.tests["cell"] = lambda value: isinstance(value, Cell)
    return made


def _shown(value: Any, signed: bool = False) -> Any:
    """Text as it is; a `Stat` as its mean with a true minus sign, and the spread small beside it."""
    if not isinstance(value, Stat):
        return value
    mean, _, spread = number(value, signed).partition(" ± ")
    beside = Markup(' <span class="spread">± {}</span>').format(spread) if spread else ""
    return Markup("{}{}").format(mean.replace("-", "−"), beside)


def _data_uri(name: str, content: bytes) -> str:
    kind = "image/svg+xml" if name.endswith(".svg") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


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


def counted(number: int, what: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{number} {what}{'s' * (number != 1)}"


def facts(results: Mapping[str, Any], *first: str) -> list[str]:
    """What stands beside the data set's name in the heading."""
    data = results["data"]
    classes = f"{len(data['classes'])} classes at {data['image_size']} px"
    return [*first, classes, f"on {results['versions'].get('device', 'an unknown device')}"]
