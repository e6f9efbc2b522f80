"""Pointer tables: the addresses of a call's tensors in device memory, without copies from the host.

Autograd may give a gradient another address at every step. A table once written is never written again; tables are
found by the addresses that they hold. A new one is filled by a kernel that takes addresses as launch arguments (128 a
launch), so no host memory has to outlive the call. During the capture of a CUDA graph a known table is kept for good
and used as it is; an unknown one is allocated and filled inside the graph, from the graph's own memory, so that every
replay fills it again.
"""

import collections
import dataclasses
import itertools
import threading
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._tables import capturing, forget
from dwm_fast.ops.devices import check_all_devices

POINTERS_PER_LAUNCH = 128
_CACHED = 256


@dataclasses.dataclass
class _Entry:
    table: Tensor
    event: torch.cuda.Event | None = None
    streams: set[int] = dataclasses.field(default_factory=set)


_entries: collections.OrderedDict[tuple[object, ...], _Entry] = collections.OrderedDict()
_kept: dict[int, object] = {}  # what captured graphs read: never freed
_lock = threading.Lock()


@triton.jit
def write_pointers_kernel(table, values, N: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(table + i, values[i] >> 4)


def pointers(roles: Sequence[Sequence[Tensor]]) -> Tensor:
    """int64 table (tensors, roles) of addresses in device memory, valid on the current stream."""
    device = roles[0][0].device
    values = tuple(map(_tables.ADDRESS, itertools.chain.from_iterable(zip(*roles, strict=True))))
    key = (device, values)
    with _lock:
        entry = _entries.get(key)
        if capturing(device):
            if entry is None:
                return _new(roles, values, device)
            _kept[id(entry)] = entry
            return entry.table
        if entry is None:
            entry = _Entry(_new(roles, values, device))
            _entries[key] = entry
            forget(_entries, _CACHED)
        if device.type == "cuda":
            _make_ready(entry, torch.cuda.current_stream(device))
        _entries.move_to_end(key)
        return entry.table


def _make_ready(entry: _Entry, stream: torch.cuda.Stream) -> None:
    """Let `stream` read a table that it, or another stream before it, has written."""
    if entry.event is None:
        entry.event = stream.record_event()
    elif stream.cuda_stream not in entry.streams:
        stream.wait_event(entry.event)
        entry.table.record_stream(stream)
    entry.streams.add(stream.cuda_stream)


def _new(roles: Sequence[Sequence[Tensor]], values: tuple[int, ...], device: torch.device) -> Tensor:
    check_all_devices("the triton backend", roles, device)
    return _write(values, device) if device.type == "cuda" else torch.tensor(values, dtype=torch.int64)


def _write(values: tuple[int, ...], device: torch.device) -> Tensor:
    size = -(-len(values) // POINTERS_PER_LAUNCH) * POINTERS_PER_LAUNCH
    table = _tables.empty(size, dtype=torch.int64, device=device)
    # Triton compiles anew for arguments that are 1, below 2**31 or multiples of 16; so that every address is of one
    # sort they are passed times 16 plus 8. An empty tensor's address is 0, too small; nobody reads its entry.
    filled = tuple((value or table.data_ptr()) << 4 | 8 for value in values)
    for first in range(0, size, POINTERS_PER_LAUNCH):
        part = filled[first : first + POINTERS_PER_LAUNCH]
        part += filled[:1] * (POINTERS_PER_LAUNCH - len(part))
        write_pointers_kernel[(1,)](table[first:], part, N=POINTERS_PER_LAUNCH, num_warps=1)
    return table
