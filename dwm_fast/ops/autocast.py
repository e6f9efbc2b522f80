"""The dtype in which a matrix product computes under torch.autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A block in which autocast is off; it costs nothing where it is off already."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype that autocast gives a matrix product's operand; the tensor's own where it is off or fp64."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensor.dtype  # by one cheap question: every layer asks
    device_type = tensor.device.type
    if device_type == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def autocast_operands(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias of a matrix product in its compute dtype: autocast's, or the input's own."""
    dtype = autocast_dtype(x)
    if x.dtype is dtype and (bias is None or bias.dtype is dtype):
        return x, bias
    return x.to(dtype), None if bias is None else bias.to(dtype)
