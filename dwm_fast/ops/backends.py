"""Who computes an operation: the table of backends, and the rule that picks one.

An operation's name says what is computed; its backend says who computes it. The table is `REFERENCES` and the three
functions below it, which import their implementations when an operation first needs them: importing dwm_fast needs
torch alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from dwm_fast.errors import BackendUnavailable, InputError

Implementation = Callable[..., Any]

BACKENDS = ("reference", "cpp", "triton", "cuda")
"""Every backend name a user may ask for."""

BIT_OPS = ("pack", "unpack", "apply", "count", "combine", "overlap")

_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}
_ORDER_OF_BITS = ("cuda", "triton", "reference")
_WALKED = ("pack", "apply")
"""Bit operations that read or write a network's weights or flags: Triton's walk is the faster one on a GPU."""

# Of the process, not of the thread: autograd runs the backward of CUDA tensors on threads of its own.
_forced: str | None = None


REFERENCES: dict[str, Implementation] = {}
"""Plain PyTorch, on any device: the specification of every operation, in its own file, entered by `define`."""


def _cpp() -> dict[str, Implementation]:
    """The C++ extension, on CPU tensors; compiled at first need."""
    from dwm_fast.ops import _extension, _extension_soft

    return {
        "sample": _extension.sample,
        "sample_backward": _extension.sample_backward,
        "pack": _extension.pack,
        "unpack": _extension.unpack,
        "apply": _extension.apply,
        "count": _extension.count,
        "overlap": _extension.overlap,
        "mask_adam": _extension.mask_adam,
        "coded_adam": _extension.coded_adam,
        "frozen_adamw": _extension.frozen_adamw,
        "frozen_sgd": _extension.frozen_sgd,
        "kernel_soft": _extension_soft.kernel_soft,
        "kernel_soft_backward": _extension_soft.kernel_soft_backward,
        "raise_importance": _extension_soft.raise_importance,
        "soft_masked_sgd": _extension_soft.soft_masked_sgd,
        "linear_packed": _extension.linear_packed,
        "linear_kept": _extension.linear_kept,
        "bank_linear": _extension.bank_linear,
        "bank_linear_union": _extension.bank_linear_union,
    }


def _triton() -> dict[str, Implementation]:
    """Triton kernels, on NVIDIA GPUs; under TRITON_INTERPRET=1 on CPU tensors too."""
    from dwm_fast.kernels import (
        bank,
        bits,
        coded_adam,
        conv2d,
        kernel_soft,
        linear,
        linear_grad,
        patterns,
        sample,
        soft_mask,
        update,
    )

    return {
        "sample": sample.sample,
        "sample_backward": sample.sample_backward,
        "pack": bits.pack,
        "unpack": bits.unpack,
        "apply": bits.apply,
        "count": bits.count,
        "combine": bits.combine,
        "overlap": bits.overlap,
        "mask_adam": update.mask_adam,
        "coded_adam": coded_adam.coded_adam,
        "frozen_adamw": update.frozen_adamw,
        "frozen_sgd": update.frozen_sgd,
        "pattern_mask": patterns.pattern_mask,
        "pattern_mask_backward": patterns.pattern_mask_backward,
        "kernel_soft": kernel_soft.kernel_soft,
        "kernel_soft_backward": kernel_soft.kernel_soft_backward,
        "raise_importance": soft_mask.raise_importance,
        "soft_masked_sgd": soft_mask.soft_masked_sgd,
        "linear": linear.linear,
        "linear_input_grad": linear.linear_input_grad,
        "linear_mask_grad": linear_grad.linear_mask_grad,
        "linear_packed": linear.linear_packed,
        "linear_packed_input_grad": linear.linear_packed_input_grad,
        "linear_packed_weight_grad": linear_grad.linear_packed_weight_grad,
        "conv2d": conv2d.conv2d,
        "conv2d_input_grad": conv2d.conv2d_input_grad,
        "conv2d_mask_grad": conv2d.conv2d_mask_grad,
        "conv2d_packed": conv2d.conv2d_packed,
        "conv2d_packed_input_grad": conv2d.conv2d_packed_input_grad,
        "conv2d_packed_weight_grad": conv2d.conv2d_packed_weight_grad,
        "bank_linear": bank.bank_linear,
        "bank_conv2d": bank.bank_conv2d,
    }


def _cuda() -> dict[str, Implementation]:
    """The CUDA extension, on NVIDIA GPUs: operations on bits and kept weights; compiled at first need."""
    from dwm_fast.ops import _extension_cuda

    return {
        "pack": _extension_cuda.pack,
        "unpack": _extension_cuda.unpack,
        "apply": _extension_cuda.apply,
        "count": _extension_cuda.count,
        "combine": _extension_cuda.combine,
        "overlap": _extension_cuda.overlap,
        "linear_kept": _extension_cuda.linear_kept,
    }


_TABLE = {"reference": lambda: REFERENCES, "cpp": _cpp, "triton": _triton, "cuda": _cuda}


@functools.cache
def _loaded(backend: str) -> dict[str, Implementation] | str:
    """What a backend implements, or the reason why it cannot be had; looked up once a process."""
    try:
        return _TABLE[backend]()
    except Exception as error:
        # Whatever keeps a backend from loading is a reason to take the next, never a failure of dwm_fast.
        return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def _warn_once(backend: str, reason: str) -> None:
    warnings.warn(f"dwm_fast: backend '{backend}' is not used: {reason}", RuntimeWarning, stacklevel=3)


def forced_backend() -> str | None:
    """The backend a user asked for: by `use_backend`, else by DWM_FAST_BACKEND; None when nobody did."""
    if _forced is not None:
        return _forced
    name = os.environ.get("DWM_FAST_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise InputError(f"DWM_FAST_BACKEND is '{name}'; expected one of {', '.join(BACKENDS)}; set one or unset it")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every operation inside the block onto one backend; None takes back an outer block's choice.

    It holds for the whole process, backward passes inside the block included.

    Raises InputError for a name that is not in BACKENDS. An operation that the backend cannot run raises
    BackendUnavailable when it is called.
    """
    if name is not None and name not in BACKENDS:
        raise InputError(f"use_backend got '{name}'; expected one of {', '.join(BACKENDS)}, or None")
    global _forced
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def chosen(op: str, device_type: str) -> str:
    """Name of the backend that computes `op` for tensors on `device_type` ("cpu", "cuda", ...)."""
    return chosen_for(op, device_type)[0]


