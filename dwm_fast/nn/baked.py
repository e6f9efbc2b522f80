"""Masked weights that packed convolutions keep on a CPU: unpacked once, not at every call, under a bound of bytes."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.ops import backends, ways
from dwm_fast.ops.layout import order_of

BUDGET = 256 << 20
"""Bytes that all of a process may keep; a layer that comes later unpacks its weight at every call, as on a GPU."""
_SAMPLES = 64
"""Evenly spaced elements that are compared in each call: writing through `.data` leaves no other trace."""

_lock = threading.RLock()  # a finalizer may run inside it
_nbytes = 0


def kept_bytes() -> int:
    """Bytes that are kept now."""
    return _nbytes


class Baked:
    """The masked weight of one layer in one dtype, and what it was made of."""

    def __init__(self, weight: Tensor, bits: Tensor, dtype: torch.dtype) -> None:
        self.made_of = _marks(weight, bits, dtype)
        flat = weight.detach().as_strided((weight.numel(),), (1,))
        self._sampled = flat[:: max(1, weight.numel() // _SAMPLES)]
        self._samples = self._sampled.clone()
        self.masked = ops.apply(bits, [weight.detach()])[0].to(dtype)

    def is_current(self, weight: Tensor, bits: Tensor, dtype: torch.dtype) -> bool:
        """Whether weight, bits and dtype are still those that it was made of."""
        return self.made_of == _marks(weight, bits, dtype) and torch.equal(self._sampled, self._samples)


def _marks(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    versions = (weight.data_ptr(), weight._version, bits.data_ptr(), bits._version)
    return (*versions, weight.shape, weight.stride(), weight.dtype, dtype)


def obstacle(weight: Tensor, bits: Tensor) -> str:
    """Why the masked weight of a layer is not kept, or ""."""
    if weight.device.type != "cpu":
        return "masked weights are kept on a CPU alone"
    if backends.forced_backend() is not None or ways.forced_way() == ways.ONE_PASS:
        return "a backend or a way is forced"
    if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
        return "it is made anew where the call is compiled or a gradient reaches it"
    plain = type(weight) in (Tensor, torch.nn.Parameter) and order_of(weight) is not None
    if weight.is_inference() or bits.is_inference() or not plain:
        return "its changes could not be noticed"
    return ""


def baked(old: Baked | None, weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Baked | None:
    """`old` where it is current, else a new one; None where none may be kept."""
    global _nbytes
    if obstacle(weight, bits):
        return None
    if old is not None and old.is_current(weight, bits, dtype):
        return old
    nbytes = weight.numel() * dtype.itemsize
    with _lock:
        given_back = old.masked.numel() * old.masked.element_size() if old is not None else 0
        if _nbytes - given_back + nbytes > BUDGET:
            return None
        _nbytes += nbytes
    # Under inference mode it would be a tensor that no later call can take a gradient through.
    try:
        with torch.inference_mode(False), torch.no_grad():
            made = Baked(weight, bits, dtype)
    except BaseException:
        _give_back(nbytes)
        raise
    weakref.finalize(made, _give_back, nbytes)
    return made


def _give_back(nbytes: int) -> None:
    global _nbytes
    with _lock:
        _nbytes -= nbytes
