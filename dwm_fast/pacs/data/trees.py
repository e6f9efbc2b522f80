"""Any folder of images: domain/class/image or class/image, in parts (train/, test/) or with lists beside it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dwm_fast.errors import DataError
from dwm_fast.pacs.data.layouts import IMAGE_SUFFIXES, Record
from dwm_fast.pacs.data.listed import TEST, TRAIN, Listed, domain_name, gathered, naturally, part_of

Found = tuple[str, str, str, Record]
"""Domain, class, part, and the image."""

_LISTS = {TRAIN: "_train.txt", TEST: "_test.txt"}
_WANTED = "looked for <domain>/<class>/<image> or <class>/<image>, inside train/ and test/ or without them"


def read_tree(path: Path, lists: Path | None = None) -> Listed:
    """List the images of a folder.

    Args:
        path: ``<domain>/<class>/<image>``, or ``<class>/<image>``, a single domain that is called like the folder. Each
            may lie in ``train/`` and ``test/`` (or ``val/``), above or below the domains.
        lists: folder of ``<domain>_train.txt`` and ``<domain>_test.txt`` with lines
            ``<domain>/<class>/<image> <number>``, as DomainNet has them; by default `path`, where it holds any.

    Raises:
        DataError: no images, a class without any, two folders of one domain, or lists that do not fit the images.
    """
    found: list[Found] = []
    left_out: Counter[str] = Counter()
    for part, folder in _parts_of(path):
        found += _read_part(path, part, folder, left_out)
    _check_domains(path, found)
    where = path if lists is None else lists
    if lists is not None or any(path.glob(f"*{_LISTS[TRAIN]}")):
        found, classes = _by_lists(where, found, left_out)
        split = f"the lists of {where.name}"
    else:
        classes = naturally({kind for _, kind, _, _ in found})
        split = "the folder's own train and test parts"
    listed = gathered(path.resolve().name, found, classes, split)
    listed.left_out.update(left_out)
    return listed


def _read_part(path: Path, part: str, folder: Path, left_out: Counter[str]) -> Iterator[Found]:
    """The images of a part (train, test) of a folder, or of a folder without parts."""
    children = _folders(folder, left_out)
    flat = [child for child in children if _has_images(child)]
    deep = [child for child in children if any(map(_below, _folders(child)))]
    if not flat and not deep:
        raise DataError(f"{folder}: no images found; {_WANTED}")
    if flat and deep:
        raise DataError(f"{path}: images directly in {flat[0].name}/ and in folders of {deep[0].name}/; keep one depth")
    if flat:
        yield from _classes(domain_name(path.resolve().name), part, children, left_out)
        return
    for child in children:
        inner = _parts_of(child)
        if part and inner[0][0]:
            raise DataError(f"{child}: parts inside the part {folder.name}/; keep one of the two levels")
        for own, below in inner:
            yield from _classes(domain_name(child.name), part or own, _folders(below, left_out), left_out)


def _parts_of(folder: Path) -> list[tuple[str, Path]]:
    """(part, folder of it) where every folder inside is called like one, else the folder itself with no part."""
    inside = _folders(folder)
    parts = [part_of(child.name) if re.fullmatch("[a-zA-Z]+", child.name) else None for child in inside]
    if not inside or TRAIN not in parts or None in parts:
        return [("", folder)]
    return [(part, child) for part, child in zip(parts, inside, strict=True) if part is not None]


def _classes(domain: str, part: str, folders: Sequence[Path], left_out: Counter[str]) -> Iterator[Found]:
    if not folders:
        raise DataError(f"domain {domain!r} has no folder of a class; {_WANTED}")
    for folder in folders:
        empty = True
        for file in _visible(folder):
            if file.is_symlink() and not file.exists():
                raise DataError(f"{file}: a link to a file that is not there; mend the link or remove it")
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                empty = False
                name = f"{folder.parent.name}/{folder.name}/{file.name}"
                yield domain, _spelt(folder.name), part, Record(domain, 0, name, file, str(file))
            else:
                left_out["folders inside a class" if file.is_dir() else f"'{file.suffix.lower()}' files"] += 1
        if empty:
            raise DataError(f"{folder}: a class without an image; add some or remove the folder")


def _check_domains(path: Path, found: Sequence[Found]) -> None:
    """Raise DataError where two folders have one domain's name, or two classes differ in case alone."""
    folders: dict[tuple[str, ...], str] = {}
    for domain, kind, part, record in found:
        above = str(Path(record.origin).parent)
        if folders.setdefault((domain, kind.lower(), part), above) != above:
            raise DataError(f"{above}: a second folder of {domain}/{kind} beside {folders[domain, kind.lower(), part]}")
        whole = str(Path(above).parent)
        if folders.setdefault((domain, part), whole) != whole:
            raise DataError(f"{whole}: a second folder of domain {domain!r} beside {folders[domain, part]}; rename one")
    if not found:
        raise DataError(f"{path}: no images found; {_WANTED}")


