"""Images for a study from any data set: a folder, torchvision by name, Hugging Face on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from dwm_fast._options import FRACTION, check_options
from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data.class_splits import FEWEST, split_by_classes
from dwm_fast.pacs.data.hugging import COLUMNS, find_files, read_hugging
from dwm_fast.pacs.data.layouts import Record, holds_pacs
from dwm_fast.pacs.data.listed import TEST, TRAIN, VALIDATION, Listed
from dwm_fast.pacs.data.load import VALIDATION as VALIDATION_NAME
from dwm_fast.pacs.data.load import DomainSet, PacsData, fingerprint
from dwm_fast.pacs.data.pixels import Progress, decode_all
from dwm_fast.pacs.data.splits import holdout_split
from dwm_fast.pacs.data.trees import read_tree
from dwm_fast.pacs.data.vision import PREFIX, read_torchvision


@dataclass(frozen=True)
class ImageOptions:
    """How the images of a data set that is not PACS become domains.

    Args:
        classes: "same": every domain has to have the same classes; "own": each has its own, and a head for them.
        split_classes: cut a set of one domain by class into domains: a number of them ("10": in order, of equal size
            or one class more), or "NAME=CLASS+CLASS,NAME=CLASS+CLASS"; None leaves it whole.
        columns: of a Hugging Face data set, "image=NAME,label=NAME,domain=NAME", those that have other names.
        holdout: fraction of each class held out for testing where the data set has no parts of its own.
    """

    classes: Literal["same", "own"] = "same"
    split_classes: str | None = None
    columns: str | None = None
    holdout: Annotated[float, FRACTION] = 0.1

    def __post_init__(self) -> None:
        check_options(self, "images.{name} is {shown}; expected {wanted}")
        self.column_names()

    def column_names(self) -> dict[str, str]:
        """`columns` by what they are for."""
        pairs = [part.partition("=") for part in (self.columns or "").split(",") if part.strip()]
        wrong = next((what for what, _, name in pairs if what.strip() not in COLUMNS or not name.strip()), None)
        if wrong is not None:
            raise InputError(f"images.columns is '{self.columns}'; expected NAME for some of image=, label=, domain=")
        return {what.strip(): name.strip() for what, _, name in pairs}


def is_other(data: str | None) -> bool:
    """Whether `data` names something else than PACS or the built-in images: torchvision, or what lies there."""
    if data is None or data.startswith(PREFIX):
        return data is not None
    path = Path(os.path.expanduser(data))
    try:
        return path.exists() and not holds_pacs(path)
    except OSError:
        return False


@dataclass(frozen=True)
class Place:
    """Where a data set lies: `data` as `--data` has it, torchvision's `root`, and a folder of lists or None."""

    data: str
    root: str | None = None
    lists: str | None = None


def load_any(
    place: Place,
    options: ImageOptions,
    image_size: int = 128,
    domains: Iterable[str] | None = None,
    validation: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PacsData:
    """Load any data set with one class an image.

    Args:
        place: where it lies.
        options: how it becomes domains.
        image_size: side of the square images in pixels; others are resized (bicubic).
        domains: names of the domains to load; all by default.
        validation: fraction of each class of the TRAINING images held out in place of the test images, in (0, 1); the
            test images are then not decoded.
        seed: chooses what is held out, by the images' names.
        progress: called as ``progress(done, total)`` while images are decoded.

    Raises:
        InputError: an unknown domain, class, column, or data set of torchvision; no domain; an impossible `image_size`.
        DataError: anything missing, incomplete or unreadable on disk; names the file.
    """
    if image_size < 1:
        raise InputError(f"image_size={image_size}: expected a positive number of pixels, such as 128")
    listed = _without_lone_part(_read(place, options))
    if options.split_classes is not None:
        listed = split_by_classes(listed, options.split_classes)
    groups = _wanted(listed, domains)
    classes = {domain: _classes_of(domain, groups[domain], listed) for domain in groups}
    if options.classes == "same" and options.split_classes is None:
        _check_same(listed, classes)
    chosen = {
        domain: _halves(domain, _Group(*groups[domain], classes[domain]), options.holdout, validation, seed)
        for domain in groups
    }
    _check_memory(sum(len(records) for records, _, _ in chosen.values()), image_size)
    pixels = decode_all([r for records, _, _ in chosen.values() for r in records], image_size, progress)
    sets: dict[str, DomainSet] = {}
    start = 0
    for domain, (records, train, test) in chosen.items():
        images = pixels[start : start + len(records)]
        start += len(records)
        labels, parts = torch.tensor([r.label for r in records]), (torch.tensor(train), torch.tensor(test))
        sets[domain] = DomainSet(images, labels, *parts, [r.name for r in records], classes[domain])
    has_parts = any(part for part in listed.parts)
    split = (
        listed.split if has_parts else f"{options.holdout:g} of each class held out for testing, by a hash of the names"
    )
    again = sum(map(_trained_on, sets.values()))
    split += f"; {again:,} of the test images are training images of their domain too" if again else ""
    name = listed.name + ("" if validation is None else VALIDATION_NAME)
    everything = tuple(k for k in listed.classes if any(k in own for own in classes.values()))
    return PacsData(name, True, sets, everything, image_size, fingerprint(sets), dict(listed.left_out), split)


def _trained_on(domain: DomainSet) -> int:
    """How many test images of a domain have the pixels of one of its training images."""

    def pixels(positions: Tensor) -> list[bytes]:
        return [hashlib.blake2b(domain.images[i].numpy().data, digest_size=16).digest() for i in positions.tolist()]

    trained = set(pixels(domain.train))
    return sum(one in trained for one in pixels(domain.test))


def _check_memory(count: int, image_size: int) -> None:
    """Raise DataError where the decoded images would be larger than the machine's memory."""
    needed = count * 3 * image_size**2
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return  # not told here
    if needed > memory > 0:
        raise DataError(
            f"{count} images of {image_size} pixels take {needed / 1e9:.1f} GB of memory, and this machine has "
            f"{memory / 1e9:.1f} GB; name fewer domains, or give a smaller --image-size"
        )


def _read(place: Place, options: ImageOptions) -> Listed:
    columns = options.column_names()
    if place.data.startswith(PREFIX):
        _refuse(place, "torchvision", columns=columns, splits=place.lists)
        return read_torchvision(place.data, place.root)
    path = Path(place.data)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; give a folder of images, a Hugging Face data set or {PREFIX}NAME"
        )
    try:
        files = find_files(path)
        if files:
            _refuse(place, "a Hugging Face data set", data_root=place.root, splits=place.lists)
            return read_hugging(path, files, columns)
        if path.is_file():
            raise DataError(f"{path}: expected a folder, a .parquet or an .arrow file; unpack archives first")
        _refuse(place, "a folder of images", columns=columns, data_root=place.root)
        return read_tree(path, None if place.lists is None else Path(place.lists))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check name and rights") from error


