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
from dwm_fast.bank.record import DomainMasks, effective_weight, network_bits
from dwm_fast.nn.shell import Shell, aliases
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
    """Calls a network under a patch. Threads do not meet: each has a shell of its own over the same tensors.

    Args:
        model: the backbone; never written to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._local = threading.local()
        self._aliases = aliases(model)

    def __call__(self, patch: Patch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network's output under `patch`; tensors not in it are the backbone's."""
        local = vars(self._local)
        if "shell" not in local:
            local["shell"], local["worn"] = Shell(self._model), _NOTHING
            local["shell"].module.eval()
        shell: Shell = local["shell"]
        if local["worn"] is not patch:
            local["worn"] = None
            shell.strip()
            self._put_on(shell, patch)
            local["worn"] = patch
        return shell.module(*args, **kwargs)

    def _put_on(self, shell: Shell, patch: Patch) -> None:
        for name, tensor in patch.tensors.items():
            for alias in self._aliases[name]:
                shell.set(alias, tensor)
        for name, (weight, bits) in patch.bits.items():
            for alias in self._aliases[name]:
                path, _, attribute = alias.rpartition(".")
                module = shell.module.get_submodule(path)
                if type(module) is nn.Linear and attribute == "weight" and "forward" not in vars(module):
                    shell.put(path, _LinearFromBits(module, weight, bits))


class _LinearFromBits:
    """The forward of a linear layer that wears a masked weight: few rows are multiplied from the bits instead."""

    def __init__(self, module: nn.Linear, weight: Tensor, bits: Tensor) -> None:
        self._module, self._weight, self._bits = module, weight, bits

    def __call__(self, input: Tensor) -> Tensor:
        if reads_bits(input, self._weight):
            return ops.linear_packed(input, self._weight, self._bits, self._module.bias)
        return F.linear(input, self._module.weight, self._module.bias)


_NOTHING = Patch()
