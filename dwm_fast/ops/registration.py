"""How an operation is registered with torch: schema, fake, and one kernel that asks the table of backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops import backends
from dwm_fast.ops.autocast import without_autocast

_LIBRARY = torch.library.Library("dwm_fast", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    device_at: int = 0,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> str:
    """Register `schema` under the namespace dwm_fast and return its qualified name.

    `reference` is the specification in plain PyTorch, the backend that runs anywhere. The device of argument number
    `device_at` (of its first tensor, where it is a list) decides between backends. Autocast is off inside: an operation
    computes in the dtypes it was given, and whoever calls it reads autocast's.
    """
    name = schema.partition("(")[0]
    backends.REFERENCES[name] = reference
    _LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]

    def kernel(*args: Any) -> Any:
        device_type = _device_type(args[device_at])
        with without_autocast(device_type):
            return backends.get(name, backends.chosen(name, device_type))(*args)

    def shapes(*args: Any) -> Any:
        with without_autocast(_device_type(args[device_at])):
            return fake(*args)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dwm_fast::{name}", shapes, lib=_LIBRARY)
    return f"dwm_fast::{name}"


def _device_type(given: Tensor | Sequence[Tensor]) -> str:
    """Where a tensor lies, or the first of a list; an empty list is on the CPU."""
    if isinstance(given, Tensor):
        return given.device.type
    return given[0].device.type if given else "cpu"


def refuse_double_backward(name: str) -> None:
    """Give the operation `name`, a backward pass, a gradient that is one clear error."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            f"torch.ops.dwm_fast.{name} is a backward pass and has no gradient of its own: masked products are "
            "differentiable once; leave out create_graph=True, or differentiate a plain layer over "
            "ops.sample's masked weight"
        )

    torch.library.register_autograd(f"dwm_fast::{name}", refuse)
