"""Running the backbone under one domain's tensors: every thread has its own shell over the shared weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.bank.mixed import network_bits, share_copy
from dwm_fast.bank.record import DomainMasks, effective_weight
from dwm_fast.ops.bank import is_large, reads_bits


@dataclass(frozen=True, eq=False)
class Patch:
    """What a domain puts in the place of the backbone's tensors.

    tensors: by state dict name. bits: by name, a large weight of the backbone and the domain's packed bits of it: a
    linear layer multiplies few rows straight from them, as mixed batches do.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    bits: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def domain_patch(domain: DomainMasks, tensors: Mapping[str, Tensor]) -> tuple[Patch, int]:
    """The tensors of the backbone under a domain, on its device and in its dtypes, and their size in bytes."""
    layout = domain.info.layout
    weights = [tensors[name].detach() for name in layout.names]
    device = weights[0].device if weights else torch.device("cpu")
    bits = domain.bits.to(device)
    whole = all(shape == tuple(w.shape) for shape, w in zip(layout.shapes, weights, strict=True))
    if domain.info.form == "binary" and whole:
        patched = ops.apply(bits, weights)
    else:
        flat = ops.unpack(bits, layout.numels)
        masks = [mask.view(shape) for mask, shape in zip(flat, layout.shapes, strict=True)]
        named = zip(layout.names, masks, weights, strict=True)
        patched = [effective_weight(domain, name, mask, weight) for name, mask, weight in named]
    patch = dict(zip(layout.names, patched, strict=True))
    for name, own in domain.state.items():
        like = tensors[name]
        patch[name] = own.to(like.device, like.dtype if own.is_floating_point() else own.dtype)
    large = {n: w for n, w in zip(layout.names, weights, strict=True) if is_large(w)}
    straight = {n: (w, network_bits(domain, n, w)) for n, w in large.items()} if domain.info.form == "binary" else {}
    kept = [*patch.values(), *(row for _, row in straight.values())]
    return Patch(patch, straight), sum(t.numel() * t.element_size() for t in kept)


class Runner:
    """Calls a network under a patch. Threads do not meet: each has a copy of the modules over the same tensors.

    Args:
        model: the backbone; never written to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._local = threading.local()
        groups: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        self._aliases = {name: group for group in groups.values() for name in group}

    def __call__(self, patch: Patch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network's output under `patch`; tensors not in it are the backbone's."""
        shell: _Shell | None = getattr(self._local, "shell", None)
        if shell is None:
            shell = self._local.shell = _Shell(share_copy(self._model), self._aliases)
        shell.put_on(patch)
        return shell.module(*args, **kwargs)


class _Shell:
    """One thread's copy of the modules and the patch that it wears."""

    def __init__(self, module: nn.Module, aliases: Mapping[str, list[str]]) -> None:
        self.module = module
        self._aliases = aliases
        self._worn = Patch()
        self._plain: dict[str, Tensor | None] = {}
        self._straight: list[Any] = []

    def put_on(self, patch: Patch) -> None:
        if patch is self._worn:
            return
        for name, plain in self._plain.items():
            self._set(name, plain)
        for module in self._straight:
            del module.forward
        self._plain, self._straight = {}, []
        for name, tensor in patch.tensors.items():
            for alias in self._aliases[name]:
                self._plain[alias] = self._set(alias, tensor)
        for name, (weight, bits) in patch.bits.items():
            for alias in self._aliases[name]:
                self._read_bits(alias, weight, bits)
        self._worn = patch

    def _set(self, name: str, tensor: Tensor | None) -> Tensor | None:
        path, _, attribute = name.rpartition(".")
        module = self.module.get_submodule(path)
        home: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
        old: Tensor | None = home[attribute]
        home[attribute] = tensor
        return old

    def _read_bits(self, name: str, weight: Tensor, bits: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module: Any = self.module.get_submodule(path)
        if type(module) is nn.Linear and attribute == "weight" and "forward" not in vars(module):
            vars(module)["forward"] = _LinearFromBits(module, weight, bits)
            self._straight.append(module)


class _LinearFromBits:
    """The forward of a linear layer that wears a masked weight: few rows are multiplied from the bits instead."""

    def __init__(self, module: nn.Linear, weight: Tensor, bits: Tensor) -> None:
        self._module, self._weight, self._bits = module, weight, bits

    def __call__(self, input: Tensor) -> Tensor:
        if reads_bits(input, self._weight):
            return ops.linear_packed(input, self._weight, self._bits, self._module.bias)
        return F.linear(input, self._module.weight, self._module.bias)
