"""Which layers of a network can be masked, and which were asked for."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from dwm_fast.errors import InputError
from dwm_fast.nn.layers import MaskedLayer

_PLAIN = ("Tensor", "FakeTensor", "DTensor", "FunctionalTensor")
"""Classes of tensors whose elements are what they say; quantised ones (torchao) claim the dtype that they stand for."""


def literal(name: str) -> str:
    """A shell pattern that fits `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def maskable_layers(
    model: nn.Module,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    *,
    skip_unmaskable: bool = False,
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and Conv2d layers by name, in definition order, whose name fits `include` and not `exclude`.

    Patterns are those of the shell and fit the whole name, "*" across dots too: "fc", "layer1.*", "*.conv1".
    Raises InputError when nothing fits, or a pattern fits nothing, naming what is there; and for layers that a mask
    cannot be put on, all of them at once, unless `skip_unmaskable` leaves them out.
    """
    include = (include,) if isinstance(include, str) else tuple(include)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        where = lazy[0].rpartition(".")[0]
        raise InputError(f"'{where}' has no weight yet (lazy module); call the model once on an input, then mask it")
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    names = [name for name, _ in model.named_modules()]
    idle = [p for p in exclude if not any(fnmatchcase(name, p) for name in names)]
    if idle:
        raise InputError(f"exclude={idle} fits no layer; the model has: {_listed(found)}")
    chosen = {
        name: module
        for name, module in found.items()
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    }
    reasons = {name: why for name, module in chosen.items() if (why := _unmaskable(module))}
    if reasons and not skip_unmaskable:
        lines = "; ".join(f"'{name}' {why}" for name, why in reasons.items())
        masked = any(isinstance(chosen[name], MaskedLayer) for name in reasons)
        advice = "" if masked else f"; or leave out with exclude={list(reasons)} or skip_unmaskable=True"
        raise InputError(f"layer{'s' if len(reasons) > 1 else ''} {lines}{advice}")
    chosen = {name: module for name, module in chosen.items() if name not in reasons}
    if not chosen:
        raise InputError(
            f"no Linear or Conv2d layer fits include={list(include)} and exclude={list(exclude)}; "
            f"the model has: {_listed(found)}"
        )
    return chosen


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none at all"


def _unmaskable(module: nn.Module) -> str:
    """Why a mask cannot be put on a Linear or Conv2d layer; "" where it can."""
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    own = type(module).forward is not base.forward or "forward" in vars(module)
    if isinstance(module, nn.Conv2d):
        own = own or type(module)._conv_forward is not nn.Conv2d._conv_forward
    weight = module._parameters.get("weight")
    if isinstance(module, MaskedLayer):
        return "is masked already; give the plain network, or dwm_fast.merge(masked)"
    if weight is None:
        return "has a computed weight (weight_norm or another parametrisation); undo that first"
    if own:
        return f"is a {type(module).__name__} with a forward of its own, which a mask would replace"
    stored = type(weight.data).__name__
    if not weight.is_floating_point() or stored not in _PLAIN:
        return f"has a weight of {weight.dtype} in a {stored}; expected a real floating dtype, not quantised"
    return ""


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
