"""Masks on the parameters of any module: the module's code reads them by name, and reads them masked.

A module of a class that has no masked layer of its own (convolutions of other dimensions, recurrent layers, attention,
GPT-2's Conv1D, experts in one tensor) becomes a host: an object of a subclass of its class in which reading a masked
parameter, `self.weight` say, gives the masked tensor of the moment. Its code stays. The mask is a child of the host,
`MaskedParameter`, for which a masked model draws as for any masked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast.errors import InputError
from dwm_fast.nn import recompute
from dwm_fast.nn.kinds import MaskKind
from dwm_fast.nn.layers import MaskedLayer
from dwm_fast.nn.recast import recast
from dwm_fast.ops.shards import is_shard

_SLOT = "masked_"
"""A host's child is called by this and the parameter's name."""


class MaskedParameter(MaskedLayer, nn.Module):
    """The mask on one parameter of a host. `mask_model` makes it; it is never called.

    Attributes:
        attribute: the parameter's name in the host.
        weight, mask_logits, kind, ...: as in `MaskedLayer`; the weight belongs to the host.
    """

    _casts = False

    def __init__(self, host: nn.Module, attribute: str, kind: MaskKind, seed: int | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__["_host"] = host  # no child: the host is the parent
        self.attribute = attribute
        self._init_mask(kind, seed)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            given = None if is_shard(self.frozen_weight) else self._given()
            return self.frozen_weight if given is None else given
        return nn.Module.__getattr__(self, name)

    @property
    def frozen_weight(self) -> Tensor:
        """The backbone's weight, whether a MaskedModel is running or not."""
        weight: Tensor = self._host._parameters[self.attribute]
        return weight

    def stand_alone(self, seed: int | None = None) -> None:
        """InputError: the host reads what a masked model draws."""
        raise InputError(
            f"the mask on '{self.attribute}' of a {self._host._plain_class.__name__} is drawn by its masked model; "
            "masked layers that stand alone are MaskedLinear and MaskedConv2d"
        )

    def reset_parameters(self) -> None:
        """The mask starts anew; the weight is the host's."""
        self.reset_mask()

    def full_name(self, path: str) -> str:
        """The mask's name where this module is called `path`: the host's, and the parameter's unless it is `weight`."""
        host = path.rpartition(".")[0]
        return host if self.attribute == "weight" else f"{host}.{self.attribute}".lstrip(".")

    def extra_repr(self) -> str:
        return f"{tuple(self.frozen_weight.shape)}, {self._mask_repr()}"


class Host(nn.Module):
    """What a class gets in front of it so that its code reads masked parameters."""

    _masked_by: dict[str, Any]
    """What gives the tensor that each masked parameter is read as: any module with a `weight`."""
    _plain_class: type[nn.Module]

    def __getattr__(self, name: str) -> Any:
        masked_by = self.__dict__.get("_masked_by")
        if masked_by is not None and name in masked_by:
            return masked_by[name].weight
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not recompute.in_backward():
            for mask in self._masked_by.values():
                if isinstance(mask, MaskedLayer) and mask.__dict__["_staged"] is None:
                    raise InputError(
                        f"this {self._plain_class.__name__} belongs to a masked model, which draws its masks; call the "
                        "masked model, or make a plain network of it with dwm_fast.merge(masked)"
                    )
        return super().forward(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for mask in self._masked_by.values():  # the children have moved before the weights that they start from
            if isinstance(mask, MaskedParameter) and mask._host is self:
                mask._fill()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self._plain_class,), self.__getstate__()  # type: ignore[no-untyped-call]


class _RecurrentHost(Host):
    """RNN, LSTM and GRU keep a list of their weights, which has to be one of the moment."""

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """Nothing: the list is made when it is read."""

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN's one block of weights would be a copy of its own."""


_CLASSES: dict[type[nn.Module], type[Host]] = {}


def _host_class(plain: type[nn.Module]) -> type[Host]:
    if plain not in _CLASSES:
        front = _RecurrentHost if issubclass(plain, nn.RNNBase) else Host
        about = {"__module__": plain.__module__, "__doc__": plain.__doc__, "_plain_class": plain}
        _CLASSES[plain] = type(f"Masked{plain.__name__}", (front, plain), about)
    return _CLASSES[plain]


def _rebuilt(plain: type[nn.Module]) -> nn.Module:
    cls = _host_class(plain)
    return cls.__new__(cls)


def as_host(module: nn.Module) -> Host:
    """The module as a host without masks, in tables of its own; itself where it is one."""
    if isinstance(module, Host):
        return module
    host = recast(module, _host_class(type(module)))
    vars(host).pop("_flat_weights", None)
    host.__dict__["_masked_by"] = {}
    return host


def put_mask(host: Host, attribute: str, kind: MaskKind) -> MaskedParameter:
    """A mask on a parameter of a host, whose storage is shared and which needs no gradient from now on."""
    weight = host._parameters[attribute]
    assert weight is not None
    host._parameters[attribute] = nn.Parameter(weight.detach(), requires_grad=False)
    mask = MaskedParameter(host, attribute, kind, seed=0)
    attach(host, attribute, mask)
    return mask


def attach(host: Host, attribute: str, child: nn.Module) -> None:
    """Let reads of `attribute` give `child.weight`; the child is registered in the host."""
    host.add_module(_SLOT + attribute, child)
    host._masked_by[attribute] = child


def borrow(host: Host, attribute: str, owner: Any) -> None:
    """Let reads of a tied parameter give what another module's mask gives; the tensor itself is one."""
    host._parameters[attribute] = owner.frozen_weight
    host._masked_by[attribute] = owner


def repoint(network: nn.Module, old: Any, new: Any) -> None:
    """Let every host of a network that read a tied parameter from the mask `old` read it from `new`."""
    for host in network.modules():
        masked_by: dict[str, Any] = vars(host).get("_masked_by", {})
        for attribute, mask in masked_by.items():
            if mask is old:
                masked_by[attribute] = new
                host._parameters[attribute] = getattr(new, "backbone_weight", None)


def shares(network: nn.Module, masks: Iterable[MaskedLayer]) -> bool:
    """Whether one of the masks covers a tensor that the network has in several places."""
    masked = [id(mask.frozen_weight) for mask in masks]
    named = network.named_parameters(remove_duplicate=False)
    return sum(id(parameter) in masked for _, parameter in named) > len(masked)


def bare(host: Host, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """The module that a host was, in tables of its own; `parameters` has what each of its masks, by id, leaves."""
    module = recast(host, host._plain_class)
    del module.__dict__["_masked_by"]
    masked_by: dict[str, Any] = vars(host)["_masked_by"]
    for attribute, mask in masked_by.items():
        module._modules.pop(_SLOT + attribute, None)
        module._parameters[attribute] = parameters[id(mask)]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    return module
