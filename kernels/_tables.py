"""Plans: tables in device memory that let one launch cover every tensor of a network.

A `Plan` holds what follows from shapes, strides and alignment: one row per tensor, its geometry, and a table block ->
(tensor, kind, chunk). It is built once per network structure, copied from pinned memory, and the stream is waited for
once, there, so that any stream may read it. Nothing is copied afterwards. Addresses are elsewhere: `_pointers`.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from dwm_fast.errors import InputError, Unsupported
from dwm_fast.kernels._launch import Launch
from dwm_fast.ops.coding import LOGITS
from dwm_fast.ops.packing import packed_offsets

FLAT: tl.constexpr = tl.constexpr(0)
TAPS: tl.constexpr = tl.constexpr(1)
STRIDED: tl.constexpr = tl.constexpr(2)

# Columns of a row: elements, noise layer, threshold (fp32 bits), first word in the network's bits, input channels,
# the first element of the tensor in each flat output, then its first program and how many it has.
NUMEL: tl.constexpr = tl.constexpr(0)
LAYER: tl.constexpr = tl.constexpr(1)
THRESHOLD: tl.constexpr = tl.constexpr(2)
WORD: tl.constexpr = tl.constexpr(3)
CHANNELS: tl.constexpr = tl.constexpr(4)
OUTPUT: tl.constexpr = tl.constexpr(5)
PROGRAM: tl.constexpr = tl.constexpr(7)
PROGRAMS: tl.constexpr = tl.constexpr(8)
COLUMNS: tl.constexpr = tl.constexpr(9)

MAX_RANK = 5
_OUTPUT_ALIGNMENT = 64
_PLANS = 512

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bool: tl.int1,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}

_Plan = TypeVar("_Plan")
_Place = tuple[tuple[int, ...], tuple[int, ...], int]
_SHAPE, _STRIDE, ADDRESS = operator.attrgetter("shape"), Tensor.stride, Tensor.data_ptr

empty = torch.empty
"""Every fresh buffer comes from here; tests fill it with NaN."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tables of one network structure on one device, and what the launcher needs to know about them.

    rows: int64 (tensors, COLUMNS). geometry: int64 (tensors, rank * (1 + roles)): sizes, then strides by role.
    blocks: int32 (num_blocks, 2): tensor * 4 + kind, chunk. output_numels: elements of each flat output, whose
    tensors have the shape, strides and first element `output_places[output][tensor]`.
    """

    rows: Tensor
    geometry: Tensor
    blocks: Tensor
    num_blocks: int
    rank: int
    taps: bool
    roles: int
    output_places: tuple[tuple[_Place, ...], ...]
    output_numels: tuple[int, ...]

    def constants(self, launch: Launch) -> dict[str, int | bool]:
        """Compile-time arguments and warps of a kernel that walks this plan."""
        return {
            "BLOCK": launch.block, "STRIDED_BLOCK": launch.strided, "GROUPS": launch.groups, "HAS_TAPS": self.taps,
            "RANK": self.rank, "num_warps": launch.num_warps,
        }  # fmt: skip

    def outputs(self, which: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A fresh flat buffer for output `which`, and its views, one per tensor."""
        flat = empty(self.output_numels[which], dtype=dtype, device=self.rows.device)
        view = flat.as_strided
        return flat, [view(shape, strides, first) for shape, strides, first in self.output_places[which]]


