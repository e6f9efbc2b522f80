"""Masks in other programs' forms: state dicts of any dtype, torch.nn.utils.prune, np.packbits; in and out."""

from __future__ import annotations

import math
import operator
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dwm_fast._files import reason, write_atomic
from dwm_fast.bank.header import MAX_DIMENSIONS, open_regular
from dwm_fast.bank.record import check_tensor, pack_signs
from dwm_fast.errors import InputError, MaskFileError

_SUFFIX = "_mask"
_ORIGINAL = "_orig"
_SHAPE = ".shape"
_FREE_BYTES = 64 << 20
_BYTES_PER_BYTE = 512
"""An .npz may unpack to 64 MiB and 512 times its size; fp32 masks that keep a hundredth compress 400-fold."""
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError, OverflowError, BadZipFile,
    SafetensorError, struct.error, zlib.error,
)  # fmt: skip
"""What NumPy, zipfile, zlib and safetensors raise on files that are none of theirs."""
EXPORTS = ("bool", "uint8", "float32")
"""dtypes that masks are exported in, one element per weight."""


def as_masks(masks: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor]:
    """Masks of any dtype whose elements are 0 or 1 (bool, integers, floats; arrays too) as bool tensors.

    A name that ends in "_mask", as torch.nn.utils.prune writes it, loses that ending; beside a name in "_orig", a whole
    state dict of a pruned network, only such pairs count. Raises InputError when an element is neither 0 nor 1; a mask
    of -1, 0 and 1 goes through `as_ternary`.
    """
    return {name: _bools(name, tensor) for name, tensor in _named(masks).items()}


