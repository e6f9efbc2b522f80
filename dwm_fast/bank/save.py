"""Which files of a folder a bank has to write, and which it may leave as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dwm_fast.bank.encode import CODINGS, encode_domain
from dwm_fast.bank.folder import Row, change_folder, load_domain
from dwm_fast.bank.header import parse_header
from dwm_fast.bank.record import DomainMasks, bits_digest
from dwm_fast.errors import InputError, MaskFileError

Source = DomainMasks | Callable[[], DomainMasks]
Encoded = tuple[bytes, Row]


@dataclass(frozen=True)
class Origin:
    """Where a domain lies on disk: folder, name there, and what its index said then."""

    folder: Path
    domain: str
    row: Row


def save_entries(
    folder: Path,
    domains: Mapping[str, tuple[Origin | None, Source]],
    gone: Iterable[str],
    coding: str | None,
    reference: str | None,
) -> dict[str, Origin]:
    """Write domains to a folder and delete `gone` from it; returns where each of them lies now.

    Args:
        domains: by name: where it lies already (None when nowhere), and the domain or a function that reads
            it.
        coding, reference: as in `MaskBank.save`.
    """
    if coding is not None and coding not in CODINGS:
        raise InputError(f"coding '{coding}' is unknown; expected one of {', '.join(CODINGS)}")
    if reference is not None and (coding != "coded" or reference not in domains):
        raise InputError(f"reference '{reference}' needs coding='coded' and has to be one of the bank's domains")
    writer = _Writer(folder, domains, coding, reference)

    def plan(rows: Mapping[str, Row]) -> tuple[Mapping[str, Callable[[], Encoded]], Iterable[str]]:
        deleted = set(gone) & set(rows)
        chosen = writer.choose(rows, deleted)
        return {name: (lambda name=name: writer.encode(name)) for name in chosen}, deleted

    rows = change_folder(folder, plan)
    return {name: Origin(folder, name, rows[name]) for name in domains if name in rows}


class _Writer:
    def __init__(
        self,
        folder: Path,
        domains: Mapping[str, tuple[Origin | None, Source]],
        coding: str | None,
        reference: str | None,
    ) -> None:
        self._folder, self._domains = folder, domains
        self._coding, self._reference = coding, reference
        self._codings: dict[str, str] = {}
        self._base = None if reference is None else self._read(reference)

    def choose(self, rows: Mapping[str, Row], deleted: set[str]) -> list[str]:
        """Domains whose files have to be written: new or changed ones, and those stored against one that changes."""
        self._codings = {name: row.coding for name, row in rows.items()}
        chosen = {name for name in self._domains if self._outdated(name, rows.get(name))}
        moved = {name for name in chosen | deleted if name in rows and not self._same_bits(name, rows[name])}
        for name, row in rows.items():
            if name in deleted or name in chosen or row.reference not in moved:
                continue
            if name not in self._domains:
                raise MaskFileError(
                    f"{self._folder}: domain '{name}' is stored against '{row.reference}', which "
                    f"changes; load the folder as a whole and save it again"
                )
            chosen.add(name)
        return sorted(chosen)

    def encode(self, name: str) -> Encoded:
        """The file of one domain and its line in the index."""
        record, base = self._read(name), self._base
        coding = self._coding or self._codings.get(name, "raw")
        if base is not None and (name == self._reference or base.info.layout != record.info.layout):
            base = None
        data = encode_domain(record, coding, base)
        header = parse_header(self._folder / name, memoryview(data))
        used = header.content["reference"]
        against = (used["domain"], used["bits"]) if used else ("", "")
        return data, Row(len(data), header.seal, bits_digest(record), coding, *against)

    def _outdated(self, name: str, row: Row | None) -> bool:
        """Whether the bank has something for this file that the folder lacks; what others changed is left alone."""
        origin = self._domains[name][0]
        if origin is None or (origin.folder, origin.domain) != (self._folder, name):
            return True
        return row is not None and self._coding is not None and self._wanted(name) != (row.coding, row.reference)

    def _wanted(self, name: str) -> tuple[str | None, str]:
        return self._coding, self._reference if self._reference and name != self._reference else ""

    def _same_bits(self, name: str, row: Row) -> bool:
        return name in self._domains and bits_digest(self._read(name)) == row.bits

    def _read(self, name: str) -> DomainMasks:
        origin, source = self._domains[name]
        if isinstance(source, DomainMasks):
            return source
        if origin is not None and origin.folder == self._folder:
            return load_domain(origin.folder, origin.domain)
        return source()
