"""Shell: the modules of a network once more, over its own tensors, with other layers and tensors in some places.

A packed network, a merged one, a bank's network under one domain and its network for mixed batches are shells that
wear different things; the network itself is never written to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn


class Shell:
    """A copy of a network's modules in which layers and tensors can be exchanged, and put back.

    Args:
        network: what is copied; its train/eval state is kept.
        shared: tensors that stay the same objects; all of the network's by default. The others are copied.

    Attributes:
        module: the copy, as it is now.
    """

    def __init__(self, network: nn.Module, shared: Iterable[Tensor] | None = None) -> None:
        self.module = copy_sharing(network, tensors_of(network) if shared is None else shared)
        self._undo: list[Callable[[], None]] = []

    def put(self, path: str, layer: Callable[..., Any]) -> None:
        """Put `layer` in the place of the module at `path`: another module whole, anything else as its forward."""
        if not isinstance(layer, nn.Module):
            self._keep(vars(self.module.get_submodule(path)), "forward")
            vars(self.module.get_submodule(path))["forward"] = layer
        elif path:
            parent, _, child = path.rpartition(".")
            modules = self.module.get_submodule(parent)._modules
            self._keep(modules, child)
            modules[child] = layer
        else:
            self.module = layer

    def exchange(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in every place where the module `old` is."""
        for path in [path for path, module in self.module.named_modules(remove_duplicate=False) if module is old]:
            self.put(path, new)

    def set(self, name: str, tensor: Tensor | None) -> None:
        """Put `tensor` in the place of the one that the state dict calls `name`."""
        home, attribute = self._home(name)
        self._keep(home, attribute)
        home[attribute] = tensor

    def hide(self, name: str) -> None:
        """Take a tensor away: code that reads it then gets an AttributeError, not a value that is not in force."""
        home, attribute = self._home(name)
        if attribute in home:
            self._keep(home, attribute)
            del home[attribute]

    def strip(self) -> None:
        """Undo every exchange, the last one first."""
        while self._undo:
            self._undo.pop()()

    def _home(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, attribute = name.rpartition(".")
        module = self.module.get_submodule(path)
        return module._buffers if attribute in module._buffers else module._parameters, attribute

    def _keep(self, home: dict[str, Any], key: str) -> None:
        if key not in home:
            self._undo.append(lambda: home.pop(key, None))
            return
        old = home[key]
        self._undo.append(lambda: home.__setitem__(key, old))


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer of a network."""
    yield from network.parameters()
    yield from network.buffers()


def copy_sharing(network: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """A deep copy of `network` in which the tensors of `shared` are the same objects, not copies.

    Weights that a module computes before each call (weight_norm, prune) are cut off from what they were computed of.
    """
    computed = [t for m in network.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    memo = {id(tensor): tensor for tensor in shared} | {id(tensor): tensor.detach() for tensor in computed}
    return copy.deepcopy(network, memo)


def aliases(network: nn.Module) -> dict[str, list[str]]:
    """For every name of the state dict all names that its tensor has there; a tied tensor has several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            groups.setdefault(id(tensor), []).append(name)
    return {name: group for group in groups.values() for name in group}


def unwrapped(network: Any) -> Any:
    """The module inside torch.compile, DataParallel, DistributedDataParallel and the like, however many of them."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and type(network).__name__ in _WRAPPERS:
            inner = network.module
        if inner is None:
            return network
        network = inner


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel")
