"""How an operation is registered with torch: schema, fake, and one kernel that asks the table of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwm_fast.ops import _backends

_LIBRARY = torch.library.Library("dwm_fast", "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    device_of: Callable[[tuple[Any, ...]], Tensor],
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> str:
    """Register `schema` under the namespace dwm_fast and return its qualified name.

    `device_of(args)` names the tensor whose device decides between backends.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tags)

    def kernel(*args: Any) -> Any:
        return _backends.get(name, device_of(args).device.type)(*args)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dwm_fast::{name}", fake, lib=_LIBRARY)
    return f"dwm_fast::{name}"