def as_ternary(masks: Mapping[str, Tensor | NDArray[Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ternary masks of -1, 0 and 1 (255 is -1 in bytes without sign), as Piggyback's code has them.

    Returns:
        The keep masks, bool, and the packed signs: masks and values of a domain of form "ternary".

    Raises InputError when an element is another number.
    """
    keep, signs = {}, {}
    for name, tensor in _named(masks).items():
        minus = tensor == (255 if tensor.dtype == torch.uint8 else -1)
        keep[name] = _bools(name, torch.where(minus, torch.ones_like(tensor), tensor))
        signs[name] = pack_signs(minus)
    return keep, signs


def _bools(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise InputError(
            f"mask '{name}' ({tensor.dtype}) holds values other than 0 and 1; turn scores into "
            f"a mask first, for example scores >= 0"
        )
    return tensor != 0


def _named(masks: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor]:
    """Tensors by the names of the parameters that they mask."""
    pairs = {name.removesuffix(_ORIGINAL) + _SUFFIX: name for name in masks if name.endswith(_ORIGINAL)}
    pruned = {name for name, whole in pairs.items() if name in masks and masks[name].shape == masks[whole].shape}
    result: dict[str, Tensor] = {}
    for given, mask in masks.items():
        name = given.removesuffix(_SUFFIX)
        if pruned and given not in pruned:
            continue
        if name in result:
            raise InputError(f"masks '{name}' and '{name}{_SUFFIX}' are two for one parameter; give one")
        if not isinstance(mask, Tensor | np.ndarray):
            raise InputError(f"mask '{given}' is {type(mask).__name__}; expected a tensor or an array")
        result[name] = (
            mask.detach() if isinstance(mask, Tensor) else torch.from_numpy(np.require(mask, requirements=("C", "W")))
        )
        check_tensor(name, result[name])
    return result


def from_pruned(module: nn.Module) -> dict[str, Tensor]:
    """The masks that torch.nn.utils.prune put on `module` and its children, by parameter name, as bool tensors.

    They are the buffers X_mask beside a parameter X_orig of the same shape: other buffers of such a name (attention
    masks) are not.
    """
    originals = {n.removesuffix(_ORIGINAL) + _SUFFIX: p for n, p in module.named_parameters() if n.endswith(_ORIGINAL)}
    buffers = dict(module.named_buffers())
    masks = {name for name, original in originals.items() if name in buffers and buffers[name].shape == original.shape}
    if not masks:
        raise InputError(
            "the module has no pruning masks; expected buffers such as 'conv1.weight_mask' from torch.nn.utils.prune"
        )
    return as_masks({name: buffer for name, buffer in buffers.items() if name in masks})


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

    bit_order is np.packbits' own: "big" (its default) or "little". InputError when an array does not fit its shape, or
    when the bits that fill up its last byte are not zero: then it was packed in the other order.
    """
    result = {}
    order = _order(bit_order)
    for name, array in packed.items():
        if name not in shapes:
            raise InputError(f"packed mask '{name}' has no shape; give one in shapes")
        shape = _shape(name, shapes[name])
        n = math.prod(shape)
        if array.dtype != np.uint8 or array.shape != ((n + 7) // 8,):
            raise InputError(
                f"packed mask '{name}' is {array.dtype} of shape {array.shape}; expected uint8 of shape "
                f"({(n + 7) // 8},) for a mask of shape {shape}"
            )
        if np.unpackbits(array[-1:], bitorder=order)[n % 8 or 8 :].any():
            other = "little" if order == "big" else "big"
            raise InputError(
                f"packed mask '{name}': bits beyond the {n} of its shape are set in bit order '{order}'; it was packed "
                f"in the other: give bit_order='{other}' (dwm-fast masks convert --bit-order {other})"
            )
        keep = np.unpackbits(array, count=n, bitorder=order)
        result[name] = torch.from_numpy(keep).bool().reshape(shape)
    return result


def _shape(name: str, sizes: Any) -> tuple[int, ...]:
    """A shape from outside: whole numbers of at least 0, few and with a product that any file could hold."""
    try:
        shape = tuple(operator.index(size) for size in sizes)
    except TypeError:
        shape = (-1,)
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape) or math.prod(shape) > 1 << 53:
        raise InputError(f"packed mask '{name}' has the shape {str(sizes)[:80]}; expected sizes of at least 0")
    return shape


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


def read_foreign(path: str | os.PathLike[str], bit_order: str = "big") -> dict[str, Tensor]:
    """Masks from a plain .safetensors of masks (any dtype) or an .npz (masks, or packbits with "<name>.shape").

    Nothing is unpickled. bit_order is that of packbits. Raises MaskFileError when the file is not one of these or holds
    no masks.
    """
    found: dict[str, Tensor] = _read(Path(path), bit_order, as_masks)
    return found


def read_ternary(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`as_ternary` of the tensors in a file that `read_foreign` could read."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = _read(Path(path), "big", as_ternary)
    return found


def _read(path: Path, bit_order: str, convert: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        with open_regular(path) as file:
            if path.suffix == ".npz":
                arrays = dict(_arrays(file))
                shapes = {n.removesuffix(_SHAPE): a.tolist() for n, a in arrays.items() if n.endswith(_SHAPE)}
                if lost := shapes.keys() - arrays.keys():
                    raise InputError(f"'{min(lost)}{_SHAPE}' is the shape of '{min(lost)}', which is not there")
                packed = from_packbits({name: arrays[name] for name in shapes}, shapes, bit_order)
                plain = {n: a for n, a in arrays.items() if not n.endswith(_SHAPE) and n not in shapes}
                found = convert({**plain, **packed})
            else:
                with safe_open(path, framework="pt") as tensors:
                    found = convert({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    except _UNREADABLE as error:
        why = f"{path}: cannot be read as masks: {reason(error)}; expected .safetensors or .npz"
        raise MaskFileError(why) from error
    if not found or not found[0] if isinstance(found, tuple) else not found:
        raise MaskFileError(f"{path}: holds no masks")
    return found


def _arrays(file: BinaryIO) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of an .npz, each as large as its header says before a byte of it is made room for."""
    with ZipFile(file) as archive:
        given, claimed = os.fstat(file.fileno()).st_size, sum(info.file_size for info in archive.infolist())
        if claimed > _FREE_BYTES + _BYTES_PER_BYTE * given:
            raise ValueError(f"{claimed} bytes packed into {given}, more than masks are")
        for info in archive.infolist():
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[version](member)
                _shape(info.filename, shape)
                nbytes = math.prod(shape) * dtype.itemsize
                if dtype.hasobject or member.tell() + nbytes != info.file_size:
                    raise ValueError(f"'{info.filename}' holds objects, or is not as long as its header says")
                array = np.frombuffer(member.read(nbytes), dtype).reshape(shape, order="F" if fortran else "C")
                yield info.filename.removesuffix(".npy"), array


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
