"""Saving and loading a masked model without pickle: one safetensors file with the mask kind in its header."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dwm_fast._files import reason, write_atomic
from dwm_fast.errors import InputError, MaskFileError
from dwm_fast.nn.hosts import shares
from dwm_fast.nn.kinds import kind_from_dict
from dwm_fast.nn.masking import mask_model
from dwm_fast.nn.model import MaskedModel, as_masked_model
from dwm_fast.nn.select import literal, usual_names
from dwm_fast.nn.shell import unwrapped
from dwm_fast.ops.shards import refuse_shards

_FORMAT = "dwm-fast masked model 1"


def save_masked(masked: MaskedModel, path: str | os.PathLike[str]) -> None:
    """Write the whole state of a masked model (weights, mask parameters, noise state) atomically.

    For one bit per weight and domain use `dwm_fast.MaskBank`; this file is for going on with training.

    Args:
        masked: the masked model.
        path: where to; missing folders are made, an old file is replaced. Unwritable: DataError.

    The file has the names of the model itself: torch.compile and data-parallel wrappers around it or in it leave no
    trace.

    Raises:
        InputError: no masked model, or its state holds what is no plain tensor (extra state of a module, shards, sparse
            or quantized tensors): named, and nothing is written.
    """
    masked = as_masked_model(masked, "save_masked")
    header = {
        "format": _FORMAT,
        "masked": json.dumps(
            {
                "kind": masked.kind.to_dict(),
                "layers": [_plain_name(name) for name in masked.mask_layers()],
                "mask_samples": masked.mask_samples,
                "batch_norm": masked.batch_norm,
                **({} if masked.memory == "plain" else {"memory": masked.memory}),
                **({} if masked.logits == "fp32" else {"logits": masked.logits}),
                **({} if masked.noise == "shared" else {"noise": masked.noise}),
                **({"tied": "share"} if shares(masked.model, masked.mask_layers().values()) else {}),
            }
        ),
    }
    state = {_plain_name(name): value for name, value in masked.state_dict().items()}
    refuse_shards((value for value in state.values() if isinstance(value, Tensor)), "save_masked")
    for name, value in state.items():
        what = _strangeness(value)
        if what:
            raise InputError(
                f"'{name}' of the model's state is {what}; save_masked writes plain tensors alone: make it a buffer, "
                "or save the masks with dwm_fast.MaskBank"
            )
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    write_atomic(path, save(tensors, metadata=header))


def _strangeness(value: object) -> str:
    """What an entry of a state dict is, where it is no plain tensor; "" where it is one."""
    if not isinstance(value, Tensor) or hasattr(value, "__tensor_flatten__"):
        return type(value).__name__
    strange = value.layout is not torch.strided or value.is_meta or value.is_quantized
    return f"{value.layout} on {value.device}" if strange else ""


def _plain_name(name: str) -> str:
    """A name without torch.compile's part in it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def load_masked(model: nn.Module, path: str | os.PathLike[str]) -> MaskedModel:
    """Rebuild a masked model from `save_masked`'s file over a plain network of the same architecture.

    Args:
        model: the plain network; it is left as it is, and of its values only device and dtypes are used.
        path: the file.

    Returns:
        The masked model; as after `mask_model`, nothing but the mask parameters is trainable.

    Raises:
        MaskFileError: the file is missing, broken, or of another architecture (names the first difference).
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise MaskFileError(f"{path}: cannot be read as safetensors: {reason(error)}") from error
    if header.get("format") != _FORMAT:
        raise MaskFileError(f"{path}: format is {header.get('format')!r}; expected '{_FORMAT}' (from save_masked)")
    masked = _rebuild(copy.deepcopy(unwrapped(model)), header.get("masked", ""), path)
    _compare(masked.state_dict(), tensors, path)
    masked.load_state_dict(tensors)
    return masked


def _rebuild(model: nn.Module, about: str, path: Path) -> MaskedModel:
    """The masked model that the header describes, over `model`'s own storage."""
    try:
        header = json.loads(about)
        kind, layers = kind_from_dict(header["kind"]), [str(name) for name in header["layers"]]
        how: dict[str, Any] = {"mask_samples": int(header["mask_samples"]), "batch_norm": str(header["batch_norm"])}
        how |= {"memory": str(header.get("memory", "plain")), "tied": str(header.get("tied", "refuse"))}
        how |= {"logits": str(header.get("logits", "fp32")), "noise": str(header.get("noise", "shared"))}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise MaskFileError(f"{path}: the field 'masked' of the header is broken: {error!r}; save it again") from error
    there = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in layers if not {name, f"{name}.weight".lstrip(".")} & there.keys()]
    if missing or not layers:
        raise MaskFileError(
            f"{path}: was saved from another network: it masks '{next(iter(missing), '')}', and the given "
            "model has no weight of that name; give the architecture it was saved from"
        )
    usual = usual_names(model)
    include = [literal(usual[name]) for name in layers if name in usual]
    also = [literal(name if name in there else f"{name}.weight".lstrip(".")) for name in layers if name not in usual]
    try:
        return mask_model(model, kind, include=include, also=also, seed=0, **how)
    except InputError as error:
        raise MaskFileError(f"{path}: does not fit the given model: {error}") from error


def _compare(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    for name in (*expected, *given):
        if name not in given or name not in expected:
            place = "is not in the file" if name not in given else "is in the file alone"
        elif expected[name].shape != given[name].shape:
            shapes = [tuple(tensors[name].shape) for tensors in (given, expected)]
            place = f"has shape {shapes[0]} in the file and {shapes[1]} in the model"
        elif expected[name].is_floating_point() != given[name].is_floating_point():
            place = f"is {given[name].dtype} in the file and {expected[name].dtype} in the model"
        else:
            continue
        raise MaskFileError(
            f"{path}: was saved from another network: '{name}' {place}; give the architecture it was saved from"
        )
