"""The network under a bank: its tensors by name, whether it is still as it was, and fingerprints of its weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast.bank.adopt import check_mask_shape
from dwm_fast.bank.fingerprint import combined_digest, tensor_digest
from dwm_fast.bank.record import DomainMasks
from dwm_fast.bank.runner import Runner
from dwm_fast.errors import InputError, MaskFileError
from dwm_fast.nn.shell import tensors_of
from dwm_fast.nn.stored import plain_parts

_WHOLE = 1 << 14
"""Elements up to which every one of a tensor's is compared in each call."""
_SAMPLES = 1 << 10
"""Elements of a larger tensor that are compared, evenly spaced."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


class Backbone:
    """Holds a network and notices when it changes.

    Args:
        model: the network; never written to. InputError for a masked model or what is no network.

    Attributes:
        tensors, parameters: the state dict's tensors, and the parameters, by name.
        run: calls the network under a domain's tensors.
        write: the same for `generate`, in the middle of which `run` may be wanted.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module) or hasattr(model, "keep_masks"):
            what = f"a {type(model).__name__}"
            raise InputError(f"a MaskBank stands on the plain network that was masked, a torch.nn.Module; given {what}")
        self.model = model
        self._lock = threading.RLock()
        self._stamp = 0
        self._look()

    def _look(self) -> None:
        """Take the network as it is now for what it should be."""
        state = self.model.state_dict(keep_vars=True)
        self.tensors: dict[str, Tensor] = {n: t for n, t in state.items() if isinstance(t, Tensor)}
        self.parameters = dict(self.model.named_parameters())
        self.run, self.write = Runner(self.model), Runner(self.model)
        self._inventory = Inventory(self.model)
        self._digests: dict[str, bytes] = {}
        self._take_marks()

    def _take_marks(self) -> None:
        own = {id(tensor): tensor for tensor in (*tensors_of(self.model), *self._inventory.loose)}
        self._watched = [part for tensor in own.values() for part in plain_parts(tensor)]
        self._marks = [_mark(tensor) for tensor in self._watched]
        views = [_sampled(tensor) for tensor in self._watched]
        self._samples = [(view, view.clone()) for view in views if view is not None]

    def stamp(self) -> int:
        """A number that changes when a module, a tensor or a tensor's content has changed since the last call.

        Looked at are: which modules and tensors the network has, their settings, forward hooks and exchanged forwards
        (see `Inventory`); every tensor's version counter, storage, dtype and device; and, on a CPU, the values
        themselves, all of a tensor up to 2^14 elements and 2^10 evenly spaced ones of a larger: writing through
        `.data`, as averages of weights do, leaves no other trace.
        """
        with self._lock:
            same = self._inventory.is_current()
            if same and self._has_same_values():
                return self._stamp
            if same and not self._inventory.loose:
                self._digests = {}
                self._take_marks()
            else:
                self._look()
            self._stamp += 1
            return self._stamp

    def _has_same_values(self) -> bool:
        return all(_mark(tensor) == mark for tensor, mark in zip(self._watched, self._marks, strict=True)) and all(
            torch.equal(view, was) for view, was in self._samples
        )

    def fingerprint(self, names: Iterable[str]) -> str:
        """Fingerprint of the named parameters; each is hashed once until the network changes."""
        with self._lock:
            self.stamp()
            return combined_digest({name: self._digest(name) for name in names})

    def _digest(self, name: str) -> bytes:
        if name not in self._digests:
            self._digests[name] = tensor_digest(name, self.parameters[name])
        return self._digests[name]

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """While this lasts the network may be moved and cast, by `torch.nn.Module.to`; fingerprints stay as before."""
        with self._lock:
            self.fingerprint(self.parameters)
            digests = self._digests
            try:
                yield
            finally:
                self._look()
                self._stamp += 1
            self._digests = digests

    def digests(self) -> dict[str, bytes]:
        """What fingerprints are made of, for a copy of the network that was moved or cast: see `take_digests`."""
        with self._lock:
            self.stamp()
            return dict(self._digests)

    def take_digests(self, digests: Mapping[str, bytes]) -> None:
        """Use these until the network changes; the caller knows it to be the one that they are of."""
        with self._lock:
            self._digests = dict(digests)

    def check_names(self, names: Iterable[str]) -> None:
        """InputError unless every name is a parameter's."""
        wrong = [name for name in names if name not in self.parameters]
        if wrong:
            raise InputError(f"mask '{wrong[0]}' is not on a parameter (or is on a second name of a tied one)")

    def check_fit(self, record: DomainMasks, source: str) -> None:
        """MaskFileError unless every tensor of the domain has its place here."""
        layout = record.info.layout
        try:
            self.check_names(layout.names)
            for name, shape in zip(layout.names, layout.shapes, strict=True):
                check_mask_shape(name, shape, tuple(self.tensors[name].shape), whole=record.info.form == "kept")
            missing = sorted(set(record.state) - set(self.tensors))
            if missing:
                raise InputError(f"state '{missing[0]}': the backbone has no such tensor")
        except InputError as error:
            raise MaskFileError(f"{source}: does not fit the backbone: {error}") from error

    def check_fingerprint(self, record: DomainMasks, source: str) -> None:
        """MaskFileError where the domain says which weights it was made for, and these are others."""
        info = record.info
        if info.fingerprint and self.fingerprint(info.layout.names) != info.fingerprint:
            raise MaskFileError(
                f"{source}: backbone: the masks of '{info.domain}' were made for other weights; load "
                f"the backbone they belong to, or pass allow_other_backbone=True"
            )


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


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    place = tensor.data_ptr() if tensor.layout is torch.strided and not tensor.is_meta else 0
    return version, place, tensor.dtype, tensor.device


def _sampled(tensor: Tensor) -> Tensor | None:
    """A view of some of a CPU tensor's elements, as whole numbers so that NaN equals NaN; None where there are none."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel() or tensor.is_quantized:
        return None
    plain = tensor.detach()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    span = 1 + sum((size - 1) * step for size, step in zip(plain.shape, plain.stride(), strict=True))
    step = 1 if span <= _WHOLE else span // _SAMPLES
    return plain.as_strided((1 + (span - 1) // step,), (step,)).view(_BITS[plain.element_size()])
