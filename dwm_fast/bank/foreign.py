"""Masks in other programs' forms: state dicts of any dtype, torch.nn.utils.prune, np.packbits; in and out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dwm_fast._files import write_atomic
from dwm_fast.errors import InputError, MaskFileError

_SUFFIX = "_mask"
_SHAPE = ".shape"
EXPORTS = ("bool", "uint8", "float32")
"""dtypes that masks are exported in, one element per weight."""


def as_masks(masks: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor]:
    """Masks of any dtype whose elements are 0 or 1 (bool, integers, floats; arrays too) as bool tensors.

    A name that ends in "_mask", as torch.nn.utils.prune writes it, loses that ending. Raises InputError when
    an element is neither 0 nor 1.
    """
    result: dict[str, Tensor] = {}
    for name, given in masks.items():
        tensor = torch.from_numpy(np.ascontiguousarray(given)) if isinstance(given, np.ndarray) else given.detach()
        if tensor.dtype != torch.bool:
            if not bool(((tensor == 0) | (tensor == 1)).all()):
                raise InputError(
                    f"mask '{name}' ({tensor.dtype}) holds values other than 0 and 1; turn scores into "
                    f"a mask first, for example scores >= 0"
                )
            tensor = tensor != 0
        result[name.removesuffix(_SUFFIX)] = tensor
    return result


def from_pruned(module: nn.Module) -> dict[str, Tensor]:
    """The masks that torch.nn.utils.prune put on `module` and its children, by parameter name, as bool tensors."""
    masks = {name: buffer for name, buffer in module.named_buffers() if name.endswith(_SUFFIX)}
    if not masks:
        raise InputError(
            "the module has no pruning masks; expected buffers such as 'conv1.weight_mask' from torch.nn.utils.prune"
        )
    return as_masks(masks)


def to_pruned(module: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Put masks (by parameter name) on `module` by torch.nn.utils.prune.custom_from_mask; returns the module."""
    from torch.nn.utils import prune

    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise InputError(f"mask '{name}' of shape {tuple(mask.shape)} fits no parameter of the module")
    for name, mask in masks.items():
        parent, _, parameter = name.rpartition(".")
        prune.custom_from_mask(module.get_submodule(parent), parameter, mask)  # type: ignore[no-untyped-call]
    return module


def from_packbits(
    packed: Mapping[str, NDArray[np.uint8]], shapes: Mapping[str, Iterable[int]], bit_order: str = "big"
) -> dict[str, Tensor]:
    """Masks from flat arrays that np.packbits made of bool arrays of the given shapes.

    bit_order is np.packbits' own: "big" (its default) or "little".
    """
    result = {}
    for name, array in packed.items():
        if name not in shapes:
            raise InputError(f"packed mask '{name}' has no shape; give one in shapes")
        shape = tuple(int(size) for size in shapes[name])
        n = int(np.prod(shape, dtype=np.int64))
        if array.dtype != np.uint8 or array.shape != ((n + 7) // 8,):
            raise InputError(
                f"packed mask '{name}' is {array.dtype} of shape {array.shape}; expected uint8 of shape "
                f"({(n + 7) // 8},) for a mask of shape {shape}"
            )
        keep = np.unpackbits(array, count=n, bitorder=_order(bit_order))
        result[name] = torch.from_numpy(keep).bool().reshape(shape)
    return result


def to_packbits(
    masks: Mapping[str, Tensor], bit_order: str = "big"
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, tuple[int, ...]]]:
    """Flat np.packbits arrays and the shapes that go with them; the inverse of `from_packbits`."""
    order = _order(bit_order)
    packed = {n: np.packbits(m.detach().cpu().numpy().reshape(-1), bitorder=order) for n, m in masks.items()}
    return packed, {name: tuple(mask.shape) for name, mask in masks.items()}


def _order(bit_order: str) -> Any:
    if bit_order not in ("big", "little"):
        raise InputError(f"bit_order '{bit_order}' is unknown; expected 'big' or 'little', as in np.packbits")
    return bit_order


def read_foreign(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Masks from a plain .safetensors of masks (any dtype) or an .npz (masks, or packbits with "<name>.shape").

    Nothing is unpickled. Raises MaskFileError when the file is not one of these.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            shapes = {n.removesuffix(_SHAPE): a.tolist() for n, a in arrays.items() if n.endswith(_SHAPE)}
            plain = {n: a for n, a in arrays.items() if not n.endswith(_SHAPE) and n not in shapes}
            return as_masks(plain) | from_packbits({name: arrays[name] for name in shapes}, shapes)
        with safe_open(path, framework="pt") as file:
            return as_masks({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, SafetensorError) as error:
        raise MaskFileError(f"{path}: cannot be read as masks: {error}; expected .safetensors or .npz") from error


def write_foreign(path: str | os.PathLike[str], masks: Mapping[str, Tensor], form: str) -> None:
    """Write masks for other programs, atomically: form "packbits" to .npz, "bool", "uint8" or "float32" to either.

    In an .npz of form "packbits" every mask has a second array, "<name>.shape".
    """
    path = Path(path)
    if form not in (*EXPORTS, "packbits") or path.suffix not in (".npz", ".safetensors"):
        raise InputError(
            f"cannot export '{form}' to {path.name}; expected one of {', '.join(EXPORTS)} or packbits, "
            f"and a name that ends in .safetensors or .npz"
        )
    if form == "packbits":
        if path.suffix != ".npz":
            raise InputError(f"packbits go to .npz; given {path.name}")
        packed, shapes = to_packbits(masks)
        arrays: dict[str, Any] = dict(packed)
        arrays |= {f"{name}{_SHAPE}": np.array(shape, dtype=np.int64) for name, shape in shapes.items()}
        _write_npz(path, arrays)
        return
    tensors = {name: mask.detach().cpu().to(getattr(torch, form)).contiguous() for name, mask in masks.items()}
    if path.suffix == ".npz":
        _write_npz(path, {name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        write_atomic(path, save(tensors), MaskFileError)


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getbuffer(), MaskFileError)
