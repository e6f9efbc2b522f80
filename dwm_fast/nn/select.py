"""Which weights of a network can be masked, and which were asked for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dwm_fast.errors import InputError
from dwm_fast.nn.coverage import LEAST_SHARE, in_words, left_out
from dwm_fast.nn.hosts import Host, MaskedParameter
from dwm_fast.nn.layers import MaskedLayer
from dwm_fast.nn.stored import computed, unfit
from dwm_fast.ops.shards import refuse_shards


@dataclass(frozen=True)
class MaskableWeight:
    """A parameter that a mask can be put on.

    Attributes:
        path, module: the module it belongs to.
        attribute: its name there.
    """

    path: str
    attribute: str
    module: nn.Module

    @property
    def name(self) -> str:
        """What its mask is called: the module's name, with the parameter's unless that is `weight`."""
        return self.path if self.attribute == "weight" else self.full_name

    @property
    def full_name(self) -> str:
        """The parameter's name in the network's state dict."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        weight = self.module._parameters[self.attribute]
        assert weight is not None
        return weight

    def layer_class(self) -> type[nn.Module] | None:
        """Linear or Conv2d, where the module does what that class does, which has a masked layer of its own."""
        module = type(self.module)
        if issubclass(module, nn.Linear):
            return nn.Linear if module.forward is nn.Linear.forward else None
        plain = nn.Conv2d
        if not issubclass(module, plain) or module.forward is not plain.forward:
            return None
        return plain if module._conv_forward is plain._conv_forward else None


_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_BY_NAME = (("Conv1D", 2), ("Experts", 3), ("Expert", 3))
"""How names of classes that torch does not have end, and from how many dimensions on their parameters are weights:
transformers' Linear of GPT-2, and the weights of all experts of a mixture in one tensor."""


def _attributes(module: nn.Module) -> list[str]:
    """The parameters of a module that are masked unless something else is said, computed ones too."""
    if isinstance(module, MaskedParameter):
        return []
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, MaskedLayer, Host)):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _ATTENTION if getattr(module, name, None) is not None]
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names if name.startswith("weight_")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    least = next((dimensions for ending, dimensions in _BY_NAME if type(module).__name__.endswith(ending)), None)
    parameters = module._parameters.items() if least is not None else ()
    return [name for name, parameter in parameters if parameter is not None and parameter.dim() >= (least or 0)]


def maskable_weights(
    model: nn.Module,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    *,
    also: str | Iterable[str] = (),
    skip_unmaskable: bool = False,
) -> dict[str, MaskableWeight]:
    """Weights by the name of their mask, in definition order, whose name or module fits `include` and not `exclude`.

    They are the weights of Linear, Bilinear and of all convolutions, of attention, RNN, LSTM and GRU, of transformers'
    Conv1D, and of experts in one tensor; a mask is called by its module, and by the parameter too where that is not
    `weight`: "encoder.attention.in_proj_weight". Patterns are those of the shell and fit the whole name, "*" across
    dots too: "fc", "layer1.*", "*.conv1"; a text may hold several: "fc, layer1.*". `also` names modules and parameters
    that are masked only where they are asked for: embeddings, and parameters of two dimensions or more of any other
    module; a parameter of one dimension, a bias say, by its full name.

    Raises InputError when nothing fits, or a pattern fits nothing, naming what is there; and for weights that a mask
    cannot be put on, all of them at once, unless `skip_unmaskable` leaves them out.
    """
    _refuse_strange(model)
    wanted, unwanted, asked = _patterns("include", include), _patterns("exclude", exclude), _patterns("also", also)
    found = _usual(model)
    names = [name for weight in found.values() for name in (weight.path, weight.full_name)]
    if found:
        others = [name for name, _ in model.named_modules() if not _contains(name, found)]
        _refuse_idle("include", wanted, found, names)
        _refuse_idle("exclude", unwanted, found, [*names, *others, *_asked_for(model, ("*",))])
    chosen = {n: w for n, w in found.items() if _chosen(w, wanted) and not _chosen(w, unwanted)}
    chosen = _in_order(model, {**chosen, **_requested(model, asked)})
    reasons = {name: why for name, weight in chosen.items() if (why := _unmaskable(weight))}
    if reasons and not skip_unmaskable:
        masked = any(isinstance(chosen[name].module, (MaskedLayer, Host)) for name in reasons)
        advice = "" if masked else f"; or leave out with exclude={list(map(literal, reasons))} or skip_unmaskable=True"
        raise InputError(_grouped(reasons) + advice)
    skipped = [literal(chosen[name].path) for name in reasons]
    chosen = {name: weight for name, weight in chosen.items() if name not in reasons}
    if not chosen:
        raise InputError(
            f"no weight fits include={list(wanted)} and exclude={list(unwanted)}; "
            f"the model has: {_listed(found)}{_beside(model)}"
        )
    if wanted == ("*",):
        _warn_of_the_rest(model, chosen, [*unwanted, *skipped])
    return chosen


