"""Which images train and which test: the official PACS lists, or an own stratified hold-out."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data.layouts import CLASSES, Record, find_domain

_SUFFIX = "_kfold.txt"
_NUMBER = re.compile("[0-9]{1,3}")


def holdout_split(
    records: Sequence[Record], fraction: float, seed: int, classes: Sequence[str] = CLASSES
) -> tuple[list[int], list[int]]:
    """Stratified split of one domain's records; returns positions (train, test), both ascending.

    `classes` are the names that the labels count.

    Of each class, round(fraction * n) images but at least one and at most n - 1 are held out: those with the
    smallest SHA-256 of ``"{seed}:{name}"``. So the choice depends on seed and names alone, not on order,
    platform or layout. Raises InputError unless 0 < fraction < 1, DataError where a class has fewer than two
    images.
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"a hold-out of {fraction}: expected a fraction of the images between 0 and 1, such as 0.1")
    held: set[int] = set()
    by_label: dict[int, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        by_label[record.label].append(i)
    for label, name in enumerate(classes):
        members = by_label[label]
        if len(members) < 2:
            where = records[members[0]].origin if members else records[0].domain
            raise DataError(f"{where}: only {len(members)} image of class {name}; a hold-out needs at least two")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        members.sort(
            key=lambda i: hashlib.sha256(f"{seed}:{records[i].name}".encode(errors="surrogateescape")).digest()
        )
        held.update(members[:count])
    return [i for i in range(len(records)) if i not in held], sorted(held)


def official_split(folder: Path, domain: str, records: Sequence[Record]) -> tuple[list[int], list[int]]:
    """Split of one domain by its official lists: train = train list, test = crossval list, in list order.

    The official ``test`` list holds every image, those of the train list included, and is never read.
    Lines are ``<domain>/<class>/<file> <label 1..7>``. Raises DataError, naming list and line, for a missing
    list, a line of another form, a label of another base, an image that is not among `records`, or one named
    twice.
    """
    lists = _find_lists(folder, domain, ("train", "crossval"))
    position = _positions(folder, records)
    seen: dict[int, str] = {}
    halves = tuple(_read_list(lists[kind], domain, records, position, seen) for kind in ("train", "crossval"))
    return halves[0], halves[1]


def train_list(folder: Path, domain: str, records: Sequence[Record]) -> list[int]:
    """Positions of the official train list alone; the crossval list is never read. Errors as `official_split`."""
    file = _find_lists(folder, domain, ("train",))["train"]
    return _read_list(file, domain, records, _positions(folder, records), {})


def _positions(folder: Path, records: Sequence[Record]) -> dict[str, int]:
    """Position of every record by the name that lists give it."""
    nameless = next((r for r in records if not r.has_file_name), None)
    if nameless is not None:
        raise DataError(
            f"{nameless.origin}: no file name in image.path, so the lists of {folder} cannot be matched; "
            "leave the lists out (drop --splits) and use the own hold-out"
        )
    position: dict[str, int] = {}
    for i, record in enumerate(records):
        if position.setdefault(record.name, i) != i:
            other = records[position[record.name]].origin
            raise DataError(f"{record.origin}: same name as {other}; the lists cannot tell them apart, drop --splits")
    return position


def _find_lists(folder: Path, domain: str, kinds: Sequence[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected <domain>_train{_SUFFIX} and <domain>_crossval{_SUFFIX}")
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        owner, _, kind = file.name[: -len(_SUFFIX)].rpartition("_")
        if find_domain(owner) == domain:
            if kind in found:
                raise DataError(
                    f"{file}: a second {kind} list of domain {domain!r} beside {found[kind].name}; keep one"
                )
            found[kind] = file
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        trap = ""
        if "test" in found:
            trap = f" ({found['test'].name} contains the training images, so it is no hold-out and is not used)"
        raise DataError(
            f"{folder}: no {' and no '.join(missing)} list of domain {domain!r}{trap}; add it or drop --splits"
        )
    return found


def _read_list(
    file: Path, domain: str, records: Sequence[Record], position: dict[str, int], seen: dict[int, str]
) -> list[int]:
    chosen: list[int] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028 and its like
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable list ({error}); fetch it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        index = position.get(_line_name(where, line, domain))
        if index is None:
            raise DataError(
                f"{where}: names {_parts(line)[0]!r}, which is not among the images of domain {domain!r}; "
                "give the lists of this copy, or drop --splits and use the own hold-out"
            )
        if index in seen:
            raise DataError(f"{where}: {records[index].name} was already named in {seen[index]}")
        seen[index] = where
        chosen.append(index)
    absent = [c for label, c in enumerate(CLASSES) if all(records[i].label != label for i in chosen)]
    if absent:
        raise DataError(f"{file}: names no image of {', '.join(absent)}; expected all of {', '.join(CLASSES)}")
    return chosen


def _parts(line: str) -> tuple[str, str]:
    """Path and label of a line: what stands before and after its last white space."""
    path, *label = line.strip().rsplit(None, 1)
    return path, label[0] if label else ""


def _line_name(where: str, line: str, domain: str) -> str:
    """Record name that a list line speaks of, after checking its form, class and label."""
    path, label = _parts(line)
    parts = path.replace("\\", "/").split("/")
    if (
        len(parts) < 3
        or parts[-2].lower() not in CLASSES
        or find_domain(parts[-3]) is None
        or not _NUMBER.fullmatch(label)
    ):
        raise DataError(f"{where}: {line.strip()!r}; expected '<domain>/<class>/<file> <label 1 to 7>'")
    if find_domain(parts[-3]) != domain:
        raise DataError(f"{where}: names an image of {parts[-3]} in a list of domain {domain!r}")
    name = parts[-2].lower()
    if CLASSES.index(name) + 1 != int(label):
        base = "; the labels seem to count from 0" if CLASSES.index(name) == int(label) else ""
        raise DataError(f"{where}: label {label} for class {name}, expected {CLASSES.index(name) + 1} (1 to 7){base}")
    return f"{'art_painting' if domain == 'art' else domain}/{name}/{parts[-1]}"
