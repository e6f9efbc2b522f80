"""Saving and loading a masked model without pickle: one safetensors file with the mask kind in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from dwm_fast._files import write_atomic
from dwm_fast.errors import MaskFileError
from dwm_fast.nn.kinds import kind_from_dict
from dwm_fast.nn.model import MaskedModel, mask_model

_FORMAT = "dwm-fast masked model 1"


def save_masked(masked: MaskedModel, path: str | os.PathLike[str]) -> None:
    """Write the whole state of a masked model (weights, mask parameters, noise state) atomically.

    For one bit per weight and domain use `dwm_fast.MaskBank`; this file is for going on with training.
    """
    header = {
        "format": _FORMAT,
        "masked": json.dumps(
            {
                "kind": masked.kind.to_dict(),
                "layers": list(masked.mask_layers()),
                "mask_samples": masked.mask_samples,
                "batch_norm": masked.batch_norm,
            }
        ),
    }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in masked.state_dict().items()}
    write_atomic(path, save(tensors, metadata=header))


def load_masked(model: nn.Module, path: str | os.PathLike[str]) -> MaskedModel:
    """Rebuild a masked model from `save_masked`'s file over a plain network of the same architecture.

    Args:
        model: the plain network; it is left as it is, and its values are not used.
        path: the file.

    Raises:
        MaskFileError: the file is missing, broken, or of another architecture (names the first difference).
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MaskFileError(f"{path}: cannot be read as safetensors: {error}") from error
    if header.get("format") != _FORMAT:
        raise MaskFileError(f"{path}: format is {header.get('format')!r}; expected '{_FORMAT}' (from save_masked)")
    about = json.loads(header["masked"])
    private = _private_copy(model)
    masked = mask_model(
        private, kind_from_dict(about["kind"]), include=[_literal(n) for n in about["layers"]],
        mask_samples=about["mask_samples"], batch_norm=about["batch_norm"], seed=0,
    )  # fmt: skip
    try:
        masked.load_state_dict(tensors)
    except RuntimeError as error:
        raise MaskFileError(f"{path}: was saved from another network: {error}") from error
    return masked


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy with storage of its own, so that loading does not write into the given network."""
    import copy

    with torch.no_grad():
        return copy.deepcopy(model)


def _literal(name: str) -> str:
    """A shell pattern that fits `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
