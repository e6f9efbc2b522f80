"""FoldedGradient: the gradient of a logit tensor whose values are formed when somebody looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dwm_fast.errors import InputError


class Record(Protocol):
    """One backward pass of a network's draw."""

    def take(self, index: int) -> Tensor:
        """Its share of the gradient of logits `index`: a tensor that nobody else writes."""
        ...


Part = tuple[Any, int]
"""A `Record` and the index of the logits in it."""


class Share:
    """What one folded gradient and its aliases have in common.

    Attributes:
        parts: what the backward passes added, in their order; empty once formed or spent.
        value: the gradient, from the first look on.
        spent: whether an optimiser took its step straight from the parts.
    """

    __slots__ = ("__weakref__", "parts", "spent", "value")

    def __init__(self, part: Part) -> None:
        self.parts: list[Part] = [part]
        self.value: Tensor | None = None
        self.spent = False

    def require_unspent(self) -> None:
        """InputError where an optimiser has stepped."""
        if self.spent:
            raise InputError(
                "the gradient of these logits went into the last step of MaskAdam and was never stored; read it "
                "between backward() and step(), call zero_grad() before the next backward(), or use "
                "MaskAdam(..., fold=False)"
            )

    def formed(self) -> Tensor:
        """The gradient's values."""
        self.require_unspent()
        if self.value is None:
            with torch.no_grad():
                value, *others = (record.take(index) for record, index in self.parts)
                for other in others:
                    value.add_(other)
            self.value, self.parts = value, []
        return self.value

    def spend(self) -> None:
        """An optimiser has taken its step from the parts; what they hold is let go."""
        self.parts, self.spent = [], True

    def clear(self, like: Tensor) -> None:
        """Zeros, whatever there was; `like` gives shape, strides, dtype and device."""
        self.parts, self.spent = [], False
        if self.value is not None:
            self.value.zero_()
        else:
            self.value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).zero_()


class FoldedGradient(Tensor):
    """A gradient in `logits.grad` that costs nothing until an operation reads or writes it.

    Shape, strides, dtype and device are known; values are formed by the first operation that needs them, and from
    then on it is an ordinary gradient for all who act on `.grad`: clipping, DDP, scalers, hooks, other optimisers.
    """

    share: Share
    _place: tuple[torch.Size, tuple[int, ...], torch.device]

    @staticmethod
    def __new__(cls, like: Tensor, share: Share) -> FoldedGradient:
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.share, made._place = share, (like.shape, like.stride(), like.device)
        return made

    def __init__(self, like: Tensor, share: Share) -> None:
        """All is done by __new__: torch builds the tensor there."""

    def fits(self, like: Tensor) -> bool:
        """Whether it may stand for the gradient of `like`."""
        return self._place == (like.shape, like.stride(), like.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PAST_THE_DISPATCHER:
                args = _formed(args)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if func is torch.ops.aten.detach.default and isinstance(first, FoldedGradient):
            return FoldedGradient(first, first.share)
        if func is torch.ops.aten.zero_.default and isinstance(first, FoldedGradient):
            first.share.clear(first)
            return first
        out = func(*_formed(args), **_formed(kwargs or {}))
        in_place = isinstance(first, FoldedGradient) and out is first.share.value
        return first if in_place else out


def _formed(tree: Any) -> Any:
    return tree_map_only(FoldedGradient, lambda gradient: gradient.share.formed(), tree)


_PAST_THE_DISPATCHER = frozenset(
    {
        Tensor.numpy,
        Tensor.tolist,
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.share_memory_,
        Tensor.__array__,
        Tensor.__deepcopy__,
        Tensor.__dlpack__,
        Tensor.__format__,
        Tensor.__reduce_ex__,
        Tensor.__repr__,
    }
)
"""Methods that reach for memory without an operation that torch would hand to __torch_dispatch__."""
