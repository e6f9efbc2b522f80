"""Checkpoints as people have them: read without unpickling code, unwrapped, folded to plain weights, or refused.

What computes a weight from other tensors is folded where that is exact (pruning: weight_orig * weight_mask; weight
norm: g * v / |v|). What cannot be folded, holds a value that is not finite or is no floating-point number is refused.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dwm_fast.errors import DataError

Tensors = dict[str, Tensor]

ENTRIES = ("state_dict", "model", "model_state_dict", "net", "network", "module", "weights", "params")
"""Under which names files keep a network's tensors, the most usual first; averages (ema) come after all of these."""
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_NO_NETWORK = ("optim", "sched", "scaler", "amp", "rng", "loss", "criterion", "arg", "hyper", "config")
_DEPTH = 4


def read_checkpoint(path: str | Path) -> Tensors:
    """Tensors by name from a .safetensors file or a torch file that holds tensors only; never unpickles code.

    Entries such as "state_dict" or "model_state_dict", at any depth, and wrappers such as "module." or "_orig_mod." are
    understood. Raises DataError.
    """
    path = Path(path)
    state = dict(_state_in(_loaded(path), path))
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in state}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise DataError(
            f"weights: {path} holds '{twice[0]}' more than once, with and without a wrapper; save one of them"
        )
    return {names[name]: value for name, value in state.items()}


def _loaded(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder, a pipe or a device")  # a pipe would be waited for
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"weights: there is no file {path}; give a .safetensors or .pth file") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} is no file of tensors alone, and nothing else is unpickled; save one with "
            "torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # bytes that are no pickle fail in as many ways as the unpickler has lines
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"weights: {path} cannot be read as a file of tensors: {reason}") from error


def _state_in(found: Any, path: Path) -> Tensors:
    """The one mapping of tensors in what a file holds."""
    states = dict(_states(found, ""))
    ranks = {name: _rank(name) for name in states}
    best = [name for name in states if ranks[name] == min(ranks.values())]
    if not best:
        raise DataError(f"weights: {path} holds no state dict; save one with torch.save(model.state_dict(), ...)")
    if len(best) > 1:
        raise DataError(
            f"weights: {path} holds tensors under {', '.join(repr(name) for name in sorted(best))}, and nothing says "
            "which are the network's; save one of them by itself"
        )
    return states[best[0]]