def _without_lone_part(listed: Listed) -> Listed:
    """A set whose images are all in one part has no parts: on the hub a set without a split is called "train"."""
    return replace(listed, parts=[""] * len(listed.parts)) if len(set(listed.parts)) == 1 else listed


def _refuse(place: Place, kind: str, **given: object) -> None:
    """Raise InputError for an option that this kind of data set does not read."""
    for name, value in given.items():
        if value:
            raise InputError(f"{name} does not go with data={place.data}, which is {kind}; leave it out")


def _wanted(listed: Listed, domains: Iterable[str] | None) -> dict[str, tuple[list[Record], list[str]]]:
    """Domain -> its records and their parts, those asked for."""
    groups: dict[str, tuple[list[Record], list[str]]] = {}
    for record, part in zip(listed.records, listed.parts, strict=True):
        records, parts = groups.setdefault(record.domain, ([], []))
        records.append(record)
        parts.append(part)
    if not groups:
        raise DataError(f"{listed.name}: no image is listed; expected some of each class")
    wanted = list(groups) if domains is None else list(domains)
    if not wanted:
        raise InputError(f"domains is empty: {listed.name} has {', '.join(groups)}; expected some of them, or None")
    unknown = next((domain for domain in wanted if domain not in groups), None)
    if unknown is not None:
        raise InputError(f"unknown domain '{unknown}': {listed.name} has {', '.join(groups)}")
    return {domain: groups[domain] for domain in groups if domain in wanted}


def _classes_of(domain: str, group: tuple[list[Record], list[str]], listed: Listed) -> tuple[str, ...]:
    used = sorted({r.label for r in group[0]})
    if len(used) < FEWEST:
        raise DataError(f"{group[0][0].origin}: domain '{domain}' has one class alone; expected at least {FEWEST}")
    return tuple(listed.classes[label] for label in used)


def _check_same(listed: Listed, classes: Mapping[str, tuple[str, ...]]) -> None:
    first = next(iter(classes))
    for domain, own in classes.items():
        missing, more = set(classes[first]) - set(own), set(own) - set(classes[first])
        if missing or more:
            which = f"'{domain}' lacks {_some(missing)}" if missing else f"'{first}' lacks {_some(more)}"
            raise DataError(
                f"{listed.name}: domains '{first}' and '{domain}' have different classes ({which}); mend the "
                "data, or say that every domain has its own: --classes own"
            )


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


@dataclass(frozen=True)
class _Group:
    """The records of one domain, their parts, and its classes."""

    records: list[Record]
    parts: list[str]
    classes: tuple[str, ...]


def _halves(
    domain: str, group: _Group, holdout: float, validation: float | None, seed: int
) -> tuple[list[Record], list[int], list[int]]:
    """The records of a domain that are decoded, labels its own, and the positions of those that train and test."""
    number = {label: i for i, label in enumerate(sorted({r.label for r in group.records}))}
    records = [replace(r, label=number[r.label]) for r in group.records]
    train, test = _own_parts(domain, records, group.parts)
    if not train:
        train, test = holdout_split(records, holdout, seed, group.classes)
    for part, positions in (("training", train), ("test", test)):
        empty = set(number.values()) - {records[i].label for i in positions}
        if empty:
            kind = group.classes[min(empty)]
            raise DataError(f"{records[0].origin}: domain '{domain}' has no {part} image of class {kind}; add some")
    if validation is not None:
        records = [records[i] for i in train]
        return records, *holdout_split(records, validation, seed, group.classes)
    kept = sorted([*train, *test])
    place = {old: new for new, old in enumerate(kept)}
    return [records[i] for i in kept], [place[i] for i in train], [place[i] for i in test]


def _own_parts(domain: str, records: Sequence[Record], parts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Positions of a domain's own train and test images, its validation part for want of these; none without parts."""
    of = {part: [i for i, own in enumerate(parts) if own == part] for part in (TRAIN, TEST, VALIDATION)}
    test = of[TEST] or of[VALIDATION]
    if not of[TRAIN] and not test:
        return [], []
    if not of[TRAIN] or not test or "" in parts:
        have = ", ".join(sorted(set(parts) - {""})) or "none"
        odd = f" and images in no part, such as {records[parts.index('')].origin}" if "" in parts else ""
        raise DataError(
            f"{records[0].origin}: domain '{domain}' has the parts {have}{odd}; expected train and test, or no parts "
            "at all"
        )
    return of[TRAIN], test
