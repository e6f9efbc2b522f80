"""What the tables of both wings are made of: a mean with its spread, numbers as text, Markdown, CSV, the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"


@dataclass(frozen=True)
class Stat:
    """A mean over runs, and the standard deviation (n - 1) over seeds.

    `mean` is None where a run has no value, `spread` where there is nothing that it could be taken over.
    """

    mean: float | None
    spread: float | None = None

    @property
    def rank(self) -> float:
        """The mean as a sort key: what is missing comes last."""
        return float("-inf") if self.mean is None else self.mean


def over_seeds(values: Sequence[float]) -> Stat:
    """Mean, and standard deviation (n - 1) from two values on."""
    return Stat(fmean(values), stdev(values) if len(values) > 1 else None)


def number(value: Stat, signed: bool = False, digits: int = 3) -> str:
    """'0.123', '+0.123 ± 0.010' or a dash where there is nothing; a value that rounds to zero has no sign."""
    if value.mean is None:
        return MISSING
    text = f"{value.mean:+.{digits}f}" if signed else f"{value.mean:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text if value.spread is None else f"{text} ± {value.spread:.{digits}f}"


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *body]
    escaped = ([field.replace("|", "\\|") for field in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Lines of a CSV file, the header first."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def terminal_table(title: str, caption: str | None, columns: Sequence[str]) -> Table:
    """An empty table for the terminal: names on the left in the first column, numbers on the right in the others."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.caption = None if caption is None else Text(caption)
    for column in columns:
        table.add_column(Text(column), no_wrap=True, justify="right" if table.columns else "left")
    return table
