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
class Straight:
    """What a linear layer multiplies few rows with: a large weight (N, K) and the packed bits of it.

    kept: values and row starts of what the bits keep, where reading these alone is faster; the product is the same.
    """

    weight: Tensor
    bits: Tensor
    kept: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds beside the weight."""
        return (self.bits, *(self.kept or ()))


@dataclass(frozen=True, eq=False)
class Patch:
    """What a domain puts in the place of the backbone's tensors.

    tensors: by state dict name. straight: by name, what linear layers multiply few rows with, as mixed batches do.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    straight: Mapping[str, Straight] = field(default_factory=dict)


def domain_patch(domain: DomainMasks, tensors: Mapping[str, Tensor]) -> tuple[Patch, int]:
    """The tensors of the backbone under a domain, on its device and in its dtypes, and their size in bytes."""
    patch = domain_tensors(domain, tensors)
    weights = {name: tensors[name].detach() for name in domain.info.layout.names}
    straight = {
        name: _straight(domain, name, weight if domain.info.form == "binary" else patch[name])
        for name, weight in weights.items()
        if domain.info.form in ("binary", "kept") and is_large(weight)
    }
    held = [*patch.values(), *(t for large in straight.values() for t in large.tensors())]
    return Patch(patch, straight), sum(t.numel() * t.element_size() for t in held)


def domain_tensors(domain: DomainMasks, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a domain puts in the place of the backbone's `tensors`, by state dict name, on its device, in its dtypes."""
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
    return patch


def _straight(domain: DomainMasks, name: str, weight: Tensor) -> Straight:
    bits = network_bits(domain, name, weight)
    few = ops.is_faster_kept(weight, int(ops.count(bits, [weight.numel()])[0]))
    return Straight(weight, bits, ops.keep_values(weight, bits) if few else None)


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
        return self.wearing(patch)(*args, **kwargs)

    def method(self, name: str, patch: Patch, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The same by another method. A call in whose middle this one is made goes on under its own patch.

        Raises:
            AttributeError: the network has no such method.
        """
        local = vars(self._local)
        outer, local["writing"] = local.get("writing"), patch
        try:
            return getattr(self.wearing(patch), name)(*args, **kwargs)
        finally:
            local["writing"] = outer
            if outer is not None:
                self.wearing(outer)

    def wearing(self, patch: Patch) -> nn.Module:
        """The network in eval mode with the tensors of `patch`, until this thread's next call."""
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
        return shell.module

    def _put_on(self, shell: Shell, patch: Patch) -> None:
        for name, tensor in patch.tensors.items():
            for alias in self._aliases[name]:
                shell.set(alias, tensor)
        for name, straight in patch.straight.items():
            for alias in self._aliases[name]:
                path, _, attribute = alias.rpartition(".")
                module = shell.module.get_submodule(path)
                if type(module) is nn.Linear and attribute == "weight" and "forward" not in vars(module):
                    shell.put(path, _StraightLinear(module, straight))


class _StraightLinear:
    """The forward of a linear layer that wears a masked weight: few rows are multiplied straight instead."""

    def __init__(self, module: nn.Linear, straight: Straight) -> None:
        self._module, self._straight = module, straight

    def __call__(self, input: Tensor) -> Tensor:
        given, bias = self._straight, self._module.bias
        if not reads_bits(input, given.weight):
            return F.linear(input, self._module.weight, bias)
        if given.kept is not None:
            return ops.linear_kept(input, *given.kept, given.bits, bias)
        return ops.linear_packed(input, given.weight, given.bits, bias)


_NOTHING = Patch()
