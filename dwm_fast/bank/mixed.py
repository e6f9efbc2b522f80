"""A twin of the backbone for mixed batches: same tensors, but its layers look up the domain of every sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast.bank.filters import DomainFilters
from dwm_fast.bank.layers import BankConv2d, BankLinear, BankNorm, Layer, OwnLinear, SameLayer
from dwm_fast.bank.record import DomainMasks, network_bits
from dwm_fast.bank.stores import Store, store
from dwm_fast.nn.shell import Shell, aliases

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules whose code reads their children's weights instead of calling them."""
_UNUSED_IN_EVAL = "num_batches_tracked"


@dataclass(frozen=True)
class Twin:
    """A twin, the bytes that it holds beside the backbone, and its stores of kept weights by the weights' names."""

    module: nn.Module
    nbytes: int
    stores: Mapping[str, Store]


def mixed_twin(model: nn.Module, domains: Sequence[DomainMasks], room: int = 0) -> Twin | None:
    """The twin that serves `domains` (in this order) together.

    None when that cannot be done layer by layer: then the domains have to run one after the other. That is
    so for forms other than binary, and for masks or own tensors on anything but Linear, Conv2d and batch
    norm layers. On a CPU it holds the masked filters of every domain, and kept values of large linear weights where
    these are fewer bytes, as far as `room` bytes go: they are made once, and not in every call.
    """
    if any(domain.info.form != "binary" for domain in domains):
        return None
    changed = {name for domain in domains for name in (*domain.info.layout.names, *domain.state)}
    if changed & _tied_names(model):
        return None
    shell = Shell(model)
    modules = list(shell.module.eval().named_modules())
    if any(isinstance(module, _READS_WEIGHTS) and _touches(path, changed) for path, module in modules):
        return None
    builder = _Builder(domains, room)
    for path, module in modules:
        layer = builder.layer(path, module)
        if layer is not None:
            shell.put(path, layer)
            for name in builder.taken(path):
                shell.hide(name)
    if changed - builder.done:
        return None
    return Twin(shell.module, builder.nbytes, builder.stores)


def _tied_names(model: nn.Module) -> set[str]:
    """Names of tensors that have more than one name in the model."""
    return {name for name, group in aliases(model).items() if len(group) > 1}


def _touches(path: str, names: set[str]) -> bool:
    return any(name.startswith(f"{path}." if path else "") for name in names)


def _names(path: str, *attributes: str) -> dict[str, str]:
    """The state dict's names of a module's tensors, by attribute."""
    return {attribute: f"{path}.{attribute}" if path else attribute for attribute in attributes}


class _Builder:
    """Makes the layers of one twin and remembers which of the domains' tensors they have used."""

    def __init__(self, domains: Sequence[DomainMasks], room: int) -> None:
        self._domains = domains
        self._room = room
        self._masks = {name for domain in domains for name in domain.info.layout.names}
        self._state = {name for domain in domains for name in domain.state}
        self.done = {name for name in self._state if name.endswith(_UNUSED_IN_EVAL)}
        self.nbytes = 0
        self.stores: dict[str, Store] = {}

    def layer(self, path: str, module: nn.Module) -> Layer | None:
        """What takes the place of the module's forward; None leaves it alone."""
        names = _names(path, "weight", "bias")
        if type(module) in (nn.Linear, nn.Conv2d):
            if names["weight"] in self._state:
                return self._own_linear(names, module) if type(module) is nn.Linear else None
            if names["weight"] in self._masks:
                return self._masked(names, module)
            if names["bias"] not in self._state:
                return SameLayer(module.forward)
            return self._own_linear(names, module) if type(module) is nn.Linear else None
        if isinstance(module, _BATCH_NORMS) and module.running_mean is not None:
            return self._norm(path, module)
        return None

    def taken(self, path: str) -> list[str]:
        """Tensors of the module whose plain value must not be read any more."""
        return [name for name in _names(path, "weight", "bias").values() if name in self.done]

    def _own(self, name: str, shared: Tensor | None) -> list[Tensor | None]:
        """The tensor called `name` of each domain, or the backbone's where a domain has none."""
        values = [domain.state.get(name) for domain in self._domains]
        self.done.add(name)
        if shared is None:
            return values
        return [shared if value is None else value.to(shared.device, shared.dtype) for value in values]

    def _stacked(self, name: str, shared: Tensor | None) -> Tensor | None:
        """(D, ...) where some domain has its own, the shared tensor itself where none has."""
        if name not in self._state:
            return shared
        values = [value for value in self._own(name, shared) if value is not None]
        return self._count(torch.stack(values))

    def _count(self, tensor: Tensor) -> Tensor:
        self.nbytes += tensor.numel() * tensor.element_size()
        return tensor

    def _masked(self, names: Mapping[str, str], module: Any) -> Layer:
        weight = module.weight.detach()
        rows = [network_bits(domain, names["weight"], weight) for domain in self._domains]
        bits = self._count(torch.stack(rows).to(weight.device))
        bias = self._stacked(names["bias"], _detached(module.bias))
        self.done.add(names["weight"])
        if isinstance(module, nn.Linear):
            plain = [i for i, d in enumerate(self._domains) if names["weight"] not in d.info.layout.names]
            return BankLinear(weight, bits, bias, plain, None if plain else self._store(names["weight"], weight, bits))
        return BankConv2d(module, weight, bits, bias, self._filters(weight, bits))

    def _store(self, name: str, weight: Tensor, bits: Tensor) -> Store | None:
        """Kept weights for few rows, where they are fewer bytes and there is room for them."""
        made = store(weight, bits, self._room)
        if made is not None:
            self._room -= made.nbytes
            self.nbytes += made.nbytes
            self.stores[name] = made
        return made

    def _filters(self, weight: Tensor, bits: Tensor) -> list[DomainFilters] | None:
        """The weight under each domain, where there is room for all of them."""
        nbytes = len(bits) * weight.numel() * weight.element_size()
        if weight.device.type != "cpu" or nbytes > self._room:
            return None
        self._room -= nbytes
        self.nbytes += nbytes
        return [DomainFilters(weight, row) for row in bits]

    def _own_linear(self, names: Mapping[str, str], module: Any) -> Layer | None:
        if names["weight"] in self._masks:
            return None
        weights = [w for w in self._own(names["weight"], _detached(module.weight)) if w is not None]
        layer = OwnLinear(weights, self._own(names["bias"], _detached(module.bias)))
        self._count(layer.stacked)
        return layer

    def _norm(self, path: str, module: Any) -> Layer | None:
        names = _names(path, "running_mean", "running_var", "weight", "bias")
        if not self._state & set(names.values()):
            return None
        values = {}
        for attribute, name in names.items():
            shared = _detached(getattr(module, attribute))
            own = [value for value in self._own(name, shared) if value is not None]
            values[attribute] = self._count(torch.stack(own)) if own else None
        mean, var = values["running_mean"], values["running_var"]
        if mean is None or var is None:
            return None
        return BankNorm(mean, var, values["weight"], values["bias"], module.eps)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
