"""What a MaskBank is as a torch.nn.Module: its mode, moving it, its state dict, copies and pickles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dwm_fast.bank.backbone import Backbone
from dwm_fast.bank.cache import ByteLru
from dwm_fast.bank.encode import encode_domain
from dwm_fast.bank.file import MaskFile
from dwm_fast.bank.record import DomainMasks, MaskInfo
from dwm_fast.bank.save import Origin
from dwm_fast.errors import InputError, MaskFileError
from dwm_fast.nn.shell import unwrapped

_DOMAINS = "domains."


@dataclass(eq=False)
class Known:
    """One domain: in memory, or known by the place it was loaded from."""

    record: DomainMasks | None
    origin: Origin | None = None
    any_backbone: bool = False
    info: MaskInfo | None = None


class BankModule(nn.Module):
    """The part of MaskBank that torch asks for.

    The network is a submodule, so that parameters, moving and casting are its own. The mode is not: a bank is always in
    eval mode, and leaves its network's mode alone. The state dict has the network's tensors under "backbone." and, for
    each domain, its mask file under "domains.<name>", uint8 (bytes,).
    """

    backbone: nn.Module

    def __init__(self, backbone: nn.Module, memory_budget: int) -> None:
        super().__init__()
        self.training = False
        self._entries: dict[str, Known] = {}
        self._removed: set[tuple[Path, str]] = set()
        self._active: str | None = None
        self._stand_on(unwrapped(backbone), memory_budget)

    def _stand_on(self, backbone: nn.Module, memory_budget: int) -> None:
        self._lock = threading.RLock()
        self._cache: ByteLru[Any] = ByteLru(memory_budget)
        self._net = Backbone(backbone)
        self._stamp = self._net.stamp()
        self._splits: set[Any] = set()
        self.backbone = backbone

    def record(self, domain: str) -> DomainMasks:
        """A domain's bits and other tensors."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Nothing: a bank is always in eval mode, and its network stays in the mode that it has."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self._net.moving():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def to_empty(self, **_: Any) -> Self:
        """InputError: domains belong to the weights of their network."""
        raise InputError("a bank stands on a network with its weights; load those first, then make the bank")

    def _file(self, domain: str) -> Tensor:
        """A domain's mask file, uint8 (bytes,)."""
        return torch.frombuffer(bytearray(encode_domain(self.record(domain))), dtype=torch.uint8)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for domain in self._entries:
            destination[f"{prefix}{_DOMAINS}{domain}"] = self._file(domain)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Take the domains of a state dict, all or none; those that it lacks stay, and count as missing."""
        files = {key: state_dict[key] for key in state_dict if key.startswith(prefix + _DOMAINS)}
        others = {key: value for key, value in state_dict.items() if key not in files}
        arguments = (others, prefix, local_metadata, strict, missing, unexpected, errors)
        super()._load_from_state_dict(*arguments)
        given = {key.removeprefix(prefix + _DOMAINS): file for key, file in files.items()}
        missing.extend(f"{prefix}{_DOMAINS}{domain}" for domain in self._entries if domain not in given)
        try:
            records = {domain: _read(f"{prefix}{_DOMAINS}{domain}", domain, file) for domain, file in given.items()}
            for domain, record in records.items():
                self._net.check_fit(record, f"domain '{domain}'")
        except MaskFileError as error:
            errors.append(str(error))
            return
        with self._lock:
            for domain, record in records.items():
                anywhere = domain in self._entries and self._entries[domain].any_backbone
                self._entries[domain] = Known(record, None, anywhere, record.info)

    def __getstate__(self) -> dict[str, Any]:
        files = {name: (self._file(name), known.origin, known.any_backbone) for name, known in self._entries.items()}
        others = {key: value for key, value in self.__dict__.items() if key not in _MADE_ANEW}
        made = {"_budget": self._cache.budget, "_digests": self._net.digests(), "_removed": set(self._removed)}
        return {**others, **made, "_entries": files}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        others = {key: value for key, value in state.items() if key not in ("_entries", "_budget", "_digests")}
        super().__setstate__(others)  # type: ignore[no-untyped-call]
        self._stand_on(self._modules["backbone"], state["_budget"])  # type: ignore[arg-type]
        self._net.take_digests(state["_digests"])
        self._entries = {}
        for name, (file, origin, anywhere) in state["_entries"].items():
            record = _read(name, name, file)
            self._entries[name] = Known(record, origin, anywhere, record.info)


_MADE_ANEW = ("_lock", "_cache", "_net", "_stamp", "_splits", "_entries")
"""What a bank makes of its network, and no copy takes along."""


def _read(source: str, domain: str, file: Any) -> DomainMasks:
    """A domain from the bytes of its mask file; MaskFileError where they are none, or another domain's."""
    if not isinstance(file, Tensor) or file.dtype != torch.uint8 or file.dim() != 1:
        raise MaskFileError(f"{source}: expected the bytes of a mask file, uint8 of one dimension")
    record = MaskFile(source, file.detach().cpu().contiguous()).load()
    if record.info.domain != domain:
        raise MaskFileError(f"{source}: holds domain '{record.info.domain}'; expected '{domain}'")
    return record
