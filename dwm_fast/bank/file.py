"""Reading one domain from one file: lazily, memory-mapped, every claim checked. See docs/format.md."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.bank import coding as codes
from dwm_fast.bank.content import CHECKSUMS, check_content
from dwm_fast.bank.header import DTYPES, Entry, fail, map_file, parse_header
from dwm_fast.bank.record import DomainMasks, bits_digest, check_values, tensor_bytes
from dwm_fast.errors import InputError, MaskFileError

Resolver = Callable[[str], DomainMasks]
"""Finds a reference domain by its name."""


class MaskFile:
    """A mask file opened for reading: its description at once, its tensors when they are asked for.

    Raw bits are views of a private memory map: nothing is read before it is used, and no file handle is kept.
    Every tensor's checksum is compared when it is read. Safe to use from several threads.

    Args:
        path: the file. Raises MaskFileError, naming file and field, for whatever is wrong with it.
        data: the file's bytes, uint8 (size,), where they are in memory already; `path` then names them in errors.

    Attributes:
        path, info: where it is and what its header says.
        reference: (domain, bits digest) that some tensors are stored against, or None.
        extra_names: the tensors beside the masks: "state.<name>" and "values.<name>".
        seal: checksum of the header, which seals the checksums of all tensors: equal seals, equal content.
    """

    def __init__(self, path: str | os.PathLike[str], data: Tensor | None = None) -> None:
        self.path = Path(path)
        self._map = map_file(self.path) if data is None else data
        header = parse_header(self.path, tensor_bytes(self._map).data)
        self.seal = header.seal
        self._entries = header.entries
        self._data_start = header.data_start
        content = check_content(self.path, header.content, header.entries, self._map.numel())
        self.info = content.info
        self.stored = content.stored
        self.reference = content.reference
        self._checksums = content.checksums
        self._sums: dict[str, bytes] | None = None
        self.extra_names = content.extras

    @property
    def coding(self) -> str:
        """ "raw" when every tensor's bits are stored as they are, else "coded"."""
        plain = all(s.plan.coding == "raw" and not s.xor for s in self.stored.values())
        return "raw" if plain else "coded"

    @property
    def payload_nbytes(self) -> int:
        """Bytes that the stored masks take: header, state and values not counted."""
        entries = (self._entries[f"bits.{name}"] for name in self.stored)
        return sum(entry.end - entry.begin for entry in entries)

    @property
    def header_nbytes(self) -> int:
        """Bytes before the first tensor."""
        return self._data_start

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self._map.numel()

    def stored_bytes(self, name: str) -> Tensor:
        """The stored bytes of one mask, uint8 (n,): a view of the file, checksum compared."""
        if name not in self.stored:
            raise InputError(f"{self.path} has no mask '{name}'; it has {', '.join(self.stored)}")
        return self._view(f"bits.{name}")

    def load(self, resolve: Resolver | None = None) -> DomainMasks:
        """The whole domain in memory.

        Args:
            resolve: finds the reference domain by name, for files that were stored against one.

        Raises:
            MaskFileError: corrupted bytes, or the reference is missing or has other bits than at writing.
        """
        layout = self.info.layout
        base = self._base(resolve)
        bits = torch.zeros(layout.starts[-1], dtype=torch.uint8)
        for name, shape, where in zip(layout.names, layout.shapes, layout.slices(), strict=True):
            packed = self._packed(name, shape)
            bits[where] = packed if base is None or not self.stored[name].xor else packed ^ base.bits[where]
        self._check_bits(bits)
        state, values = self._read_extras()
        record = DomainMasks(self.info, bits, state, values)
        try:
            check_values(record)
        except InputError as error:
            raise MaskFileError(f"{self.path}: values: {error}") from error
        return record

    def _view(self, name: str) -> Tensor:
        """The bytes of one tensor, checksum compared."""
        view = self._slice(self._entries[name])
        if hashlib.sha256(tensor_bytes(view).data).digest() != self._sum_of(name):
            fail(self.path, name, "checksum differs; the file is corrupted, fetch it again")
        return view

    def _slice(self, entry: Entry) -> Tensor:
        return self._map[self._data_start + entry.begin : self._data_start + entry.end]

    def _sum_of(self, name: str) -> bytes:
        if self._sums is None:
            sums = tensor_bytes(self._slice(self._entries[CHECKSUMS])).tobytes()
            if hashlib.sha256(sums).hexdigest() != self._checksums:
                fail(self.path, CHECKSUMS, "checksum differs; the file is corrupted, fetch it again")
            others = (entry for entry in self._entries.values() if entry.name != CHECKSUMS)
            ordered = sorted(others, key=lambda entry: (entry.begin, entry.end))
            self._sums = {entry.name: sums[32 * i : 32 * i + 32] for i, entry in enumerate(ordered)}
        return self._sums[name]

    def _packed(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Packed bits of one mask as stored: decoded, not yet combined with the reference."""
        view, plan = self.stored_bytes(name), self.stored[name].plan
        if plan.coding == "raw":
            return view
        try:
            return torch.from_numpy(codes.decode(tensor_bytes(view), shape, plan))
        except codes.Undecodable as error:
            raise MaskFileError(f"{self.path}: bits.{name}: {error}") from error

    def _base(self, resolve: Resolver | None) -> DomainMasks | None:
        if self.reference is None:
            return None
        domain, expected = self.reference
        if resolve is None:
            fail(
                self.path,
                "reference",
                f"stored against domain '{domain}'; open it through the bank or folder that holds both",
            )
        base = resolve(domain)
        if base.info.layout != self.info.layout or bits_digest(base) != expected:
            fail(self.path, "reference", f"domain '{domain}' has other masks than when this file was written")
        return base

    def _check_bits(self, bits: Tensor) -> None:
        layout = self.info.layout
        found = ops.count(bits, layout.numels).tolist()
        for name, n, where, ones, count in zip(
            layout.names, layout.numels, layout.slices(), self.info.ones, found, strict=True
        ):
            if n % 8 and int(bits[where][-1]) >> n % 8:
                fail(self.path, f"bits.{name}", f"bits beyond the {n} of its shape are set")
            if count != ones:
                fail(self.path, f"{name}.ones", f"the header says {ones}, the bits hold {count}")

    def _read_extras(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        groups: dict[str, dict[str, Tensor]] = {"state": {}, "values": {}}
        for full in self.extra_names:
            entry, view = self._entries[full], self._view(full)
            tensor = torch.empty(entry.shape, dtype=DTYPES[entry.code])
            if tensor.numel():
                tensor.view(-1).view(torch.uint8).copy_(view)
            group, _, name = full.partition(".")
            groups[group][name] = tensor
        return groups["state"], groups["values"]