def chosen_for(op: str, device_type: str) -> tuple[str, Implementation]:
    """The chosen backend's name, and the function by which it computes `op`."""
    forced = forced_backend()
    if forced is not None:
        return forced, _asked_for(op, forced, device_type)
    bits_on_gpu = device_type == "cuda" and op in BIT_OPS and op not in _WALKED
    for name in _ORDER_OF_BITS if bits_on_gpu else _ORDER.get(device_type, ("reference",)):
        found = _loaded(name)
        if isinstance(found, str):
            _warn_once(name, found)
        elif op in found:
            return name, found[op]
    raise BackendUnavailable(f"no backend can run '{op}' here; 'reference' does not have it")


def _devices(name: str) -> tuple[str, ...]:
    """Device types whose tensors a backend takes; empty for any."""
    if name == "triton":
        return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    return {"cpp": ("cpu",), "cuda": ("cuda",)}.get(name, ())


def _asked_for(op: str, name: str, device_type: str) -> Implementation:
    """How `name`, a backend that a user asked for, computes `op`; BackendUnavailable: why it cannot there."""
    devices = _devices(name)
    if devices and device_type not in devices:
        hint = " or set TRITON_INTERPRET=1 before the start" if name == "triton" else ""
        raise BackendUnavailable(
            f"backend '{name}' was asked for and given a tensor on '{device_type}', it computes on "
            f"{' and '.join(devices)}; move the tensors{hint}, or use 'reference'"
        )
    found = _loaded(name)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend '{name}' was asked for and cannot run here: {found}")
    if op not in found:
        raise BackendUnavailable(
            f"backend '{name}' was asked for and has no '{op}'; leave the choice open or use 'reference'"
        )
    return found[op]


def availability(op: str) -> dict[str, str]:
    """Backend name -> "ready" or the reason why `op` cannot run there; imports every candidate."""
    found = {backend: _loaded(backend) for backend in _TABLE}
    return {b: f if isinstance(f, str) else "ready" for b, f in found.items() if isinstance(f, str) or op in f}
