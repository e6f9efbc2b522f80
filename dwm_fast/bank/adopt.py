"""What a masked model becomes in a bank: its bits, its form, and the tensors in which it differs from the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from dwm_fast.bank.record import pack_signs
from dwm_fast.errors import InputError
from dwm_fast.nn.stored import plain_parts

_UNUSED_IN_EVAL = "num_batches_tracked"


@dataclass
class Adopted:
    """Arguments of `make_domain` that a masked model gives."""

    masks: dict[str, Tensor]
    form: str = "binary"
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def adopted(masks: Any, tensors: Mapping[str, Tensor], form: str | None, with_values: bool) -> Adopted:
    """What `MaskBank.add` was given, as arguments of `make_domain`.

    Args:
        masks: a mapping of bool tensors, or a masked model.
        tensors: the backbone's state dict.
        form: as it was asked for; "kept" without values takes those that the backbone has now.
        with_values: whether values were given beside the masks.

    Raises:
        InputError: masks are neither, or the weights of a mask with more than bits were asked for as kept ones.
    """
    if hasattr(masks, "keep_masks"):
        given = adopt(masks, tensors)
    elif isinstance(masks, Mapping):
        given = Adopted(weight_names(masks, tensors))
    else:
        raise InputError(
            f"masks: given {type(masks).__name__}; expected a mapping of bool tensors, or a model with keep_masks()"
        )
    if form == "kept" and not with_values:
        if given.form != "binary":
            raise InputError(f"form='kept' stores what a binary mask keeps; this one has form '{given.form}'")
        for name, mask in given.masks.items():
            weight = tensors[name].detach()
            check_mask_shape(name, tuple(mask.shape), tuple(weight.shape), whole=True)
            given.values[name] = weight[mask.to(weight.device, torch.bool)]
    given.form = form or given.form
    return given


def weight_names(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by parameter name, from masks by parameter or module name ("conv1" means "conv1.weight").

    Raises InputError for a name that the backbone lacks, or a mask whose shape does not spread over its
    weight.
    """
    result = {}
    for given, mask in masks.items():
        name = given if given in tensors else f"{given}.weight".lstrip(".")
        if name not in tensors:
            known = [*tensors, *(other.removesuffix(".weight") for other in tensors)]
            near = get_close_matches(given, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise InputError(f"mask '{given}': the backbone has no such weight{hint}")
        check_mask_shape(name, tuple(mask.shape), tuple(tensors[name].shape))
        result[name] = mask
    return result


def check_mask_shape(name: str, mask: tuple[int, ...], weight: tuple[int, ...], whole: bool = False) -> None:
    """InputError unless every size of the mask is the weight's or, where it need not be `whole`, 1."""
    spread = len(mask) == len(weight) and all(m in (w, 1) for m, w in zip(mask, weight, strict=True))
    if not (mask == weight if whole else spread):
        choice = "" if whole else ", or 1 in place of some of its sizes"
        raise InputError(f"mask '{name}' has shape {mask}; expected {weight}{choice}")


def adopt(masked: Any, tensors: Mapping[str, Tensor]) -> Adopted:
    """Read a masked model: `keep_masks()`, and where it has them `kind`, `mask_layers()` and `model`.

    Args:
        masked: an object such as `dwm_fast.MaskedModel`.
        tensors: the backbone's state dict, which decides what is the domain's own.
    """
    result = Adopted(_first_names(weight_names(masked.keep_masks(), tensors), tensors))
    kind = getattr(masked, "kind", None)
    if kind is not None:
        result.method, result.options = str(kind.name), dict(kind.to_dict())
        if hasattr(kind, "form"):
            _read_kind(masked, result)
    model = getattr(masked, "model", None)
    if model is not None:
        state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        _refuse_other_weights(state, result.masks, tensors)
        result.state = _own_state(state, result.masks, tensors)
    return result


def _first_names(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same masks, that of a tied tensor by the first of its names, as parameters are named."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {first[id(tensors[name])]: mask for name, mask in masks.items()}


def _refuse_other_weights(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """InputError where a masked weight is not the backbone's: its mask would be served over other weights."""
    for name in masks:
        mine, theirs = state.get(name), tensors[name]
        if mine is None or mine.is_meta or theirs.is_meta:
            continue
        same = mine.shape == theirs.shape and torch.equal(mine.detach().cpu(), theirs.detach().to("cpu", mine.dtype))
        if not same:
            raise InputError(
                f"'{name}' of the masked model is not the backbone's: the mask was learned over other weights, or they "
                "were trained since; make the bank over the network that was masked"
            )


def _read_kind(masked: Any, result: Adopted) -> None:
    """Edits, signs and scales: what a mask of such a kind holds beside its bits."""
    result.form = masked.kind.form
    for name, layer in zip(result.masks, masked.mask_layers().values(), strict=True):
        value = masked.kind.stored(layer.mask_logits.detach(), layer.unit)
        if value is not None:
            result.values[name] = pack_signs(value) if value.dtype == torch.bool else value


def _own_state(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of `state` that the backbone has too, with another shape or other values, and that no mask covers."""
    own = {}
    for name, theirs in tensors.items():
        mine = state.get(name)
        if mine is None or name in masks or name.endswith(_UNUSED_IN_EVAL):
            continue
        if mine.shape != theirs.shape or not _equal(mine.detach(), theirs.detach()):
            own[name] = mine
    return own


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, part by part where they are of a class with tensors inside."""
    pairs = [plain_parts(a), plain_parts(b)]
    return len(pairs[0]) == len(pairs[1]) and all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(*pairs, strict=True))
