"""bits: pack, unpack, apply, count and set operations on the masks of ResNet-18."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast.ops import backends

from .context import Context
from .machine import copy_way
from .measure import Case, Way, require
from .networks import network
from .rivals import packed, unpacked


class Masks:
    """Two random masks of the network, as bool tensors, packed buffers and NumPy arrays of the same bytes."""

    def __init__(self, context: Context) -> None:
        device = context.device
        self.weights = [p.detach().clone() for n, p in network("resnet18", device).named_parameters() if p.dim() > 1]
        self.numels = [w.numel() for w in self.weights]
        self.count = sum(self.numels)
        generator = torch.Generator(device=device).manual_seed(5)
        self.a, self.b = (
            [torch.rand(w.shape, device=device, generator=generator) < 0.5 for w in self.weights] for _ in range(2)
        )
        self.bits_a, self.bits_b = ops.pack(self.a), ops.pack(self.b)
        self.bool_a, bool_b = (torch.cat([m.reshape(-1) for m in masks]).cpu().numpy() for masks in (self.a, self.b))
        self.bytes_a, self.bytes_b = (np.packbits(m, bitorder="little") for m in (self.bool_a, bool_b))


def _case(
    context: Context,
    name: str,
    op: str,
    masks: Masks,
    moved: int,
    ours: Callable[[], Any],
    rivals: Sequence[Way],
    gate: Callable[[], None],
) -> Case:
    backend = backends.chosen(op, context.device.type)
    numpy_too = [w for w in rivals if not (context.on_gpu and w.name.startswith("numpy"))]
    ways = [
        *numpy_too,
        copy_way(moved, context.device),
        Way("ours", lambda: ours, moved, graph=name != "Jaccard", backend=backend),
    ]
    others = [other for other in ("cuda", "triton") if context.on_gpu and other != backend]
    ways += [_way_by(other, ours, moved, graph=name != "Jaccard") for other in others]
    return Case(f"bits {name}", {"network": "resnet18", "weights": masks.count}, ways, gate)


def _way_by(backend: str, run: Callable[[], Any], moved: int, graph: bool) -> Way:
    """The same call by another backend than the rule picks, where that is there."""

    def make() -> Callable[[], Any]:
        def forced() -> Any:
            with dwm_fast.use_backend(backend):
                return run()

        return forced

    return Way(f"by the backend {backend}", make, moved, graph=graph)


def _way(name: str, run: Callable[[], Any]) -> Way:
    return Way(name, lambda: run)


def pack(context: Context) -> Case:
    """Bool masks -> one buffer."""
    m = Masks(context)

    def gate() -> None:
        parts = [np.packbits(x.reshape(-1).cpu().numpy(), bitorder="little") for x in m.a]
        bits = ops.pack(m.a).cpu().numpy()
        for part, start in zip(parts, ops.packed_offsets(m.numels)[:-1], strict=True):
            require(np.array_equal(bits[start : start + len(part)], part), "packed bits differ from numpy.packbits")

    rivals = [
        _way("eager", lambda: [packed(x) for x in m.a]),
        _way("numpy.packbits", lambda: np.packbits(m.bool_a, bitorder="little")),
    ]
    moved = m.count + m.count // 8
    return _case(context, "pack", "pack", m, moved, lambda: ops.pack(m.a), rivals, gate)


def unpack(context: Context) -> Case:
    """One buffer -> bool masks."""
    m = Masks(context)

    def gate() -> None:
        for x, y in zip(ops.unpack(m.bits_a, m.numels), m.a, strict=True):
            require(torch.equal(x, y.reshape(-1)), "unpacked masks differ from what was packed")

    starts = ops.packed_offsets(m.numels)
    parts = [(m.bits_a[i:j], x.shape) for i, j, x in zip(starts[:-1], starts[1:], m.a, strict=True)]
    rivals = [
        _way("eager", lambda: [unpacked(bits, shape) for bits, shape in parts]),
        _way("numpy.unpackbits", lambda: np.unpackbits(m.bytes_a, bitorder="little")),
    ]
    moved = m.count + m.count // 8
    return _case(context, "unpack", "unpack", m, moved, lambda: ops.unpack(m.bits_a, m.numels), rivals, gate)


def apply(context: Context) -> Case:
    """Weights where their bit is 1, else 0."""
    m = Masks(context)

    def gate() -> None:
        for x, w, keep in zip(ops.apply(m.bits_a, m.weights), m.weights, m.a, strict=True):
            require(torch.equal(x, torch.where(keep, w, torch.zeros_like(w))), "masked weights are wrong")

    rivals = [_way("eager with bool masks", lambda: [w * keep for w, keep in zip(m.weights, m.a, strict=True)])]
    moved = 8 * m.count + m.count // 8
    return _case(context, "apply", "apply", m, moved, lambda: ops.apply(m.bits_a, m.weights), rivals, gate)


def count(context: Context) -> Case:
    """Ones of each tensor."""
    m = Masks(context)

    def gate() -> None:
        expected = [int(x.sum()) for x in m.a]
        require(ops.count(m.bits_a, m.numels).tolist() == expected, "counts are wrong")

    rivals = [
        _way("eager with bool masks", lambda: [x.sum() for x in m.a]),
        _way("numpy, unpacked and summed", lambda: np.unpackbits(m.bytes_a).sum()),
        _way("numpy.bitwise_count on bytes", lambda: np.bitwise_count(m.bytes_a).sum()),
    ]
    return _case(context, "count", "count", m, m.count // 8, lambda: ops.count(m.bits_a, m.numels), rivals, gate)


def _numpy_unpacked(m: Masks, op: Callable[[Any, Any], Any]) -> Any:
    return np.packbits(op(np.unpackbits(m.bytes_a).view(bool), np.unpackbits(m.bytes_b).view(bool)))


def _set_case(context: Context, op: str, of_numpy: Any, of_torch: Callable[[Tensor, Tensor], Tensor]) -> Case:
    m = Masks(context)

    def gate() -> None:
        expected = ops.pack([of_torch(x, y) for x, y in zip(m.a, m.b, strict=True)])
        require(torch.equal(ops.combine(m.bits_a, m.bits_b, op), expected), f"'{op}' of two masks is wrong")

    rivals = [
        _way("eager with bool masks", lambda: [of_torch(x, y) for x, y in zip(m.a, m.b, strict=True)]),
        _way("numpy, unpacked and packed", lambda: _numpy_unpacked(m, of_numpy)),
        _way("numpy on bytes", lambda: of_numpy(m.bytes_a, m.bytes_b)),
    ]
    moved = 3 * m.count // 8
    return _case(context, op, "combine", m, moved, lambda: ops.combine(m.bits_a, m.bits_b, op), rivals, gate)


def set_and(context: Context) -> Case:
    """Intersection of two networks' masks."""
    return _set_case(context, "and", np.bitwise_and, torch.logical_and)