def _by_lists(folder: Path, found: Sequence[Found], left_out: Counter[str]) -> tuple[list[Found], list[str]]:
    """What the lists name, and the classes in the order of the lists' numbers."""
    named = {(domain, kind, _spelt(Path(r.name).name)): (domain, kind, r) for domain, kind, _, r in found}
    numbers: dict[str, int] = {}
    seen: dict[tuple[str, str, str], str] = {}
    chosen: list[Found] = []
    for domain in dict.fromkeys(domain for domain, *_ in found):
        for part, ending in _LISTS.items():
            file = _list_of(folder, domain, ending)
            for where, key, number in _lines(file, domain):
                if key not in named:
                    raise DataError(f"{where}: names {'/'.join(key)}, which is not among the images; mend the list")
                if key in seen:
                    raise DataError(f"{where}: {'/'.join(key)} was already named in {seen[key]}")
                seen[key] = where
                if numbers.setdefault(key[1], number) != number:
                    raise DataError(f"{where}: number {number} for class {key[1]}, which had {numbers[key[1]]} before")
                chosen.append((domain, key[1], part, named[key][2]))
    if len(set(numbers.values())) < len(numbers):
        raise DataError(f"{folder}: one number for two classes; expected a number of its own for each class")
    if len(found) > len(chosen):
        left_out["images in no list"] += len(found) - len(chosen)
    return chosen, sorted(numbers, key=numbers.__getitem__)


def _list_of(folder: Path, domain: str, ending: str) -> Path:
    files = [file for file in folder.glob(f"*{ending}") if domain_name(file.name[: -len(ending)]) == domain]
    if len(files) != 1:
        many = " and ".join(file.name for file in sorted(files)) or "none"
        raise DataError(f"{folder}: expected one list {domain}{ending}, found {many}")
    return files[0]


def _lines(file: Path, domain: str) -> Iterator[tuple[str, tuple[str, str, str], int]]:
    """(where, (domain, class, file name), number) of every line of a list."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable list ({error}); fetch it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        path, *label = line.strip().rsplit(None, 1)
        pieces = path.replace("\\", "/").split("/")
        if len(pieces) < 3 or not label or not re.fullmatch("[0-9]{1,6}", label[0]):
            raise DataError(f"{where}: {line.strip()!r}; expected '<domain>/<class>/<image> <number>'")
        if domain_name(pieces[-3]) != domain:
            raise DataError(f"{where}: names an image of {pieces[-3]} in a list of domain {domain!r}")
        yield where, (domain, _spelt(pieces[-2]), _spelt(pieces[-1])), int(label[0])


def _spelt(name: str) -> str:
    """A name whose accents are written in one way: file systems and archives have two."""
    return unicodedata.normalize("NFC", name)


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))


def _folders(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    inside = _visible(folder)
    if left_out is not None and any(not p.is_dir() for p in inside):
        left_out["files beside the folders"] += sum(not p.is_dir() for p in inside)
    return [p for p in inside if p.is_dir()]


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") for p in folder.iterdir())


def _below(folder: Path) -> bool:
    """Whether images lie in a folder or, where it is a part (train, test), in the folders in it."""
    return _has_images(folder) or (part_of(folder.name) is not None and any(map(_has_images, _folders(folder))))
