"""Plans for masks of one number a kernel: a weight as (out, in) kernels of taps, walked in the order of the kernels.

A program handles BLOCK kernels of one tensor, as rows of four, and loops over their taps. A lane's address is
output * stride + input * stride + tap * stride, which holds for contiguous weights, channels_last ones and any other
whose window has one stride; windows with two are copied first.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import Launch

# Columns of a row: kernels, noise layer, input channels, taps, first program, programs, first element of the tensor in
# the flat output of weights and in that of kernels, then three strides (output, input, tap) by role.
KERNELS: tl.constexpr = tl.constexpr(0)
NOISE_LAYER: tl.constexpr = tl.constexpr(1)
INPUTS: tl.constexpr = tl.constexpr(2)
WINDOW: tl.constexpr = tl.constexpr(3)
FIRST: tl.constexpr = tl.constexpr(4)
COUNT: tl.constexpr = tl.constexpr(5)
WEIGHT_START: tl.constexpr = tl.constexpr(6)
KERNEL_START: tl.constexpr = tl.constexpr(7)
STRIDES: tl.constexpr = tl.constexpr(8)
FILTER_COLUMNS: tl.constexpr = tl.constexpr(17)
_ROLES = 3


@dataclasses.dataclass(frozen=True)
class FilterPlan:
    """Tables of one structure: rows int64 (tensors, FILTER_COLUMNS), blocks int32 (num_blocks, 2), the outputs' places.

    A flat output of weights has the weights' strides (as torch.empty_like gives); one of kernels is dense.
    """

    rows: Tensor
    blocks: Tensor
    num_blocks: int
    weight_places: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    kernel_starts: tuple[int, ...]
    weight_numel: int
    kernel_numel: int

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A fresh flat buffer of weights and its views, one per tensor."""
        flat = _tables.empty(self.weight_numel, dtype=dtype, device=self.rows.device)
        return flat, [flat.as_strided(*place) for place in self.weight_places]

    def kernels(self, reals: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A fresh flat fp32 buffer of one number a kernel and its views, shaped like `reals`."""
        flat = _tables.empty(self.kernel_numel, dtype=torch.float32, device=self.rows.device)
        starts = zip(self.kernel_starts, reals, strict=True)
        return flat, [flat[start : start + r.numel()].view(r.shape) for start, r in starts]


def window_stride(tensor: Tensor) -> int | None:
    """Stride from tap to tap of a weight (out, in, ...), 0 for a window of one; None where there is no single one."""
    sizes = [(n, s) for n, s in zip(tensor.shape[2:], tensor.stride()[2:], strict=True) if n != 1]
    for (_, outer), (n, inner) in itertools.pairwise(sizes):
        if outer != n * inner:
            return None
    return sizes[-1][1] if sizes else 0


def with_one_stride(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those whose window has two strides copied."""
    return [t if window_stride(t) is not None else t.contiguous() for t in tensors]


def filter_plan(roles: Sequence[Sequence[Tensor]], layers: Sequence[int], launch: Launch) -> FilterPlan:
    """The plan of a call; roles are lists of weights and of tensors shaped like them, with one stride a window."""
    device = roles[0][0].device
    key = ("filters", device, launch, tuple(layers), tuple((t.shape, t.stride()) for role in roles for t in role))
    return _tables.remembered(key, device, lambda: _build(roles, layers, launch, device))


def _build(
    roles: Sequence[Sequence[Tensor]], layers: Sequence[int], launch: Launch, device: torch.device
) -> FilterPlan:
    rows, places, starts = [], [], []
    blocks: list[tuple[int, int]] = []
    weights = kernels = 0
    for i, weight in enumerate(roles[0]):
        count, taps = math.prod(weight.shape[:2]), math.prod(weight.shape[2:])
        like = torch.empty_like(weight, device="meta")
        strides: list[int] = []
        for tensor in [*(role[i] for role in roles), like]:
            tap = window_stride(tensor)
            if tap is None:
                raise InputError(
                    f"a weight of shape {tuple(weight.shape)} and strides {weight.stride()} has no single stride over "
                    "its window; the triton backend expects one: make it contiguous"
                )
            strides += [*tensor.stride()[:2], tap]
        strides += [0] * (3 * _ROLES - len(strides))
        programs = -(-count // launch.block) if taps else 0
        rows.append([count, layers[i], weight.shape[1], taps, len(blocks), programs, weights, kernels, *strides])
        blocks += [(4 * i, chunk) for chunk in range(programs)]
        places.append((tuple(weight.shape), tuple(like.stride()), weights))
        starts.append(kernels)
        weights += -(-count * taps // 64) * 64
        kernels += -(-count // 64) * 64
    table, _, walk = _tables.to_device(rows, [], blocks, device)
    return FilterPlan(table, walk, len(blocks), tuple(places), tuple(starts), weights, kernels)


@triton.jit
def filter_lanes(rows, tensor, chunk, BLOCK: tl.constexpr):
    """Kernel numbers (int64) [BLOCK / 4, 4] of a chunk, their mask, output and input channel (int64)."""
    row = rows + tensor * FILTER_COLUMNS
    inputs = tl.load(row + INPUTS)
    lane = 4 * tl.arange(0, BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :]
    start = chunk * BLOCK
    mask = lane < tl.minimum(tl.load(row + KERNELS) - start, BLOCK).to(tl.int32)
    first_output = start // inputs
    within = (start - first_output * inputs).to(tl.int32) + lane
    carry = within // inputs.to(tl.int32)
    return start + lane, mask, first_output + carry, (within - carry * inputs.to(tl.int32)).to(tl.int64)


@triton.jit
def filter_offsets(rows, tensor, output, input, role: tl.constexpr):
    """Offsets (int64) of tap 0 of those kernels in the memory of a role, and the stride from tap to tap."""
    strides = rows + tensor * FILTER_COLUMNS + STRIDES + 3 * role
    return output * tl.load(strides) + input * tl.load(strides + 1), tl.load(strides + 2)
