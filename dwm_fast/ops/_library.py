"""How an operation is registered with torch: schema, fake, and one kernel that asks the table of backends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops import _backends

_LIBRARY = torch.library.Library("dwm_fast", "DEF")  # type: ignore[no-untyped-call]


def _no_autocast(device_type: str) -> AbstractContextManager[None]:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype that autocast gives a matrix product's operand; the tensor's own where it is off or fp64."""
    device_type = tensor.device.type
    if device_type == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def autocast_operands(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias of a matrix product in its compute dtype: autocast's, or the input's own."""
    dtype = autocast_dtype(x)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    device_of: Callable[[tuple[Any, ...]], Tensor],
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> str:
    """Register `schema` under the namespace dwm_fast and return its qualified name.

    `device_of(args)` names the tensor whose device decides between backends. Autocast is off inside: an
    operation computes in the dtypes it was given, and whoever calls it reads autocast's.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]

    def kernel(*args: Any) -> Any:
        device_type = device_of(args).device.type
        with _no_autocast(device_type):
            return _backends.get(name, device_type)(*args)

    def shapes(*args: Any) -> Any:
        with _no_autocast(device_of(args).device.type):
            return fake(*args)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dwm_fast::{name}", shapes, lib=_LIBRARY)
    return f"dwm_fast::{name}"


def refuse_double_backward(name: str) -> None:
    """Give the operation `name`, a backward pass, a gradient that is one clear error."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            f"torch.ops.dwm_fast.{name} is a backward pass and has no gradient of its own: masked products are "
            "differentiable once; leave out create_graph=True, or differentiate a plain layer over "
            "ops.sample's masked weight"
        )

    torch.library.register_autograd(f"dwm_fast::{name}", refuse)