def set_or(context: Context) -> Case:
    """Union."""
    return _set_case(context, "or", np.bitwise_or, torch.logical_or)


def set_xor(context: Context) -> Case:
    """Symmetric difference."""
    return _set_case(context, "xor", np.bitwise_xor, torch.logical_xor)


def jaccard(context: Context) -> Case:
    """Jaccard index of two networks' masks, a Python float."""
    m = Masks(context)

    def of_numpy() -> float:
        a, b = np.unpackbits(m.bytes_a).view(bool), np.unpackbits(m.bytes_b).view(bool)
        return float((a & b).sum() / (a | b).sum())

    def of_bytes() -> float:
        both, either = m.bytes_a & m.bytes_b, m.bytes_a | m.bytes_b
        return float(np.bitwise_count(both).sum() / np.bitwise_count(either).sum())

    def gate() -> None:
        found = ops.jaccard(m.bits_a, m.bits_b, m.numels)
        require(abs(found - of_numpy()) < 1e-12, f"Jaccard index is {found}; expected {of_numpy()}")

    rivals = [_way("numpy, unpacked", of_numpy), _way("numpy.bitwise_count on bytes", of_bytes)]
    moved = 2 * m.count // 8
    return _case(
        context, "Jaccard", "overlap", m, moved, lambda: ops.jaccard(m.bits_a, m.bits_b, m.numels), rivals, gate
    )
