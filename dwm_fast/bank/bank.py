"""MaskBank: one backbone, many domains, one bit per weight and domain."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast.bank import hub, sets
from dwm_fast.bank.adopt import adopted
from dwm_fast.bank.file import MaskFile
from dwm_fast.bank.folder import load_domain, open_domain, place_of, read_rows
from dwm_fast.bank.holdings import Holdings, ServedHolding, holding
from dwm_fast.bank.mixed import mixed_twin
from dwm_fast.bank.module import BankModule, Known
from dwm_fast.bank.record import DomainMasks, MaskInfo, check_domain_name, make_domain
from dwm_fast.bank.runner import Patch, domain_patch
from dwm_fast.bank.save import Origin, save_entries
from dwm_fast.bank.serve import Served
from dwm_fast.errors import InputError
from dwm_fast.nn.shell import unwrapped

_MODULE_NBYTES = 1 << 16
"""What a network without its tensors is counted as, in the memory budget."""


class MaskBank(BankModule):
    """Serves many domains from one copy of a network's weights.

    The backbone is shared, not copied, always runs in eval mode here, and has to stay as it is while domains
    are used. Calls may come from several threads at once. It is a `torch.nn.Module`: `to`, `state_dict`, copies and
    pickles have the network and all domains in them.

    Args:
        backbone: any network whose masked weights are parameters.
        memory_budget: bytes for masked weights, decoded masks and mixed batches that are kept for reuse.

    Example:
        >>> import torch, dwm_fast
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> bank = dwm_fast.MaskBank(net)
        >>> bank.add("sketch", {"0.weight": torch.rand(3, 4) < 0.5, "2.weight": torch.rand(2, 3) < 0.5})
        >>> bank.add("photo", {"0.weight": torch.rand(3, 4) < 0.5})
        >>> bank.activate("sketch")
        >>> bank(torch.rand(5, 4)).shape
        torch.Size([5, 2])
        >>> bank(torch.rand(2, 4), domains=["photo", "sketch"]).shape
        torch.Size([2, 2])
    """

    def __init__(self, backbone: nn.Module, *, memory_budget: int = 1 << 30) -> None:
        super().__init__(backbone, memory_budget)

    @property
    def domains(self) -> list[str]:
        """Names of all domains, in the order they were added or loaded."""
        return list(self._entries)

    @property
    def active(self) -> str | None:
        """The domain that a plain call uses; None for the backbone itself."""
        return self._active

    @property
    def hot_nbytes(self) -> int:
        """Bytes that are kept for reuse now; at most the memory budget."""
        return self._cache.nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, domain: object) -> bool:
        return domain in self._entries

    def __repr__(self) -> str:
        shown = ", ".join(self.domains[:8]) + (", …" if len(self) > 8 else "")
        where = next((tensor.device for tensor in self._net.tensors.values()), "no device")
        what = f"{type(self.backbone).__name__} on {where}, {len(self)} domains: [{shown}]"
        return f"MaskBank({what}, active={self._active}, memory_budget={self._cache.budget:,})"

    @torch.inference_mode(False)
    def add(
        self,
        domain: str,
        masks: Any,
        *,
        state: Mapping[str, Tensor] | None = None,
        values: Mapping[str, Tensor] | None = None,
        form: str | None = None,
        method: str | None = None,
        classes: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a domain.

        Args:
            domain: its name, which is also its file's name.
            masks: bool tensors by parameter or module name (True = keep), or a masked model with
                `keep_masks()`; from a model, whatever it has beside the masks that differs from the backbone
                is added too.
            state: tensors by state dict name that the domain has for itself (head, batch norm).
            values: for forms other than binary, see `dwm_fast.bank.DomainMasks`.
            form: of a masked model by default its own, else "binary". "kept" also stores the weights that the mask
                keeps: the domain is the same over any other weights, and is read faster where few are kept.
            method, classes, options: description; method and options of a masked model come from it.

        Raises:
            InputError: the name is taken or not usable, or a tensor does not fit the backbone, or a masked
                model's own weights are not the backbone's.
        """
        given = adopted(unwrapped(masks), self._net.tensors, form, with_values=values is not None)
        names = list(given.masks)
        self._net.check_names(names)
        record = make_domain(
            domain,
            given.masks,
            form=given.form,
            method=given.method if method is None else method,
            classes=classes,
            options=given.options if options is None else options,
            state=given.state if state is None else state,
            values=given.values if values is None else values,
            fingerprint="" if given.form == "kept" else self._net.fingerprint(names),
        )
        self.add_record(record)

    def add_record(self, record: DomainMasks, *, allow_other_backbone: bool = False) -> None:
        """Add a domain that was read with `MaskFile.load` or made with `make_domain`."""
        self._check_fit(record, "domain", allow_other_backbone)
        with self._lock:
            self._check_free(record.info.domain)
            self._entries[record.info.domain] = Known(record, None, allow_other_backbone, record.info)

    def add_file(self, path: str | os.PathLike[str], *, allow_other_backbone: bool = False) -> str:
        """Add the domain of one mask file and return its name.

        MaskFileError when the file or backbone is wrong.
        """
        record = MaskFile(path).load(lambda reference: self.record(reference))
        self.add_record(record, allow_other_backbone=allow_other_backbone)
        return record.info.domain

    def remove(self, domain: str) -> None:
        """Forget a domain; the next `save` to the folder it came from deletes its file."""
        with self._lock:
            entry = self._entry(domain)
            del self._entries[domain]
            self._forget(domain, entry)

    def rename(self, old: str, new: str) -> None:
        """Give a domain another name, in place."""
        with self._lock:
            record = self.record(old)
            self._check_free(check_domain_name(new))
            entry = self._entries[old]
            info = replace(record.info, domain=new)
            renamed = Known(replace(record, info=info), None, entry.any_backbone, info)
            self._entries = {new if n == old else n: renamed if n == old else e for n, e in self._entries.items()}
            self._active = new if self._active == old else self._active
            active = self._active
            self._forget(old, entry)
            self._active = active

    def info(self, domain: str) -> MaskInfo:
        """The description of a domain; reads only the header of a domain that is still on disk."""
        entry = self._entry(domain)
        if entry.info is None:
            assert entry.origin is not None
            entry.info = open_domain(entry.origin.folder, entry.origin.domain).info
        return entry.info

    def record(self, domain: str) -> DomainMasks:
        """A domain's bits and other tensors, checked against the backbone; MaskFileError if its file is bad."""
        entry = self._entry(domain)
        if entry.record is not None:
            return entry.record
        record: DomainMasks = self._cache.get(("record", entry), lambda: self._read(entry))
        return record

    def masks(self, domain: str) -> dict[str, Tensor]:
        """Keep masks of a domain by parameter name, bool."""
        return self.record(domain).masks()

    def activate(self, domain: str | None) -> None:
        """Make plain calls use `domain`, None for the bare backbone.

        One pass over the bits, or nothing if kept.
        """
        if domain is not None:
            self._patch(domain)
        self._active = domain

    def forward(self, *args: Any, domains: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The network's output, under the active domain, or with `domains` each sample under its own.

        Args:
            args, kwargs: the backbone's own. With `domains`, tensors whose first size is B are split by
                sample.
            domains: B names. Heads of different class counts give outputs as wide as the widest, missing
                classes -inf.
        """
        if domains is None:
            return self._run(self._active, args, kwargs)
        sizes = [a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0]
        if sizes and len(domains) not in sizes and domains:
            raise InputError(f"domains: given {len(domains)} names for a batch of {sizes[0]}; expected one per sample")
        names = sorted(set(domains))
        number = {name: i for i, name in enumerate(names)}
        device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        ids = torch.tensor([number[name] for name in domains], dtype=torch.int64, device=device)
        return self.serve(names).run(ids, args, kwargs)

    def generate(self, *args: Any, domains: None = None, **kwargs: Any) -> Any:
        """The network's own `generate`, all of it under the active domain; its arguments, its result.

        Raises:
            InputError: the network has none, or `domains` were given: a text is written under one domain.
        """
        if domains is not None:
            raise InputError("generate runs under one domain, the active one; call it for the samples of each in turn")
        if not callable(getattr(self.backbone, "generate", None)):
            raise InputError(f"{type(self.backbone).__name__}, the bank's network, has no generate")
        return self._net.write.method("generate", self._patch(self._active), args, kwargs)

    def serve(self, names: Sequence[str]) -> Served:
        """Prepare domains for mixed batches that name them by number; see `Served`."""
        if not names:
            raise InputError("no domains were named; give at least one")
        entries = tuple(self._entry(name) for name in names)
        key = ("served", tuple(names), entries, self._current())
        served: Served = self._cache.get(key, lambda: self._make_served(names))
        return served

    def _make_served(self, names: Sequence[str]) -> tuple[Served, int]:
        made = mixed_twin(self.backbone, [self._checked(name) for name in names], self._cache.budget // 2)
        twin, nbytes = (None, 0) if made is None else (made.module, made.nbytes)
        stamp = self._stamp
        served = Served(names, twin, self._run, lambda: self._net.stamp() == stamp, self._splits)
        served.stores = {} if made is None else made.stores
        return served, nbytes + _MODULE_NBYTES

    def explain(self) -> Holdings:
        """What is in memory of each domain, in which form, with its bytes; print() shows it. Makes nothing.

        Of a domain that is still on disk the header is read.
        """
        stamp, found = self._current(), []
        for domain, entry in self._entries.items():
            read = self._cache.peek(("record", entry))
            record = entry.record if read is None else read[0]
            form = self.info(domain).form
            found.append(holding(domain, form, record, self._cache.peek(("patch", entry, stamp))))
        kept = [one for key, one in self._cache.items() if isinstance(key, tuple) and key[0] == "served"]
        served = tuple(ServedHolding(one.names, nbytes, one.stores if one.layerwise else {}) for one, nbytes in kept)
        return Holdings(tuple(found), self.hot_nbytes, self._cache.budget, served)

    def overlap(self, names: Sequence[str] | None = None, measure: str = "jaccard") -> Tensor:
        """How the masks of domains lie over one another, (D, D), for `names` or all domains in order.

        measure: "jaccard" (float64: kept by both over kept by either), or the number of weights kept by both
        ("and"), by either ("or"), by exactly one ("xor"), int64. A weight without a mask counts as kept.
        """
        return sets.overlap(self._records(names), self._net.tensors, measure)

    def union(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Bool masks by parameter name: kept by at least one of the domains (all by default)."""
        return sets.combined(self._records(names), self._net.tensors, "or")

    def intersection(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Bool masks by parameter name: kept by every one of the domains (all by default)."""
        return sets.combined(self._records(names), self._net.tensors, "and")

    def _records(self, names: Sequence[str] | None) -> list[DomainMasks]:
        return [self.record(name) for name in (self.domains if names is None else names)]

    def save(self, folder: str | os.PathLike[str], *, coding: str | None = None, reference: str | None = None) -> None:
        """Write the domains to a folder: `<domain>.safetensors` each, and an index. All or nothing.

        Other domains that lie in the folder stay. Domains that came from it, and have not changed since, are
        not written again unless `coding` says otherwise.

        Args:
            folder: made if it is missing.
            coding: "raw" (one bit per weight), "coded" (entropy-coded); None: as they are, new ones raw.
            reference: with "coded", a domain that the others of the same layout may be stored against.

        Raises:
            MaskFileError: the folder cannot be written, or a file there that is needed is broken.
        """
        path = place_of(folder)
        with self._lock:
            domains = {n: (e.origin, e.record or (lambda n=n: self.record(n))) for n, e in self._entries.items()}
            gone = {domain for place, domain in self._removed if place == path} - set(domains)
            origins = save_entries(path, domains, gone, coding, reference)
            for name, origin in origins.items():
                self._entries[name].origin = origin
            self._removed = {(place, domain) for place, domain in self._removed if place != path}

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        backbone: nn.Module,
        *,
        memory_budget: int = 1 << 30,
        allow_other_backbone: bool = False,
    ) -> MaskBank:
        """Open a folder of domains over a backbone. Only the index is read; each domain is read when it is used.

        Raises MaskFileError when the folder or its index is bad, and at first use of a domain that is broken
        or was made for another backbone (`allow_other_backbone` permits that).
        """
        bank = cls(backbone, memory_budget=memory_budget)
        path = place_of(folder)
        for domain, row in read_rows(path).items():
            bank._entries[domain] = Known(None, Origin(path, domain, row), allow_other_backbone)
        return bank

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], backbone: nn.Module, *, revision: str | None = None, **options: Any
    ) -> MaskBank:
        """Load a bank from a folder, or from a Hugging Face Hub repository; options as in `load`."""
        folder = Path(source)
        return cls.load(folder if folder.is_dir() else hub.download(str(source), revision), backbone, **options)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, coding: str = "raw", message: str = "Update domains"
    ) -> str:
        """Upload all domains to a Hugging Face Hub repository, made if it is missing; returns the commit's URL."""
        return hub.upload(lambda to: self.save(to, coding=coding), repo_id, private=private, message=message)

    def _current(self) -> int:
        """The backbone's stamp; what was made for an earlier one is forgotten."""
        stamp = self._net.stamp()
        if stamp != self._stamp:
            self._stamp, self._splits = stamp, set()
            self._cache.discard(lambda key: isinstance(key, tuple) and key[0] != "record")
        return stamp

    def _patch(self, domain: str | None) -> Patch:
        stamp = self._current()
        if domain is None:
            return _NO_PATCH
        entry = self._entry(domain)
        key = ("patch", entry, stamp)
        patch: Patch = self._cache.get(key, lambda: domain_patch(self._checked(domain), self._net.tensors))
        return patch

    def _run(self, domain: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        patch = self._patch(domain)  # looks at the network, and `run` may be another one then
        return self._net.run(patch, args, kwargs)

    def _checked(self, domain: str) -> DomainMasks:
        """A domain, after comparing it with the network as it is now."""
        record = self.record(domain)
        self._check_fit(record, f"domain '{domain}'", self._entry(domain).any_backbone)
        return record

    def _read(self, entry: Known) -> tuple[DomainMasks, int]:
        assert entry.origin is not None
        record = load_domain(entry.origin.folder, entry.origin.domain)
        self._check_fit(record, str(entry.origin.folder / record.info.domain), entry.any_backbone)
        entry.info = record.info
        extras = (*record.state.values(), *record.values.values())
        return record, record.bits.numel() + sum(t.numel() * t.element_size() for t in extras)

    def _check_fit(self, record: DomainMasks, source: str, any_backbone: bool) -> None:
        self._net.check_fit(record, source)
        if not any_backbone:
            self._net.check_fingerprint(record, source)

    def _entry(self, domain: str) -> Known:
        entry = self._entries.get(domain)
        if entry is None:
            known = ", ".join(self.domains[:20]) or "none"
            raise InputError(f"domain '{domain}' is not in the bank; it has: {known}")
        return entry

    def _check_free(self, domain: str) -> None:
        if domain in self._entries:
            raise InputError(f"domain '{domain}' is in the bank already; remove or rename it first")

    def _forget(self, domain: str, entry: Known) -> None:
        if entry.origin is not None:
            self._removed.add((entry.origin.folder, entry.origin.domain))
        self._active = None if self._active == domain else self._active
        self._cache.discard(lambda key: isinstance(key, tuple) and entry in (key[1], *_entries_of(key)))


def _entries_of(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return key[2] if key[0] == "served" else ()


_NO_PATCH = Patch()
