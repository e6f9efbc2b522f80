"""A folder of domains: `<domain>.safetensors` each, an index, and changes that happen all or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dwm_fast._files import reason, write_part
from dwm_fast.bank.atomic import (
    INDEX,
    JOURNAL,
    current_path,
    locked,
    read_journal,
    read_small,
    read_stable,
    recover,
    write_journal,
)
from dwm_fast.bank.encode import CODINGS
from dwm_fast.bank.file import MaskFile
from dwm_fast.bank.header import fail, is_count, parse_object
from dwm_fast.bank.record import DomainMasks, bits_digest, check_domain_name
from dwm_fast.errors import DwmError, InputError, MaskFileError

SUFFIX = ".safetensors"
_FORMAT = "dwm-fast-bank"
_VERSION = 1
_HEX = re.compile(r"[0-9a-f]*")
_DIGESTS = {"seal": (64,), "bits": (0, 32), "reference_bits": (0, 32)}


@dataclass(frozen=True)
class Row:
    """What the index says about one domain.

    bits: digest of its masks. reference: the domain it is stored against, "" for none, with that one's
        digest.
    """

    nbytes: int
    seal: str
    bits: str
    coding: str
    reference: str = ""
    reference_bits: str = ""


Change = Callable[[Mapping[str, Row]], tuple[Mapping[str, Callable[[], tuple[bytes, Row]]], Iterable[str]]]
"""Given the folder's rows: the domains to write (each a function that gives bytes and row) and those to delete."""


def domain_file(domain: str) -> str:
    """The file name of a domain."""
    return f"{check_domain_name(domain)}{SUFFIX}"


def place_of(folder: str | os.PathLike[str]) -> Path:
    """The folder's absolute path without links, the same for every way to write it."""
    try:
        return Path(folder).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise MaskFileError(f"{str(folder)!r}: no such folder: {reason(error)}") from error


def read_rows(folder: Path) -> dict[str, Row]:
    """The index of a folder, domain by domain; without index.json, whatever mask files lie there.

    Raises MaskFileError when the folder is missing or its index is broken.
    """
    try:
        if folder.is_dir():
            return read_stable(folder, lambda: _read_rows(folder))
    except OSError as error:
        raise MaskFileError(f"{folder}: cannot be read: {reason(error)}") from error
    raise MaskFileError(f"{folder}: no such folder; expected one that MaskBank.save wrote")


def _read_rows(folder: Path) -> dict[str, Row]:
    path = current_path(folder, INDEX)
    try:
        index = parse_object(path, "index", read_small(path))
    except FileNotFoundError:
        return _scan(folder)
    if index.get("format") != _FORMAT or index.get("version") != _VERSION:
        fail(path, "version", f"expected format '{_FORMAT}', version {_VERSION}")
    domains = index.get("domains")
    if not isinstance(domains, dict):
        fail(path, "domains", "expected an object")
    return {_domain(path, name): _row(path, name, row) for name, row in domains.items()}


def _domain(path: Path, name: str) -> str:
    try:
        return check_domain_name(name)
    except InputError as error:
        raise MaskFileError(f"{path}: domains: {error}") from error


def _row(path: Path, name: str, row: Any) -> Row:
    texts = ("seal", "bits", "coding", "reference", "reference_bits")
    if not isinstance(row, dict) or set(row) != {"nbytes", *texts} or not is_count(row["nbytes"]):
        fail(path, f"domains.{name}", f"expected exactly nbytes, {', '.join(texts)}")
    if not all(isinstance(row[key], str) for key in texts):
        fail(path, f"domains.{name}", "expected text")
    if row["reference"]:
        _domain(path, row["reference"])
    wrong = [key for key, lengths in _DIGESTS.items() if len(row[key]) not in lengths or not _HEX.fullmatch(row[key])]
    if wrong or row["coding"] not in CODINGS or bool(row["reference"]) != bool(row["reference_bits"]):
        fail(path, f"domains.{name}.{(wrong or ['coding or reference'])[0]}", "is none that a bank writes")
    return Row(**row)


def _scan(folder: Path) -> dict[str, Row]:
    rows = {}
    for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        file = MaskFile(path)
        name = path.name.removesuffix(SUFFIX)
        if name != file.info.domain:
            fail(path, "domain", f"the file holds domain '{file.info.domain}'; name it {file.info.domain}{SUFFIX}")
        reference, bits = file.reference or ("", "")
        rows[name] = Row(file.nbytes, file.seal, "", file.coding, reference, bits)
    return rows


