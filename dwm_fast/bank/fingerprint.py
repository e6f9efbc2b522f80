"""Which backbone a mask was made for: one checksum over the names, shapes, dtypes and bytes of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
    return combined_digest({name: tensor_digest(name, tensor) for name, tensor in tensors.items()})


def combined_digest(digests: Mapping[str, bytes]) -> str:
    """The fingerprint of tensors whose digests are known."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
