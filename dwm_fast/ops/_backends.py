"""Who computes an operation: the table of backends, and the rule that picks one.

An operation's name says what is computed; its backend says who computes it. Implementations are imported when
an operation first needs them, so importing dwm_fast needs torch alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from dwm_fast.errors import BackendUnavailable, InputError

BACKENDS = ("reference", "cpp", "triton", "cuda")
"""Every backend name a user may ask for."""

_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}

_REFERENCE_ONLY = frozenset({"advance"})

_targets: dict[tuple[str, str], str] = {}

# Of the process, not of the thread: autograd runs the backward of CUDA tensors on threads of its own.
_forced: str | None = None


def register(op: str, backend: str, target: str) -> None:
    """Name the implementation of `op` by `backend` as "module:function"; it is imported at its first use."""
    _targets[op, backend] = target


def register_table(module: str, backend: str, ops: tuple[str, ...]) -> None:
    """Name functions of `module`, one per operation and called like it, as implementations by `backend`."""
    for op in ops:
        register(op, backend, f"{module}:{op}")


@functools.cache
def _probe(target: str) -> Callable[..., Any] | str:
    """The function that `target` names, or the reason why it cannot be had; looked up once a process."""
    module, _, name = target.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:
        # Whatever keeps a backend from loading is a reason to take the next, never a failure of dwm_fast.
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return function


@functools.cache
def _warn_once(backend: str, reason: str) -> None:
    warnings.warn(f"dwm_fast: backend '{backend}' is not used: {reason}", RuntimeWarning, stacklevel=3)


SAMPLE_OPS = ("sample", "sample_backward")
BIT_OPS = ("pack", "unpack", "apply", "count", "combine", "overlap")
UPDATE_OPS = ("mask_adam", "frozen_adamw", "frozen_sgd")
LINEAR_OPS = ("linear", "linear_packed", "linear_input_grad", "linear_packed_input_grad")
LINEAR_GRAD_OPS = ("linear_mask_grad", "linear_packed_weight_grad")
CONV_OPS = (
    "conv2d", "conv2d_packed", "conv2d_input_grad", "conv2d_packed_input_grad", "conv2d_mask_grad",
    "conv2d_packed_weight_grad",
)  # fmt: skip
BANK_OPS = ("bank_linear", "bank_conv2d")
_EXTENSION = "dwm_fast.ops._extension"

register_table("dwm_fast.kernels.sample", "triton", SAMPLE_OPS)
register_table("dwm_fast.kernels.bits", "triton", BIT_OPS)
register_table("dwm_fast.kernels.update", "triton", UPDATE_OPS)
register_table("dwm_fast.kernels.linear", "triton", LINEAR_OPS)
register_table("dwm_fast.kernels.linear_grad", "triton", LINEAR_GRAD_OPS)
register_table("dwm_fast.kernels.conv2d", "triton", CONV_OPS)
register_table("dwm_fast.kernels.bank", "triton", BANK_OPS)
register_table(_EXTENSION, "cpp", (*SAMPLE_OPS, *BIT_OPS, *UPDATE_OPS, "linear_packed", "bank_linear"))
register_table("dwm_fast.ops._extension_cuda", "cuda", BIT_OPS)


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


def get(op: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `op` for tensors on `device_type` ("cpu", "cuda", ...)."""
    name = forced_backend()
    if name is not None and op not in _REFERENCE_ONLY:
        return _forced_implementation(op, name, device_type)
    order = _ORDER.get(device_type, ("reference",))
    if device_type == "cuda" and op in BIT_OPS:
        order = ("cuda", "triton", "reference")
    return _first_available(op, order)


def _devices(name: str) -> tuple[str, ...]:
    """Device types whose tensors a backend takes; empty for any."""
    if name == "triton":
        return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    return {"cpp": ("cpu",), "cuda": ("cuda",)}.get(name, ())


def _forced_implementation(op: str, name: str, device_type: str) -> Callable[..., Any]:
    devices = _devices(name)
    if devices and device_type not in devices:
        hint = " or set TRITON_INTERPRET=1 before the start" if name == "triton" else ""
        raise BackendUnavailable(
            f"backend '{name}' was asked for and given a tensor on '{device_type}', it computes on "
            f"{' and '.join(devices)}; move the tensors{hint}, or use 'reference'"
        )
    target = _targets.get((op, name))
    if target is None:
        raise BackendUnavailable(
            f"backend '{name}' was asked for and has no '{op}'; leave the choice open or use 'reference'"
        )
    found = _probe(target)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend '{name}' was asked for and cannot run here: {found}")
    return found


def _first_available(op: str, order: tuple[str, ...]) -> Callable[..., Any]:
    for name in order:
        target = _targets.get((op, name))
        if target is None:
            continue
        found = _probe(target)
        if not isinstance(found, str):
            return found
        _warn_once(name, found)
    raise BackendUnavailable(f"no backend can run '{op}' here; 'reference' is not registered")


def availability(op: str) -> dict[str, str]:
    """Backend name -> "ready" or the reason why `op` cannot run there; imports every candidate."""
    found = {backend: _probe(target) for (name, backend), target in _targets.items() if name == op}
    return {backend: result if isinstance(result, str) else "ready" for backend, result in found.items()}


def chosen(op: str, device_type: str) -> str:
    """Name of the backend that computes `op` for tensors on `device_type`."""
    function = get(op, device_type)
    names = [backend for (name, backend), target in _targets.items() if name == op and _probe(target) is function]
    return names[0]