def load_domain(folder: Path, domain: str) -> DomainMasks:
    """One domain of a folder with the references it is stored against, all of one moment."""
    return read_stable(folder, lambda: _load(folder, domain, ()))


def _load(folder: Path, domain: str, chain: tuple[str, ...]) -> DomainMasks:
    file = open_domain(folder, domain)
    if domain in chain:
        fail(file.path, "reference", f"goes in a circle: {' -> '.join((*chain, domain))}")
    return file.load(lambda reference: _load(folder, reference, (*chain, domain)))


def read_domain(path: Path) -> DomainMasks:
    """The domain in the file at `path`, whatever its name; a reference is looked for beside it."""
    return MaskFile(path).load(lambda reference: load_domain(path.parent, reference))


def check_folder(folder: Path) -> dict[str, str]:
    """What is wrong in a folder, by file name; empty when every domain reads back and the index tells the truth."""
    return read_stable(folder, lambda: _check_folder(folder))


def _check_folder(folder: Path) -> dict[str, str]:
    wrong: dict[str, str] = {}
    rows = _read_rows(folder)
    if read_journal(folder) is not None:
        wrong[JOURNAL] = "a save was cut off after its commit; the next save finishes it, nothing is lost"
    for domain, row in rows.items():
        try:
            lie = _first_lie(row, open_domain(folder, domain), _load(folder, domain, ()))
        except MaskFileError as error:
            wrong[domain_file(domain)] = str(error)
        else:
            if lie:
                wrong[domain_file(domain)] = f"another {lie} than the index names; save the bank again"
    for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        if path.name.removesuffix(SUFFIX) not in rows:
            wrong[path.name] = f"not in {INDEX}; add it to a bank with MaskBank.add_file, or delete it"
    return wrong


def _first_lie(row: Row, file: MaskFile, record: DomainMasks) -> str:
    """What the index says of a file and is not so; "" when all is. A row without bits comes from a folder's scan."""
    truth = {
        "file": (row.seal, file.seal),
        "size": (row.nbytes, file.nbytes),
        "masks": (row.bits, bits_digest(record) if row.bits else ""),
        "coding": (row.coding, file.coding if row.coding == "raw" else row.coding),
        "reference": ((row.reference, row.reference_bits), file.reference or ("", "")),
    }
    return next((what for what, (said, found) in truth.items() if said != found), "")


def open_domain(folder: Path, domain: str) -> MaskFile:
    """Open one domain of a folder, never in the middle of another process's change."""
    file = read_stable(folder, lambda: MaskFile(current_path(folder, domain_file(domain))))
    if file.info.domain != domain:
        fail(file.path, "domain", f"the file holds domain '{file.info.domain}'; expected '{domain}'")
    return file


def change_folder(folder: Path, plan: Change) -> dict[str, Row]:
    """Change a folder under its lock, all or nothing, and return the rows it has then.

    A process killed at any moment leaves the state before or after. Other writers wait; what they added
    stays. MaskFileError says which of the two it was when the disk is full or the folder cannot be written.
    """
    recorded = False
    parts: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            recover(folder)
            try:
                rows, gone = _prepare(folder, plan, parts)
                write_journal(folder, parts, [domain_file(domain) for domain in gone])
            finally:
                recorded = os.path.lexists(folder / JOURNAL)
                for part in () if recorded else parts.values():
                    part.unlink(missing_ok=True)
            recover(folder)
            return rows
    except DwmError:
        raise
    except (OSError, ValueError) as error:
        what = "the change is recorded, and the next save carries it out" if recorded else "nothing was changed"
        raise MaskFileError(
            f"{folder}: cannot be written: {reason(error)}; {what}; free the disk or choose another folder"
        ) from error


def _prepare(folder: Path, plan: Change, parts: dict[str, Path]) -> tuple[dict[str, Row], set[str]]:
    """Write the new files beside the old, put them into `parts`, and return the new rows and the domains to delete."""
    rows = _read_rows(folder)
    write, delete = plan(rows)
    for domain, encode in write.items():
        data, rows[domain] = encode()
        parts[domain_file(domain)] = write_part(folder / domain_file(domain), data)
    gone = set(delete)
    rows = {domain: row for domain, row in sorted(rows.items()) if domain not in gone}
    parts[INDEX] = write_part(folder / INDEX, _index(rows))
    return rows, gone


def _index(rows: Mapping[str, Row]) -> bytes:
    domains = {domain: asdict(row) for domain, row in rows.items()}
    index = {"format": _FORMAT, "version": _VERSION, "domains": domains}
    return json.dumps(index, indent=1, sort_keys=True).encode()
