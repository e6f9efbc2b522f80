"""Which layers of a network can be masked, and which were asked for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dwm_fast.errors import InputError
from dwm_fast.nn.layers import MaskedLayer
from dwm_fast.nn.left_out import in_words, left_out
from dwm_fast.nn.stored import computed, unfit
from dwm_fast.ops.shards import refuse_shards


def literal(name: str) -> str:
    """A shell pattern that fits `name` alone, and in which no comma ends it."""
    return "".join(f"[{c}]" if c in "*?[," else c for c in name)


def maskable_layers(
    model: nn.Module,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    *,
    skip_unmaskable: bool = False,
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and Conv2d layers by name, in definition order, whose name fits `include` and not `exclude`.

    Patterns are those of the shell and fit the whole name, "*" across dots too: "fc", "layer1.*", "*.conv1"; a text may
    hold several: "fc, layer1.*".
    Raises InputError when nothing fits, or a pattern fits nothing, naming what is there; and for layers that a mask
    cannot be put on, all of them at once, unless `skip_unmaskable` leaves them out.
    """
    _refuse_strange(model)
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if found:
        others = [name for name, _ in model.named_modules() if not _contains(name, found)]
        _refuse_idle("include", wanted, found)
        _refuse_idle("exclude", unwanted, found, others)
    chosen = {name: module for name, module in found.items() if _fits(name, wanted) and not _fits(name, unwanted)}
    reasons = {name: why for name, module in chosen.items() if (why := _unmaskable(module))}
    if reasons and not skip_unmaskable:
        masked = any(isinstance(chosen[name], MaskedLayer) for name in reasons)
        advice = "" if masked else f"; or leave out with exclude={list(map(literal, reasons))} or skip_unmaskable=True"
        raise InputError(_grouped(reasons) + advice)
    chosen = {name: module for name, module in chosen.items() if name not in reasons}
    if not chosen:
        raise InputError(
            f"no Linear or Conv2d layer fits include={list(wanted)} and exclude={list(unwanted)}; "
            f"the model has: {_listed(found)}{_beside(model)}"
        )
    if wanted == ("*",):
        _warn_of_the_rest(chosen, left_out(model, unwanted))
    return chosen


def _beside(model: nn.Module) -> str:
    rest = left_out(model)
    return f"; and, never masked, {in_words(rest)}" if rest else ""


def _warn_of_the_rest(chosen: dict[str, nn.Linear | nn.Conv2d], rest: dict[str, tuple[int, int]]) -> None:
    """A warning where most of what the network multiplies by is out of reach, and nobody said that it should be."""
    masked = sum(module.weight.numel() for module in chosen.values())
    if sum(weights for _, weights in rest.values()) > masked:
        warnings.warn(
            f"mask_model masks {masked:,} weights, those of Linear and Conv2d layers, and leaves as they are "
            f"{in_words(rest)}; name those modules in exclude= if that is meant",
            stacklevel=5,
        )


def _refuse_strange(model: Any) -> None:
    """InputError for what is no network, or one whose layers cannot be exchanged."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"the model is {what}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a ScriptModule, whose layers cannot be exchanged; give the network it was made of"
        )
    refuse_shards(model.parameters(), "mask_model", "mask the plain network first, then fully_shard(masked)")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        where = ", ".join(f"'{name}'" for name in dict.fromkeys(name.rpartition(".")[0] for name in lazy))
        raise InputError(f"{where} has no weight yet (lazy module); call the model once on an input, then mask it")


def _patterns(what: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns one by one; a text may hold several, with commas between them and with or without quotes."""
    texts = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{what} holds a {type(text).__name__}; expected names of layers or shell patterns")
    return tuple(part.strip(" '\"") for text in texts for part in re.split(r"(?<!\[),", text))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _contains(name: str, found: Iterable[str]) -> bool:
    """Whether a module of that name is none of the layers and has some inside."""
    return name not in found and any(not name or layer.startswith(f"{name}.") for layer in found)


def _refuse_idle(what: str, patterns: Iterable[str], found: Iterable[str], others: Sequence[str] = ()) -> None:
    """InputError for patterns that fit no layer, and none of the other modules that may be named."""
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in (*found, *others)):
            continue
        inside = [name for name in found if fnmatchcase(name, f"{pattern}.*")]
        hint = f"write '{pattern}.*' for the layers inside" if inside else f"the model has: {_listed(found)}"
        raise InputError(f"{what}=['{pattern}'] fits no layer; {hint}")


def _grouped(reasons: dict[str, str]) -> str:
    """One line for all layers, those of one reason together."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(f"'{name}'")
    return "; ".join(
        f"layer {names[0]} {why}" if len(names) == 1 else f"layers {', '.join(names)}: each {why}"
        for why, names in groups.items()
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none at all"


def _unmaskable(module: nn.Module) -> str:
    """Why a mask cannot be put on a Linear or Conv2d layer; "" where it can."""
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    if isinstance(module, MaskedLayer):
        return "is masked already; give the plain network, or dwm_fast.merge(masked)"
    if why := computed(module):
        return why
    own = type(module).forward is not base.forward or "forward" in vars(module)
    if isinstance(module, nn.Conv2d):
        own = own or type(module)._conv_forward is not nn.Conv2d._conv_forward
    if own:
        return f"is a {_class_name(module, base)} with a forward of its own, which a mask would replace"
    return unfit(module._parameters["weight"])


def _class_name(module: nn.Module, base: type[nn.Module]) -> str:
    """The class's name, with its module where it is called as torch's own is."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__name__}" if cls.__name__ == base.__name__ else cls.__name__


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
                    f"exclude it with exclude={list(map(literal, sorted(involved)))}"
                )
