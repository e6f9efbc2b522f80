"""What a reader of any data set gives: one record an image, its class by number, and the part of the set it is in."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dwm_fast.errors import DataError
from dwm_fast.pacs.data.layouts import Record

TRAIN, TEST, VALIDATION = "train", "test", "validation"
_LONGEST = 100
"""Characters of a domain's name: mask files are called like it."""
_PARTS = {"train": TRAIN, "test": TEST, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}


@dataclass(frozen=True)
class Listed:
    """A data set before decoding.

    Attributes:
        name: of the data set.
        classes: names that the records' labels count.
        records: one an image.
        parts: of each record, "train", "test" or "validation"; "" where the data set has no parts.
        split: in words, where the parts come from.
        left_out: counts by reason what lies there and was not taken.
    """

    name: str
    classes: tuple[str, ...]
    records: list[Record]
    parts: list[str]
    split: str
    left_out: Counter[str] = field(default_factory=Counter)


def part_of(name: str) -> str | None:
    """The part that a folder or file called `name` holds ("val-00000-of-00001" is "validation"), or None."""
    first = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return _PARTS.get(first)


def domain_name(name: str) -> str:
    """A domain's name as the command line, the files of a run folder and banks have it: "Real World" is "real-world".

    Letters lose their accents; one that is none of a to z even then is written as its code point, "u65e5".
    Raises DataError for one that has no letter and no digit, or is longer than 100 characters then.
    """
    letters = (c for c in unicodedata.normalize("NFKD", name.lower()) if not unicodedata.combining(c))
    spelt = (f"u{ord(c):04x}" if c.isalnum() and not c.isascii() else c for c in letters)
    short = re.sub("[^a-z0-9]+", "-", "".join(spelt)).strip("-")
    if not short or len(short) > _LONGEST:
        what = "no letter or digit in the name" if not short else f"more than {_LONGEST} characters"
        raise DataError(f"domain {name[:_LONGEST]!r}: {what}; rename it")
    return short


def naturally(names: Iterable[str]) -> list[str]:
    """The names in order, numbers within them by value: "class 2" before "class 10"."""

    def key(name: str) -> tuple[list[tuple[str, int]], str]:
        pieces = re.findall(r"(\D*)(\d*)", name.lower())
        return [(text, int(digits or -1)) for text, digits in pieces], name

    return sorted(names, key=key)


def gathered(
    name: str,
    found: Sequence[tuple[str, str, str, Record]],
    classes: Sequence[str],
    split: str,
    domains: Sequence[str] | None = None,
) -> Listed:
    """A `Listed` of (domain, class, part, record whose label is not known yet), sorted by the records' names.

    The domains stand in the order of `domains`, by default that of their names.
    """
    order = naturally({domain for domain, *_ in found}) if domains is None else list(domains)
    number = {kind: i for i, kind in enumerate(classes)}
    chosen = sorted(found, key=lambda one: (order.index(one[0]), one[3].name))
    records = [
        Record(domain, number[kind], r.name, r.source, r.origin, r.has_file_name) for domain, kind, _, r in chosen
    ]
    return Listed(name, tuple(classes), records, [part for _, _, part, _ in chosen], split)
