"""Masked weights that packed layers keep on a CPU: made once, not at every call, under a bound of bytes."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.ops import backends, ways
from dwm_fast.ops.filters import Blocked, Filters, How, Plain, fit, fit_blocked
from dwm_fast.ops.layout import order_of

BUDGET = 256 << 20
"""Bytes that all of a process may keep; a layer that comes later unpacks its weight at every call, as on a GPU."""
_SAMPLES = 64
"""Evenly spaced weights, and bytes of bits, that are compared in each call: writing through `.data` leaves no other
trace."""

_lock = threading.RLock()  # a finalizer may run inside it
_nbytes = 0


def kept_bytes() -> int:
    """Bytes that are kept now."""
    return _nbytes


Form = type[Filters] | type[Blocked] | None


class Baked:
    """The masked weight of one layer, and what it was made of: laid out for the vendor, or plain.

    form: the class that lays it out for inputs like `x`, None for plain.
    """

    def __init__(
        self, weight: Tensor, bits: Tensor, dtype: torch.dtype, form: Form, x: Tensor | None, how: How
    ) -> None:
        self._weight, self._bits, self._marks = weight, bits, _marks(weight, bits, dtype)
        self._sampled = [_sampled(weight), _sampled(bits)]
        self._samples = [sampled.clone() for sampled in self._sampled]
        masked = ops.apply(bits, [weight.detach()])[0].to(dtype)
        self._form = Plain(masked) if form is None or x is None else form(masked, x, how)
        self.nbytes = masked.numel() * dtype.itemsize if isinstance(self._form, Plain) else self._form.nbytes

    def is_current(self, weight: Tensor, bits: Tensor, dtype: torch.dtype, how: Any) -> bool:
        """Whether weight, bits, dtype and, where it counts, stride and padding are still those that it was made of."""
        same = self._weight is weight and self._bits is bits and self._marks == _marks(weight, bits, dtype)
        same = same and (type(self._form) is not Blocked or self._form.how == how)
        return same and all(map(torch.equal, self._sampled, self._samples))

    def conv2d(self, x: Tensor, bias: Tensor | None, how: How) -> Tensor:
        """The convolution of x, in the compute dtype."""
        form = self._form
        return form.conv2d(x) if isinstance(form, Blocked) else form.conv2d(x, bias, how)

    def plain(self) -> Tensor:
        """The masked weight, where it is not laid out."""
        assert isinstance(self._form, Plain)
        return self._form.weight


def _sampled(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))[:: max(1, tensor.numel() // _SAMPLES)]


def _marks(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    places = (weight.data_ptr(), weight._version, bits.data_ptr(), bits._version)
    return (*places, weight.shape, weight.stride(), weight.dtype, dtype)


def obstacle(weight: Tensor, bits: Tensor) -> str:
    """Why the masked weight of a layer is not kept in a call that is not compiled, or ""."""
    return _obstacle_now(weight) or _obstacle_ever(weight, bits)


def _obstacle_now(weight: Tensor) -> str:
    if weight.device.type != "cpu":
        return "masked weights are kept on a CPU alone"
    if backends.forced_backend() is not None or ways.forced_way() == ways.ONE_PASS:
        return "a backend or a way is forced"
    if weight.requires_grad and torch.is_grad_enabled():
        return "it is made anew where a gradient reaches it"
    return ""


def _obstacle_ever(weight: Tensor, bits: Tensor) -> str:
    plain = type(weight) in (Tensor, torch.nn.Parameter) and order_of(weight) is not None
    return "its changes could not be noticed" if weight.is_inference() or bits.is_inference() or not plain else ""


class Kept:
    """What one layer keeps: filters laid out for channels_last inputs or for others, its plain weight, or all."""

    def __init__(self) -> None:
        self._baked: dict[Form, Baked] = {}

    def holds_any(self) -> bool:
        """Whether something is kept."""
        return bool(self._baked)

    def conv2d(self, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, how: How) -> Tensor | None:
        """The convolution of x, in the compute dtype as `bias` is, by what is kept; None where nothing may be."""
        if _obstacle_now(weight):
            return None
        laid: Form
        if x.is_contiguous():
            laid = Blocked if fit_blocked(x, weight, bias, how) else None
        else:
            laid = Filters if fit(x, weight, bias, how) else None
        found = self._current(weight, bits, x.dtype, laid, x, how)
        return None if found is None else found.conv2d(x, bias, how)

    def masked(self, weight: Tensor, bits: Tensor) -> Tensor | None:
        """The plain masked weight in the weight's dtype, by what is kept; None where nothing may be."""
        if _obstacle_now(weight):
            return None
        found = self._current(weight, bits, weight.dtype, None, None, ())
        return None if found is None else found.plain()

    def _current(
        self, weight: Tensor, bits: Tensor, dtype: torch.dtype, laid: Form, x: Tensor | None, how: Any
    ) -> Baked | None:
        found = self._baked.get(laid)
        if found is None or not found.is_current(weight, bits, dtype, how):
            found = None if _obstacle_ever(weight, bits) else self._make(weight, bits, dtype, laid, x, how)
        return found

    def _make(
        self, weight: Tensor, bits: Tensor, dtype: torch.dtype, laid: Form, x: Tensor | None, how: Any
    ) -> Baked | None:
        self._baked.pop(laid, None)  # its bytes are free for what takes its place
        # Under inference mode it would be a tensor that no later call can take a gradient through.
        with torch.inference_mode(False), torch.no_grad():
            made = Baked(weight, bits, dtype, laid, x, how) if _has_room(weight, dtype) else None
        if made is None or not _take(made):
            return None
        self._baked[laid] = made
        return made


def _has_room(weight: Tensor, dtype: torch.dtype) -> bool:
    return _nbytes + weight.numel() * dtype.itemsize <= BUDGET


def _take(made: Baked) -> bool:
    """Count the bytes of `made` from now until it goes; False where they are too many."""
    global _nbytes
    with _lock:
        if _nbytes + made.nbytes > BUDGET:
            return False
        _nbytes += made.nbytes
    weakref.finalize(made, _give_back, made.nbytes)
    return True


def _give_back(nbytes: int) -> None:
    global _nbytes
    with _lock:
        _nbytes -= nbytes
