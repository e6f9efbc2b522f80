"""One device a call: what a kernel cannot find out by itself, and would answer with an illegal access."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dwm_fast.errors import InputError


def check_devices(what: str, tensors: Iterable[object], device: torch.device) -> None:
    """InputError unless every tensor among `tensors` is on `device`; anything else there is passed over."""
    for t in tensors:
        if isinstance(t, Tensor) and t.device != device:
            raise InputError(
                f"{what} got tensors on {device} and {t.device}; expected one device: move them with .to('{device}')"
            )


def check_all_devices(what: str, arguments: Iterable[object], device: torch.device) -> None:
    """`check_devices` for arguments that may be lists of tensors."""
    for value in arguments:
        check_devices(what, value if isinstance(value, list | tuple) else (value,), device)
