"""Which backbone a mask was made for: one checksum over the names, shapes, dtypes and bytes of its weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """SHA-256 of name, dtype, shape and the bytes in logical contiguous order; strides and device do not matter."""
    data = hashlib.sha256(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data.update(flat.numpy().data)
    return data.digest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits for a set of named tensors; a change of one weight by one ulp changes them."""
    return _combine({name: tensor_digest(name, tensor) for name, tensor in tensors.items()})


def _combine(digests: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


class Fingerprinter:
    """Fingerprints of subsets of one model's tensors; each tensor is hashed once until it is written to.

    Args:
        tensors: name -> tensor; the values are held, so a change in place is noticed by torch's version
            counter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._known: dict[str, tuple[int, bytes]] = {}
        self._lock = threading.Lock()

    def stamp(self) -> tuple[int, ...]:
        """A cheap value that changes when one of the tensors is written to in place."""
        return tuple(tensor._version for tensor in self._tensors.values())

    def of(self, names: Iterable[str]) -> str:
        """Fingerprint of the named tensors."""
        with self._lock:
            return _combine({name: self._digest(name) for name in names})

    def _digest(self, name: str) -> bytes:
        tensor = self._tensors[name]
        version, digest = self._known.get(name, (-1, b""))
        if version != tensor._version:
            version, digest = tensor._version, tensor_digest(name, tensor)
            self._known[name] = (version, digest)
        return digest

    def inherit(self, other: Fingerprinter) -> None:
        """Take over the digests that `other` knows: the same tensors, since moved or cast on purpose."""
        self._known = {name: (self._tensors[name]._version, digest) for name, (_, digest) in other._known.items()}