def first_words(numels: Sequence[int]) -> list[int]:
    """First word of each tensor in a network's bits, and the length of the whole as the last entry."""
    return [first // 4 for first in packed_offsets(numels)]


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current for a launch; nothing to do for CPU tensors under the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def groups_of(*lists: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors that share their dtypes: one launch each, hence one launch for an ordinary network."""
    if all(len({t.dtype for t in tensors}) == 1 for tensors in lists):
        return [list(range(len(lists[0])))]
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, tensors in enumerate(zip(*lists, strict=True)):
        groups.setdefault(tuple(t.dtype for t in tensors), []).append(i)
    return list(groups.values())


def pick(values: Sequence[object], indices: list[int]) -> list[Any]:
    return [values[i] for i in indices]


def require_fp32(logits: Sequence[Tensor]) -> None:
    require_logits(logits)
    if any(logit.dtype != torch.float32 for logit in logits):
        raise Unsupported  # formats of dwm_fast.ops.coding, which the reference decodes


def require_logits(logits: Sequence[Tensor]) -> None:
    """InputError unless they are in formats of dwm_fast.ops.coding."""
    for logit in logits:
        if logit.dtype not in LOGITS.values():
            raise InputError(
                f"the triton backend got logits of {logit.dtype}; expected torch.float32: convert them, or use the "
                f"backend 'reference'"
            )


# --- plans -------------------------------------------------------------------------------------------------------


_plans: collections.OrderedDict[tuple[object, ...], Any] = collections.OrderedDict()
_kept: dict[int, Any] = {}  # what captured graphs read: never freed
_lock = threading.Lock()


def forget(cache: collections.OrderedDict[tuple[object, ...], Any], size: int) -> None:
    """Drop the entries used longest ago."""
    while len(cache) > size:
        cache.popitem(last=False)


def plan(
    roles: Sequence[Sequence[Tensor]],
    launch: Launch,
    *,
    outputs: Sequence[int] = (),
    layers: Sequence[int] = (),
    thresholds: Sequence[float] = (),
    words: Sequence[int] = (),
    allow_taps: bool = True,
    device: torch.device | None = None,
) -> Plan:
    """The plan of a call, built at the first call with this structure and found again afterwards.

    Args:
        roles: lists of tensors of equal shapes, e.g. (logits, weights, grads).
        launch: tile sizes.
        outputs: for each flat output the role whose strides it takes (as torch.empty_like does).
        layers, thresholds, words: per tensor the noise layer, the threshold and the first word of its bits; zeros
            when left out.
        allow_taps: whether 3x3 channels_last tensors may take the tiled path.
        device: where the tables live; that of the first tensor by default. Roles of "meta" tensors need it.
    """
    device = device or roles[0][0].device
    tensors = [t for role in roles for t in role]
    shapes, strides = tuple(map(_SHAPE, roles[0])), tuple(map(_STRIDE, tensors))
    addresses = list(map(ADDRESS, tensors))
    loose = (
        tuple(i for i, a in enumerate(addresses) if a % 16) if functools.reduce(operator.or_, addresses) % 16 else ()
    )
    key = (device, launch, len(roles), tuple(outputs), tuple(layers), tuple(thresholds), tuple(words),
           allow_taps, shapes, strides, loose)  # fmt: skip
    return remembered(
        key, device, lambda: _build(roles, launch, outputs, layers, thresholds, words, allow_taps, loose, device)
    )


def remembered(key: tuple[object, ...], device: torch.device, build: Callable[[], _Plan]) -> _Plan:
    """What `build` made at the first call with this key; tables that a captured graph reads are kept for good."""
    with _lock:
        found = _plans.get(key)
        if found is None:
            if capturing(device):
                raise InputError(
                    "a CUDA graph is being captured and the tables of this network are not on the device yet; "
                    "run the step once before the capture, with the same shapes and options"
                )
            found = build()
            _plans[key] = found
            forget(_plans, _PLANS)
        elif capturing(device):
            _kept[id(found)] = found
        _plans.move_to_end(key)
    return found


def _build(
    roles: Sequence[Sequence[Tensor]], launch: Launch, outputs: Sequence[int], layers: Sequence[int],
    thresholds: Sequence[float], words: Sequence[int], allow_taps: bool, loose: tuple[int, ...],
    device: torch.device,
) -> Plan:  # fmt: skip
    count = len(roles[0])
    shapes = tuple(tuple(t.shape) for t in roles[0])
    output_strides = tuple(tuple(torch.empty_like(t, device="meta").stride() for t in roles[r]) for r in outputs)
    unaligned = {i % count for i in loose}
    rows, collapsed = [], []
    blocks: list[tuple[int, int]] = []
    output_offsets: list[list[int]] = [[] for _ in outputs]
    totals = [0] * len(outputs)
    for i, shape in enumerate(shapes):
        strides = [role[i].stride() for role in roles] + [out[i] for out in output_strides]
        numel = math.prod(shape)
        kind = STRIDED.value if i in unaligned else _kind(shape, strides, allow_taps)
        offsets = []
        for which, starts in enumerate(output_offsets):
            starts.append(totals[which])
            offsets.append(totals[which])
            totals[which] += -(-numel // _OUTPUT_ALIGNMENT) * _OUTPUT_ALIGNMENT
        threshold = struct.unpack("<i", struct.pack("<f", thresholds[i]))[0] if thresholds else 0
        row = [numel, layers[i] if layers else 0, threshold, words[i] if words else 0,
               shape[1] if kind == TAPS.value else 1, *offsets]  # fmt: skip
        own = _blocks(i, kind, numel, launch)
        rows.append(row + [0] * (PROGRAM.value - len(row)) + [len(blocks), len(own)])
        collapsed.append(_collapse(shape, strides))
        blocks += own
    rank = max([1, *(len(sizes) for sizes, _ in collapsed)])
    geometry = [_pad(sizes, strides, rank) for sizes, strides in collapsed]
    tables = to_device(rows, geometry, blocks, device)
    places = [tuple(zip(shapes, *own, strict=True)) for own in zip(output_strides, output_offsets, strict=True)]
    return Plan(
        *tables, len(blocks), rank if any(b[0] & 3 == STRIDED.value for b in blocks) else 0,
        any(b[0] & 3 == TAPS.value for b in blocks), len(roles) + len(outputs), tuple(places), tuple(totals),
    )  # fmt: skip


def _kind(shape: tuple[int, ...], strides: list[tuple[int, ...]], allow_taps: bool) -> int:
    """FLAT: logical order is memory order. TAPS: 3x3 channels_last. STRIDED: anything else."""
    if all(_follows(shape, s, range(len(shape))) for s in strides):
        return int(FLAT.value)
    taps = len(shape) == 4 and shape[2] * shape[3] == 9 and shape[1] % 4 == 0
    if allow_taps and taps and all(_follows(shape, s, (0, 2, 3, 1)) for s in strides):
        return int(TAPS.value)
    return int(STRIDED.value)


def _follows(shape: tuple[int, ...], strides: tuple[int, ...], order: Sequence[int]) -> bool:
    """Whether memory holds the dimensions densely, outermost first in `order` (strides of size 1 do not count)."""
    expected = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != expected:
            return False
        expected *= shape[d]
    return True


def _collapse(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides by role with neighbouring dimensions joined where every role allows it."""
    sizes: list[int] = []
    by_role: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(own[-1] == s[d] * size for own, s in zip(by_role, strides, strict=True)):
            sizes[-1] *= size
            for own, s in zip(by_role, strides, strict=True):
                own[-1] = s[d]
        else:
            sizes.append(size)
            for own, s in zip(by_role, strides, strict=True):
                own.append(s[d])
    if max(sizes[1:], default=0) >= 2**31 - 2**16:
        raise InputError(
            f"a weight of shape {tuple(shape)} is laid out with an inner dimension of {max(sizes[1:])}; the triton "
            f"backend expects less than {2**31 - 2**16}: make weight, logits and gradient contiguous"
        )
    if len(sizes) > MAX_RANK:
        raise InputError(
            f"a weight of shape {tuple(shape)} has {len(sizes)} dimensions that cannot be joined; the triton "
            f"backend expects at most {MAX_RANK}: make weight, logits and gradient contiguous"
        )
    return sizes, by_role


def _pad(sizes: list[int], strides: list[list[int]], rank: int) -> list[int]:
    lead = rank - len(sizes)
    return [1] * lead + sizes + list(itertools.chain(*([0] * lead + own for own in strides)))


def _blocks(tensor: int, kind: int, numel: int, launch: Launch) -> list[tuple[int, int]]:
    """Programs of one tensor; a FLAT tensor whose last four are not complete ends in STRIDED programs."""
    if kind == TAPS.value:
        return [(tensor * 4 + kind, chunk) for chunk in range(-(-numel // (36 * launch.groups)))]
    flat = 0 if kind == STRIDED.value else numel // launch.block if numel % 4 else -(-numel // launch.block)
    first = flat * launch.block // launch.strided
    return [(tensor * 4 + FLAT.value, chunk) for chunk in range(flat)] + [
        (tensor * 4 + STRIDED.value, chunk) for chunk in range(first, -(-numel // launch.strided))
    ]


def to_device(
    rows: list[list[int]], geometry: list[list[int]], blocks: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, geometry and blocks (int32) in device memory by one copy, waited for."""
    parts = [
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(geometry, dtype=torch.int64),
        torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2).view(torch.int64),
    ]
    host = torch.cat([part.reshape(-1) for part in parts])
    if device.type == "cuda":
        flat = host.pin_memory().to(device, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
    else:
        flat = host
    first, second, third = torch.split(flat, [part.numel() for part in parts])
    return first.view(parts[0].shape), second.view(parts[1].shape), third.view(torch.int32).view(-1, 2)