def _states(found: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    if not isinstance(found, Mapping) or depth > _DEPTH:
        return
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    weights = any(value.dim() > 0 for value in tensors.values())
    if weights and not any(_known(key) and isinstance(value, Mapping) for key, value in found.items()):
        yield name, tensors
        return
    for key, value in found.items():
        if not str(key).lower().startswith(_NO_NETWORK):
            yield from _states(value, f"{name}.{key}" if name else str(key), depth + 1)


def _known(key: Any) -> bool:
    return key in ENTRIES or "ema" in str(key).lower()


def _rank(name: str) -> tuple[int, int]:
    """How surely a place in a file is the network's: averages last, known names first, in their order."""
    parts = name.lower().split(".")
    average = int(any("ema" in part or "average" in part for part in parts))
    known = [ENTRIES.index(part) for part in parts if part in ENTRIES]
    return average, min(known, default=-1 if not name else len(ENTRIES))


def fitted(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> Tensors:
    """A checkpoint's tensors under the names of the network `own`: folded to plain weights, a common prefix taken off.

    Args:
        given: as `read_checkpoint` gives them.
        own: the network's state dict.
        source: what the errors call the checkpoint.

    Raises DataError for what computes a weight in a way that cannot be folded exactly.
    """
    folded = _folded(given, own, source)
    prefixes = {""} | {name[: i + 1] for name in folded for i, letter in enumerate(name) if letter == "."}

    def hits(prefix: str) -> tuple[int, int]:
        known = sum(name.startswith(prefix) and name[len(prefix) :] in own for name in folded)
        return known, -len(prefix)

    best = max(prefixes, key=hits)
    return {name.removeprefix(best) if name.startswith(best) else name: value for name, value in folded.items()}


def _folded(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> Tensors:
    state = dict(given)
    for name in given:
        for ending, partner in (("_orig", "_mask"), ("_g", "_v")):
            base = name.removesuffix(ending)
            if base != name and f"{base}{partner}" in given:
                _refuse_two(base, name, given, source)
                first, second = state.pop(name), state.pop(f"{base}{partner}")
                fold = _pruned if ending == "_orig" else _weight_norm
                state[base] = fold(first, second, base, source)
        before, _, after = name.rpartition("parametrizations.")
        weight, _, part = after.partition(".")
        base = f"{before}{weight}"
        if after and part == "original0" and f"{before}parametrizations.{weight}.original1" in given:
            _refuse_two(base, name, given, source)
            second = state.pop(f"{before}parametrizations.{weight}.original1")
            state[base] = _weight_norm(state.pop(name), second, base, source)
    for name in state:
        computed = "parametrizations." in name or (name.endswith("_orig") and name not in own)
        if computed:
            raise DataError(
                f"weights: {source} computes a weight from '{name}', and how is not known from its tensors; save the "
                "plain weight: torch.nn.utils.parametrize.remove_parametrizations (or prune.remove, "
                "remove_spectral_norm) before state_dict()"
            )
    return state


def _refuse_two(weight: str, part: str, given: Mapping[str, Tensor], source: str) -> None:
    """DataError where a weight is given and computed from other tensors as well: nothing says which is in force."""
    if weight in given:
        raise DataError(
            f"weights: {source} holds '{weight}' and '{part}', of which it is computed; save "
            "the network's own state_dict()"
        )


def _pruned(weight: Tensor, mask: Tensor, name: str, source: str) -> Tensor:
    """weight * mask, as torch.nn.utils.prune has it."""
    if weight.shape != mask.shape:
        raise DataError(
            f"weights: {source} masks '{name}' of {tuple(weight.shape)} by a mask of {tuple(mask.shape)}; expected one "
            "shape; save the plain weight (torch.nn.utils.prune.remove)"
        )
    return weight * mask.to(weight.dtype)


def _weight_norm(g: Tensor, v: Tensor, name: str, source: str) -> Tensor:
    """g * v / |v|, as torch computes it; the dimension is the one in which g is not 1."""
    dims = [i for i, size in enumerate(g.shape) if size != 1]
    if g.numel() != 1 and (g.dim() != v.dim() or len(dims) != 1 or g.shape[dims[0]] != v.shape[dims[0]]):
        raise DataError(
            f"weights: {source} computes '{name}' from tensors of {tuple(g.shape)} and {tuple(v.shape)}, which are no "
            "weight norm; save the plain weight (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    dim = dims[0] if dims else 0
    weight: Tensor = v * (g / v.norm()) if g.dim() == 0 else torch._weight_norm(v, g, dim)
    return weight


def check_values(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Raise DataError for a tensor that is no plain finite floating-point one where the network has such a one."""
    for name, value in given.items():
        if value.is_quantized or value.layout != torch.strided or value.is_meta:
            kind = "quantised" if value.is_quantized else "on the meta device" if value.is_meta else str(value.layout)
            raise DataError(
                f"weights: {source}: '{name}' is {kind}; expected a plain tensor: save it dense, dequantised"
            )
        if own[name].is_floating_point() and (not value.is_floating_point() or value.element_size() < 2):
            raise DataError(
                f"weights: {source}: '{name}' is {value.dtype}; expected floating point: save the dequantised weights"
            )
        here = value.to(own[name].dtype)  # which fp64 and bf16 values can be beyond
        if here.is_floating_point() and not bool(torch.isfinite(here).all()):
            count = int((~torch.isfinite(here)).sum())
            raise DataError(
                f"weights: {source}: '{name}' holds {count} values that are not finite (NaN or infinite) as "
                f"{own[name].dtype}, as after a training that diverged; give another checkpoint"
            )
        if name.endswith("running_var") and bool((here < 0).any()):
            raise DataError(
                f"weights: {source}: '{name}' holds a negative variance, whose root is no number; give "
                "another checkpoint"
            )
