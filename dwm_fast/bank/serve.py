"""Mixed batches: every sample under its own domain, over one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dwm_fast.bank.layers import Batch, NotByLayer, current_batch
from dwm_fast.bank.stores import Store
from dwm_fast.errors import InputError

RunOne = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any]
"""Runs the network under one named domain."""


class Served:
    """A fixed set of domains, ready for mixed batches. `MaskBank.serve` makes it.

    Calling it with `ids`, int64 (B,) on the input's device, gives sample i the domain names[ids[i]]. On a GPU
    nothing waits for the device, so a CUDA graph may capture the call and be replayed with other ids in
    place. With `layerwise` False (see docs/bank.md for when) the domains run one after the other, and ids
    are read.

    Attributes:
        names: the domains, in the order of their ids.
        layerwise: whether layers look domains up per sample.
        stores: by name, kept weights that few rows are multiplied with in the place of a large weight.
    """

    stores: Mapping[str, Store] = MappingProxyType({})

    def __init__(
        self,
        names: Sequence[str],
        twin: nn.Module | None,
        run_one: RunOne,
        is_current: Callable[[], bool],
        splits: set[Any],
    ) -> None:
        self.names = tuple(names)
        self._is_current = is_current
        self._splits = splits
        self._twin = twin
        self._run_one = run_one

    @property
    def layerwise(self) -> bool:
        """Whether one pass of the network serves all domains."""
        return self._twin is not None

    def __call__(self, *args: Any, ids: Tensor, **kwargs: Any) -> Any:
        """The network's output; sample i of every tensor argument whose first size is B is under names[ids[i]].

        Where the domains' heads have different class counts, outputs are as wide as the widest, the missing
        classes -inf.

        Raises:
            InputError: ids of another form, the backbone has changed since `MaskBank.serve`, what the network
                gives for a sample depends on the others in its batch, or lies in objects that are no dataclass.
        """
        if not self._is_current():
            raise InputError("the backbone has changed since these domains were prepared; call bank.serve(names) again")
        return self.run(ids, args, kwargs)

    def run(self, ids: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The same, for a caller that knows the backbone to be as it was."""
        if ids.dtype != torch.int64 or ids.dim() != 1 or ids.numel() == 0:
            raise InputError(f"ids: given {ids.dtype} of shape {tuple(ids.shape)}; expected int64 of shape (B,), B > 0")
        _refuse_closed((args, kwargs), ids.numel(), "is given")
        order = torch.argsort(ids, stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        args, kwargs = _take((args, kwargs), order)
        rows = ids[order]
        twin = self._twin  # another thread may find meanwhile that it does not serve
        result = NotImplemented if twin is None else self._layerwise(twin, rows, args, kwargs)
        if result is not NotImplemented and not self._is_split(result, rows, args, kwargs):
            self._twin, result = None, NotImplemented
        if result is NotImplemented:
            result = self._one_by_one(rows, args, kwargs)
            if not self._is_split(result, rows, args, kwargs):
                raise InputError(
                    "what the network gives for a sample depends on the other samples of its batch, or its first "
                    "dimension is not the batch: a mixed batch cannot be split; call the bank with one domain at a time"
                )
        _refuse_closed(result, ids.numel(), "gives")
        return _take(result, places)

    def _is_split(self, result: Any, rows: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the last sample alone gets what it got in its batch; asked once for a network, on the CPU.

        A part of one sample is asked for with that sample twice. Networks that draw random numbers in eval(), and
        those that cannot be called with one sample, are taken at their word.
        """
        key = (self.layerwise, *(x.dim() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        if rows.device.type != "cpu" or rows.numel() < 2 or key in self._splits:
            return True
        alone = not self.layerwise and int(rows[-2]) != int(rows[-1])
        for copies in (2,) if alone else (1, 2):
            some_args, some_kwargs = _take((args, kwargs), torch.full((copies,), rows.numel() - 1), rows.numel())
            try:
                with torch.no_grad():
                    found, again = (self._run_one(self.names[int(rows[-1])], some_args, some_kwargs) for _ in range(2))
            except Exception:  # whatever the network raises: it says nothing about the batch
                continue
            if _agree(found, again, _close) and not _agree(result, found, partial(_same_rows, copies)):
                return False
            break
        self._splits.add(key)
        return True

    def _layerwise(self, twin: nn.Module, rows: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One pass for all domains; NotImplemented, for good, when the network turns out not to allow it."""
        marks = torch.arange(len(self.names) + 1, device=rows.device)
        offsets = torch.searchsorted(rows, marks)
        bounds: tuple[int, ...] = ()
        if rows.device.type == "cpu":
            bounds = tuple(offsets.tolist())
            self._check_range(rows)
        token = current_batch.set(Batch(offsets, rows, rows.numel(), bounds))
        try:
            return twin(*args, **kwargs)
        except (NotByLayer, AttributeError):
            self._twin = None
            return NotImplemented
        finally:
            current_batch.reset(token)

    def _one_by_one(self, rows: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._check_range(rows)
        found, counts = torch.unique_consecutive(rows, return_counts=True)
        results, start = [], 0
        for domain, count in zip(found.tolist(), counts.tolist(), strict=True):
            part_args, part_kwargs = _narrow((args, kwargs), rows.numel(), start, count)
            results.append(self._run_one(self.names[domain], part_args, part_kwargs))
            start += count
        return _map(lambda *parts: _join(parts), results[0], *results[1:])

    def _check_range(self, rows: Tensor) -> None:
        low, high = int(rows[0]), int(rows[-1])
        if low < 0 or high >= len(self.names):
            raise InputError(f"ids lie in [{low}, {high}]; expected 0 to {len(self.names) - 1}")


def _map(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """As pytree.tree_map, which takes an object of a dataclass that nobody registered for a leaf."""

    def of(leaf: Any, *more: Any) -> Any:
        if not _is_record(leaf):
            return fn(leaf, *more)
        parts = {f.name: [getattr(part, f.name) for part in (leaf, *more)] for f in fields(leaf) if f.init}
        return replace(leaf, **{name: _map(fn, *values) for name, values in parts.items()})

    return pytree.tree_map(of, tree, *others)


def _leaves(tree: Any) -> list[Any]:
    """As pytree.tree_leaves; see `_map`."""
    leaves = []
    for leaf in pytree.tree_leaves(tree):
        leaves += _leaves([getattr(leaf, f.name) for f in fields(leaf)]) if _is_record(leaf) else [leaf]
    return leaves


def _is_record(leaf: Any) -> bool:
    return is_dataclass(leaf) and not isinstance(leaf, type)


def _refuse_closed(tree: Any, size: int, what: str) -> None:
    """InputError for an object that is no tree and holds a tensor of the batch, which nobody could put in order."""
    for leaf in _leaves(tree):
        inside = [] if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
        if any(_in_batch(value, size) for value in inside):
            raise InputError(
                f"the network {what} a {type(leaf).__name__}, an object whose tensors a mixed batch cannot put in "
                "order; expected tensors, in tuples, lists, dictionaries or dataclasses; or call the bank with one "
                "domain at a time"
            )


def _take(tree: Any, order: Tensor, size: int | None = None) -> Any:
    """Pick rows of dim 0 of every tensor of the tree whose first size is the batch's, `order`'s own by default."""
    batch = order.numel() if size is None else size

    def take(leaf: Any) -> Any:
        return leaf[order] if _in_batch(leaf, batch) else leaf

    return _map(take, tree)


def _agree(a: Any, b: Any, same: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether all tensors of two outputs are the `same`."""
    pairs = zip(_leaves(a), _leaves(b), strict=False)
    return all(same(x.detach(), y.detach()) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))


def _same_rows(copies: int, whole: Tensor, found: Tensor) -> bool:
    """Whether `found`, the output for copies of one sample, says of each what the last row of `whole` says.

    Of classes, the last dimension, `found` may have fewer; those that it lacks are -inf in `whole`.
    """
    if _close(whole, found):
        return True  # no sample's: a constant, say
    if whole.dim() == 0 or found.dim() != whole.dim() or found.shape[0] != copies:
        return False
    row = whole[-1:]
    if row.dim() > 1 and found.shape[-1] < row.shape[-1]:
        row, rest = row[..., : found.shape[-1]], row[..., found.shape[-1] :]
        if not bool((rest == -torch.inf).all()):
            return False
    return row.shape[1:] == found.shape[1:] and _close(row.expand_as(found), found)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point() or not a.numel():
        return a.shape == b.shape
    budget = max(1e-3, 16 * torch.finfo(a.dtype).eps)
    scale = float(a.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    return torch.allclose(a, b, rtol=budget, atol=budget * scale, equal_nan=True)


def _narrow(tree: Any, size: int, start: int, count: int) -> Any:
    def narrow(leaf: Any) -> Any:
        return leaf.narrow(0, start, count) if _in_batch(leaf, size) else leaf

    return _map(narrow, tree)


def _in_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _join(parts: Sequence[Any]) -> Any:
    """Outputs of several domains behind one another; narrower ones are filled up with -inf in their last dimension."""
    if not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    same = all(part.shape[-1] == width for part in parts)
    if parts[0].dim() > 1 and not same:
        parts = [torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-torch.inf) for p in parts]
    return torch.cat(list(parts))
