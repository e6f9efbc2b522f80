"""Which layers of a network can be masked, and which were asked for."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from dwm_fast.errors import InputError
from dwm_fast.nn.layers import MaskedLayer


def literal(name: str) -> str:
    """A shell pattern that fits `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def maskable_layers(
    model: nn.Module, include: str | Iterable[str] = ("*",), exclude: str | Iterable[str] = ()
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and Conv2d layers by name, in definition order, whose name fits `include` and not `exclude`.

    Patterns are those of the shell and fit the whole name, "*" across dots too: "fc", "layer1.*", "*.conv1".
    Raises InputError when nothing fits, naming what is there, and for a layer that a mask cannot be put on.
    """
    include = (include,) if isinstance(include, str) else tuple(include)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    chosen = {
        name: module
        for name, module in found.items()
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    }
    if not chosen:
        raise InputError(
            f"no Linear or Conv2d layer fits include={list(include)} and exclude={list(exclude)}; "
            f"the model has: {', '.join(found) or 'none at all'}"
        )
    for name, module in chosen.items():
        _refuse_unmaskable(name, module)
    return chosen


def _refuse_unmaskable(name: str, module: nn.Module) -> None:
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    own = type(module).forward is not base.forward or "forward" in vars(module)
    if isinstance(module, nn.Conv2d):
        own = own or type(module)._conv_forward is not nn.Conv2d._conv_forward
    weight = module._parameters.get("weight")
    if isinstance(module, MaskedLayer):
        raise InputError(f"layer '{name}' is masked already; give the plain network, or dwm_fast.merge(masked)")
    if weight is None:
        reason = "has a computed weight (weight_norm or another parametrisation); undo that, or leave it out"
    elif isinstance(weight, UninitializedParameter):
        reason = "has no weight yet (lazy module); call the model once, or leave it out"
    elif own:
        reason = f"is a {type(module).__name__} with a forward of its own, which a mask would replace"
    elif not weight.is_floating_point():
        reason = f"has a weight of {weight.dtype}, expected a real floating dtype"
    else:
        return
    raise InputError(f"layer '{name}' {reason}: exclude=['{name}']")


def refuse_shared(model: nn.Module, chosen: Iterable[str]) -> None:
    """InputError when the weight of a chosen layer is tied to another parameter of the network."""
    chosen = set(chosen)
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{name}.{key}" if name else key
            other = owners.setdefault(id(parameter), full)
            involved = {full.removesuffix(".weight"), other.removesuffix(".weight")} & chosen
            if other != full and involved:
                raise InputError(
                    f"'{full}' and '{other}' are one tied tensor, and one tensor cannot have two masks; "
                    f"exclude it with exclude={sorted(involved)}"
                )
