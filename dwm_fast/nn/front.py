"""Front: what a masked model shows to code that inspects networks, which is what its network shows.

Trainers drop the columns that `forward` has no argument for, ask for `config` and `device`, and call `generate`. A
masked model therefore gets a class of its own, in which `forward` has the network's signature; a public name that it
does not have is read from the network, and set there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

_Forward = TypeVar("_Forward", bound=Callable[..., Any])

_UNMASKED = ("save_pretrained", "push_to_hub")
"""Methods that would write the weights as they are under the masks."""


def passes_on(forward: _Forward) -> _Forward:
    """Mark a forward that hands all its arguments to the network, and so may show the network's signature."""
    forward.passes_on = True  # type: ignore[attr-defined]
    return forward


def dress(masked: Any) -> None:
    """Give a masked model the class in which `forward` has the signature of `masked.model.forward`.

    A subclass with a forward of its own keeps its class.
    """
    base: Any = type(masked)
    if getattr(base.forward, "passes_on", False) and not is_dressed(base):
        network = masked.model
        plain: Any = getattr(network, "_plain_class", type(network))
        own = "forward" in vars(network)
        masked.__class__ = _made(base, plain, _signature(network.forward)) if own else _class(base, plain)


def is_dressed(cls: type) -> bool:
    """Whether it is a class that `dress` made, not one made of it."""
    return "_bare_class" in vars(cls)


def bare(cls: Any) -> Any:
    """An object of a class that `dress` has not seen, without any state: what a pickle starts from."""
    return cls.__new__(cls)


def network_class(masked: Any) -> type | None:
    """The class of the network inside as it was before it was masked; None before there is one."""
    network = vars(masked).get("_modules", {}).get("model")
    return None if network is None else getattr(network, "_plain_class", type(network))


def of_network(masked: Any, name: str, error: AttributeError) -> Any:
    """The network's attribute `name`, which the masked model does not have (`error` says so).

    Raises:
        AttributeError: the network has none either, or it is one that the masks would not be seen in: a parameter, or
            a method that writes the weights.
    """
    network = vars(masked).get("_modules", {}).get("model")
    if name.startswith("_") or network is None:
        raise error
    if name in network._parameters or name in vars(network).get("_masked_by", {}):
        raise AttributeError(
            f"'{name}' of the network inside a masked model is read as masked.model.{name}, which is not masked "
            "outside of a call; dwm_fast.merge(masked) has it masked"
        )
    if name in _UNMASKED:
        raise AttributeError(
            f"a masked model has no '{name}': its network would write weights without masks; for a plain checkpoint "
            f"use dwm_fast.merge(masked).{name}(...), for the mask alone dwm_fast.MaskAdapter.from_masked(masked, "
            f"network).{name}(...)"
        )
    try:
        found = getattr(network, name)
    except AttributeError as missing:
        raise AttributeError(f"{missing}; nor has the masked model around it") from None
    return _under_masks(masked, found) if name == "generate" and callable(found) else found


def is_of_network(masked: Any, name: str) -> bool:
    """Whether setting the public `name` is meant for the network: it has it, and the masked model has not."""
    if name in vars(masked) or hasattr(type(masked), name):
        return False
    tables = [vars(masked).get(table, {}) for table in ("_parameters", "_buffers", "_modules")]
    return not any(name in table for table in tables) and hasattr(tables[2].get("model"), name)


def _under_masks(masked: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """The network's method, with the masks drawn once for each call of it."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with masked._masks_held():
            return method(*args, **kwargs)

    return call


def _signature(forward: Callable[..., Any]) -> inspect.Signature | None:
    """The signature with `self` in front; None where Python knows none, or it cannot be written so."""
    try:
        signature = inspect.signature(forward)
        first = next(iter(signature.parameters.values()), None)
        only = first is not None and first.kind is inspect.Parameter.POSITIONAL_ONLY
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        return signature.replace(parameters=[inspect.Parameter("self", kind), *signature.parameters.values()])
    except (TypeError, ValueError):
        return None


@functools.cache
def _class(base: type, plain: type[nn.Module]) -> type:
    try:
        signature = inspect.signature(plain.forward)
    except (TypeError, ValueError):
        signature = None
    return _made(base, plain, signature)


def _made(base: Any, plain: type[nn.Module], signature: inspect.Signature | None) -> type:
    """A subclass of `base` whose forward is the same code under the network's signature."""
    given = base.forward
    forward = FunctionType(given.__code__, given.__globals__, given.__name__, given.__defaults__, given.__closure__)
    forward.__module__, forward.__qualname__ = given.__module__, given.__qualname__
    forward.__doc__ = plain.forward.__doc__
    if signature is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    about = {"__module__": base.__module__, "__doc__": base.__doc__, "_bare_class": base, "forward": forward}
    return type(f"{base.__name__}[{plain.__name__}]", (base,), about)