def weight_place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the parameter's name there of the weight whose mask is called `name`."""
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name], "weight"
    path, _, attribute = name.rpartition(".")
    return modules[path], attribute


def usual_names(model: nn.Module) -> dict[str, str]:
    """Mask's name -> parameter's full name of the weights that are masked unless something else is said."""
    return {name: weight.full_name for name, weight in _usual(model).items()}


def _usual(model: nn.Module) -> dict[str, MaskableWeight]:
    weights = (MaskableWeight(path, a, m) for path, m in model.named_modules() for a in _attributes(m))
    return {weight.name: weight for weight in weights}


def literal(name: str) -> str:
    """A shell pattern that fits `name` alone, and in which no comma ends it."""
    return "".join(f"[{c}]" if c in "*?[," else c for c in name)


def _chosen(weight: MaskableWeight, patterns: Sequence[str]) -> bool:
    return any(_fits(name, patterns) for name in (weight.name, weight.path, weight.full_name))


def _asked_for(model: nn.Module, patterns: Sequence[str]) -> dict[str, MaskableWeight]:
    """Every parameter that `also` may name, those of `patterns` alone."""
    found = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            weight = MaskableWeight(path, attribute, module)
            if parameter is None:
                continue
            if _fits(weight.full_name, patterns) or (parameter.dim() > 1 and _chosen(weight, patterns)):
                found[weight.name] = weight
    return found


def _requested(model: nn.Module, patterns: Sequence[str]) -> dict[str, MaskableWeight]:
    for pattern in patterns:
        if not _asked_for(model, (pattern,)):
            raise InputError(
                f"also=['{pattern}'] fits no module with weights and no parameter; the model has: "
                f"{_listed(name for name, _ in model.named_parameters())}"
            )
    return _asked_for(model, patterns) if patterns else {}


def _in_order(model: nn.Module, weights: dict[str, MaskableWeight]) -> dict[str, MaskableWeight]:
    """The same weights in the order of the network's definition."""
    by_parameter = {(w.path, w.attribute): n for n, w in weights.items()}
    order = [(path, a) for path, m in model.named_modules() for a in dict.fromkeys((*_attributes(m), *m._parameters))]
    return {by_parameter[place]: weights[by_parameter[place]] for place in order if place in by_parameter}


def _beside(model: nn.Module) -> str:
    rest = left_out(model)
    return f"; and, masked only by also=, {in_words(rest)}" if rest else ""


def _warn_of_the_rest(model: nn.Module, chosen: dict[str, MaskableWeight], exclude: Sequence[str]) -> None:
    """A warning where much of what the network multiplies by has no mask, and nobody said that it should not."""
    rest = left_out(model, exclude, {id(weight.weight) for weight in chosen.values()})
    masked, other = sum(w.weight.numel() for w in chosen.values()), sum(weights for _, weights in rest.values())
    if other and masked < LEAST_SHARE * (masked + other):
        warnings.warn(
            f"mask_model masks {masked:,} weights, {masked / (masked + other):.0%} of what the network multiplies by, "
            f"and leaves as they are {in_words(rest)}; ask for their masks with also=, or name those modules in "
            "exclude= if that is meant",
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


def _unmaskable(weight: MaskableWeight) -> str:
    """Why a mask cannot be put on a weight; "" where it can."""
    if isinstance(weight.module, (MaskedLayer, Host)):
        return "is masked already; give the plain network, or dwm_fast.merge(masked)"
    if why := computed(weight.module, weight.attribute):
        return why
    if "forward" in vars(weight.module):
        return "has a forward that was set on this one object, which would run past the mask; take it off first"
    return unfit(weight.weight)


Place = tuple[str, str]
"""The path of a module, and the name of one of its parameters."""


def share_tied(
    model: nn.Module, chosen: dict[str, MaskableWeight], tied: str
) -> tuple[dict[str, MaskableWeight], dict[str, list[Place]]]:
    """The chosen weights, a tensor of several names by the first of them; and all places of those tensors, by name.

    Raises InputError where there are such tensors and `tied` is "refuse".
    """
    if tied not in ("refuse", "share"):
        raise InputError(f"tied={tied!r}; expected 'refuse', or 'share' for one mask on all places of a tied tensor")
    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((path, attribute))
    owners: dict[int, str] = {}
    for name, weight in chosen.items():
        owners.setdefault(id(weight.weight), name)
    shared = {name: places[tensor] for tensor, name in owners.items() if len(places[tensor]) > 1}
    if shared and tied == "refuse":
        _refuse_tied(next(iter(shared.values())), chosen)
    return {name: chosen[name] for name in owners.values()}, shared


def _refuse_tied(places: list[Place], chosen: dict[str, MaskableWeight]) -> None:
    names = sorted(literal(name) for name, weight in chosen.items() if (weight.path, weight.attribute) in places)
    first, second = (".".join(filter(None, place)) for place in places[:2])
    raise InputError(
        f"'{second}' and '{first}' are one tied tensor, and one tensor cannot have two masks; give it one with "
        f"tied='share', or exclude it with exclude={names}"
    )
