"""Whether the modules of a network are as they were: which ones, what they hold, their settings, hooks and forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast.nn.shell import tensors_of

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that torch gives every module; those that decide what a call gives are the tables."""
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_NUMBERS = (str, bytes, int, float, complex)
_CLOSED = (
    *_NUMBERS,
    tuple,
    frozenset,
    type,
    torch.dtype,
    torch.device,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    ModuleType,
)
"""Kinds of attributes that have nothing inside which could be exchanged."""


class Inventory:
    """The modules of a network at one moment, to be compared with later, object by object.

    Attributes count one level deep: a list, a dictionary or an object counts as changed when something in it is
    exchanged. Numbers, text and tensors are exchanged when they are not equal. Whether a module is in train() or
    eval() does not count.

    Attributes:
        loose: tensors that modules hold beside their parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._classes = list(map(type, self._modules))
        homes = list(map(vars, self._modules))
        self._tables = [home[name] for home in homes for name in _TABLES]
        self._held = list(_joined(self._tables))
        self._dictionaries = [*homes, *self._tables]
        self._lengths = list(map(len, self._dictionaries))
        self._getters = [(get, home) for home in homes if (get := _getter(home)) is not None]
        self._settings = self._read_settings()
        values = {id(value): value for value in self._settings}.values()
        self._insides = [(value, inside) for value in values if (inside := _inside(value)) is not None]
        held = [*values, *(value for _, inside in self._insides for value in inside)]
        held += [part for value in held if isinstance(value, tuple) for part in value]
        self.loose = list({id(tensor): tensor for value in held for tensor in _tensors(value)}.values())

    def is_current(self) -> bool:
        """Whether every object is still in its place, or an equal number, text or tensor."""
        try:
            return (
                list(map(len, self._dictionaries)) == self._lengths
                and all(map(is_, map(type, self._modules), self._classes))
                and all(map(is_, _joined(self._tables), self._held))
                and _alike(self._read_settings(), self._settings)
                and all(_alike(_inside(value), was) for value, was in self._insides)
            )
        except KeyError:  # an attribute is gone
            return False

    def _read_settings(self) -> tuple[Any, ...]:
        return tuple(chain.from_iterable([get(home) for get, home in self._getters]))


def _joined(tables: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, tables))


def _getter(home: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[Any, ...]] | None:
    """What takes from a module's attributes, in one call, those that torch does not give every module."""
    keys = [key for key in home if key not in _OF_EVERY_MODULE]
    return itemgetter(keys[0], *keys) if keys else None  # of one key alone it would give no tuple


def _inside(value: Any) -> tuple[Any, ...] | None:
    """What a list, a dictionary or an object holds; None for what holds nothing."""
    if isinstance(value, (*_CLOSED, nn.Module, Tensor)):
        return None
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    if isinstance(value, list | set):
        return tuple(value)
    return tuple(vars(value).values()) if hasattr(value, "__dict__") else None


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, nn.Module):
        return tensors_of(value)
    return (value,) if isinstance(value, Tensor) else ()


def _alike(now: tuple[Any, ...] | None, was: tuple[Any, ...]) -> bool:
    if now is None or len(now) != len(was):
        return False
    return all(map(is_, now, was)) or all(map(_same, now, was))


def _same(now: Any, was: Any) -> bool:
    if now is was:
        return True
    if type(now) is not type(was):
        return False
    if isinstance(now, Tensor):
        return now.shape == was.shape and now.dtype == was.dtype and now.device == was.device and torch.equal(now, was)
    if isinstance(now, tuple):
        return _alike(now, was)
    return isinstance(now, _NUMBERS) and bool(now == was)
