"""How an operation is registered with torch: schema, fake, and one kernel that asks the table of backends."""

from __future__ import annotations

from collections.abc import Callable
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
    device_of: Callable[[tuple[Any, ...]], Tensor],
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> str:
    """Register `schema` under the namespace dwm_fast and return its qualified name.

    `reference` is the specification in plain PyTorch, the backend that runs anywhere. `device_of(args)` names the
    tensor whose device decides between backends. Autocast is off inside: an operation computes in the dtypes it was
    given, and whoever calls it reads autocast's.
    """
    name = schema.partition("(")[0]
    backends.REFERENCES[name] = reference
    _LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]

    def kernel(*args: Any) -> Any:
        device_type = device_of(args).device.type
        with without_autocast(device_type):
            return backends.get(name, backends.chosen(name, device_type))(*args)

    def shapes(*args: Any) -> Any:
        with without_autocast(device_of(args).device.type):
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
