"""A layer once more under another class, and what moves with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def recast(layer: nn.Module, cls: type[_Module]) -> _Module:
    """A module of class `cls` with the parameters, hooks and attributes of `layer`, in tables of its own."""
    module = cls.__new__(cls)
    module.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    return module


def drop_mask(layer: nn.Module) -> None:
    """Take from a recast masked layer what only a masked layer has."""
    for name in ("mask_logits", "rng_state", "tau", "kind", "layer_index", "unit", "_staged"):
        delattr(layer, name)
    for name in ("_seed", "_awaits_weights", "_unfilled", "_run"):
        vars(layer).pop(name, None)


def keep_dtype(fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """`fn` as `nn.Module._apply` takes it, except that the tensors of `kept` go without a change of dtype."""
    kept_ids = {id(t) for t in kept}

    def moved(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if id(tensor) not in kept_ids or out.dtype == tensor.dtype:
            return out
        return torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)

    return moved
