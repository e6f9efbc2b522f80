"""A folder of domains: `<domain>.safetensors` each, an index, and changes that happen all or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dwm_fast._files import write_part
from dwm_fast.bank.atomic import JOURNAL, commit, current_path, locked, read_journal, recover
from dwm_fast.bank.file import MaskFile
from dwm_fast.bank.header import fail, is_count, parse_object
from dwm_fast.bank.record import DomainMasks, check_domain_name
from dwm_fast.errors import InputError, MaskFileError

INDEX = "index.json"
SUFFIX = ".safetensors"
_FORMAT = "dwm-fast-bank"
_VERSION = 1
_MAX_INDEX_BYTES = 256 << 20


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


def read_rows(folder: Path) -> dict[str, Row]:
    """The index of a folder, domain by domain; without index.json, whatever mask files lie there.

    Raises MaskFileError when the folder is missing or its index is broken.
    """
    if not folder.is_dir():
        raise MaskFileError(f"{folder}: no such folder; expected one that MaskBank.save wrote")
    with locked(folder, shared=True):
        return _read_rows(folder)


def _read_rows(folder: Path) -> dict[str, Row]:
    path = current_path(folder, INDEX)
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            fail(path, "index", f"longer than {_MAX_INDEX_BYTES} bytes")
        index = parse_object(path, "index", path.read_bytes())
    except FileNotFoundError:
        return _scan(folder)
    except OSError as error:
        raise MaskFileError(f"{path}: cannot be read: {error.strerror or error}") from error
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
    with locked(folder, shared=True):
        return _load(folder, domain, ())


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
    wrong: dict[str, str] = {}
    with locked(folder, shared=True):
        rows = _read_rows(folder)
        if read_journal(folder) is not None:
            wrong[JOURNAL] = "a save was cut off after its commit; the next save finishes it, nothing is lost"
        for domain, row in rows.items():
            try:
                file = open_domain(folder, domain)
                _load(folder, domain, ())
                if file.seal != row.seal:
                    wrong[domain_file(domain)] = "another file than the index names; save the bank again"
            except MaskFileError as error:
                wrong[domain_file(domain)] = str(error)
        for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
            if path.name.removesuffix(SUFFIX) not in rows:
                wrong[path.name] = f"not in {INDEX}; add it to a bank with MaskBank.add_file, or delete it"
    return wrong


def open_domain(folder: Path, domain: str) -> MaskFile:
    """Open one domain of a folder, never in the middle of another process's change."""
    with locked(folder, shared=True):
        file = MaskFile(current_path(folder, domain_file(domain)))
    if file.info.domain != domain:
        fail(file.path, "domain", f"the file holds domain '{file.info.domain}'; expected '{domain}'")
    return file


def change_folder(folder: Path, plan: Change) -> dict[str, Row]:
    """Change a folder under its lock, all or nothing, and return the rows it has then.

    A process killed at any moment leaves the state before or after. Other writers wait; what they added
    stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            recover(folder)
            rows = _read_rows(folder)
            write, delete = plan(rows)
            parts = {}
            for domain, encode in write.items():
                data, rows[domain] = encode()
                parts[domain_file(domain)] = write_part(folder / domain_file(domain), data)
            gone = set(delete)
            rows = {domain: row for domain, row in sorted(rows.items()) if domain not in gone}
            parts[INDEX] = write_part(folder / INDEX, _index(rows))
            commit(folder, parts, [domain_file(domain) for domain in gone])
            return rows
    except OSError as error:
        raise MaskFileError(
            f"{folder}: cannot be written: {error.strerror or error}; nothing was changed, free the "
            f"disk or choose another folder"
        ) from error


def _index(rows: Mapping[str, Row]) -> bytes:
    domains = {domain: asdict(row) for domain, row in rows.items()}
    index = {"format": _FORMAT, "version": _VERSION, "domains": domains}
    return json.dumps(index, indent=1, sort_keys=True).encode()
