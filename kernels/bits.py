"""pack, unpack, apply, count, combine, overlap in Triton: a network's bits in one launch each.

Every result is exact and the same at every run: sums are of integers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwm_fast.kernels import _tables
from dwm_fast.kernels._launch import launch_parameters
from dwm_fast.kernels._pointers import pointers
from dwm_fast.kernels._tables import COLUMNS, FLAT, TAPS, TL_DTYPES, WORD, groups_of, pick
from dwm_fast.kernels._tiles import (
    address,
    aligned,
    block_entry,
    flat_offsets,
    load_bits,
    load_taps_bits,
    loose,
    output_start,
    popcount,
    row_of,
    store_bits,
    store_taps_bits,
    strided_coordinates,
    strided_offsets,
    taps_offsets,
)
from dwm_fast.ops.packing import COMBINATIONS, packed_nbytes

AND: tl.constexpr = tl.constexpr(COMBINATIONS["and"])
OR: tl.constexpr = tl.constexpr(COMBINATIONS["or"])
XOR: tl.constexpr = tl.constexpr(COMBINATIONS["xor"])


@triton.jit
def keep_flag(value, mask_dtype: tl.constexpr):
    """value != 0, as bool or as int32 0 / 1.

    A bool is 0 or 1 already; comparing its bytes takes a detour over local memory. bfloat16 goes through fp32, since
    the interpreter compares its bits, in which -0 is not 0.
    """
    if mask_dtype == tl.int1:
        return value.to(tl.int32)
    elif mask_dtype == tl.bfloat16:
        return value.to(tl.float32) != 0
    else:
        return value != 0


@triton.jit
def pack_kernel(
    ptrs, rows, geometry, blocks, bits,
    mask_dtype: tl.constexpr, BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    HAS_TAPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, word = row_of(rows, tensor)
    masks = address(ptrs, tensor, 0, 1)
    READ: tl.constexpr = tl.int8 if mask_dtype == tl.int1 else mask_dtype  # bools are read as bytes
    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        keep = keep_flag(tl.load(aligned(masks, READ) + start + offsets, mask=mask, other=0), mask_dtype)
        store_bits(bits, word, numel, chunk, keep, BLOCK)
    if HAS_TAPS and kind == TAPS:
        _group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        taps = tl.zeros([GROUPS, 4], tl.int32)
        for tap in tl.static_range(9):
            keep = keep_flag(tl.load(aligned(masks, READ) + tap * stride + offsets, mask=mask, other=0), mask_dtype)
            taps |= keep.to(tl.int32) << tap
        store_taps_bits(bits, word, numel, chunk, taps, GROUPS)
    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 1)
        source = loose(masks, READ) + strided_offsets(geometry, tensor, places, 0, RANK, 1)
        keep = keep_flag(tl.load(source, mask=mask, other=0), mask_dtype)
        store_bits(bits, word, numel, chunk, keep, STRIDED_BLOCK)


@triton.jit
def unpack_kernel(
    rows, geometry, blocks, bits, out,
    BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr, HAS_TAPS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, word = row_of(rows, tensor)
    out += output_start(rows, tensor, 0)
    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        keep = load_bits(bits, word, numel, chunk, BLOCK)
        tl.store(out + start + offsets, keep.to(tl.int8), mask=mask)
    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 2)
        keep = load_bits(bits, word, numel, chunk, STRIDED_BLOCK)
        tl.store(out + strided_offsets(geometry, tensor, places, 1, RANK, 2), keep.to(tl.int8), mask=mask)


@triton.jit
def apply_kernel(
    ptrs, rows, geometry, blocks, bits, out,
    BLOCK: tl.constexpr, STRIDED_BLOCK: tl.constexpr, GROUPS: tl.constexpr, HAS_TAPS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    tensor, kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, word = row_of(rows, tensor)
    weights = address(ptrs, tensor, 0, 1)
    out += output_start(rows, tensor, 0)
    if kind == FLAT:
        start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
        keep = load_bits(bits, word, numel, chunk, BLOCK) != 0
        w = tl.load(aligned(weights, out.dtype.element_ty) + start + offsets, mask=mask, other=0)
        tl.store(out + start + offsets, tl.where(keep, w, 0).to(out.dtype.element_ty), mask=mask)
    if HAS_TAPS and kind == TAPS:
        _group, offsets, mask, stride = taps_offsets(rows, tensor, numel, chunk, GROUPS)
        taps = load_taps_bits(bits, word, numel, chunk, GROUPS)
        for tap in tl.static_range(9):
            keep = ((taps >> tap) & 1) != 0
            w = tl.load(aligned(weights, out.dtype.element_ty) + tap * stride + offsets, mask=mask, other=0)
            value = tl.where(keep, w, 0).to(out.dtype.element_ty)
            tl.store(out + tap * stride + offsets, value, mask=mask)
    if RANK > 0 and kind > TAPS:
        places, mask = strided_coordinates(geometry, tensor, numel, chunk, STRIDED_BLOCK, RANK, 2)
        keep = load_bits(bits, word, numel, chunk, STRIDED_BLOCK) != 0
        source = loose(weights, out.dtype.element_ty) + strided_offsets(geometry, tensor, places, 0, RANK, 2)
        w = tl.load(source, mask=mask, other=0)
        value = tl.where(keep, w, 0).to(out.dtype.element_ty)
        tl.store(out + strided_offsets(geometry, tensor, places, 1, RANK, 2), value, mask=mask)


@triton.jit
def count_kernel(rows, blocks, a, b, out, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    """Tensors are counted in words here. PAIR: ones of a & b and of a | b; else ones of a."""
    tensor, _kind, chunk = block_entry(blocks)
    numel, _layer, _threshold, _word = row_of(rows, tensor)
    start, offsets, mask = flat_offsets(numel, chunk, BLOCK)
    word = tl.multiple_of(tl.load(rows + tensor * COLUMNS + WORD), 4)  # marked where it is read: see `aligned`
    x = tl.load(a + word + start + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if PAIR:
        y = tl.load(b + word + start + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
        tl.atomic_add(out + 2 * tensor, tl.sum(popcount(x & y)).to(tl.int64))
        tl.atomic_add(out + 2 * tensor + 1, tl.sum(popcount(x | y)).to(tl.int64))
    else:
        tl.atomic_add(out + tensor, tl.sum(popcount(x)).to(tl.int64))


@triton.jit
def combine_kernel(a, b, out, numel, OP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a + index, mask=index < numel, other=0)
    y = tl.load(b + index, mask=index < numel, other=0)
    if OP == AND:
        z = x & y
    elif OP == OR:
        z = x | y
    elif OP == XOR:
        z = x ^ y
    else:
        z = x ^ (x & y)  # x & ~y: Triton 3.8's interpreter refuses ~ on unsigned words under NumPy 2.4
    tl.store(out + index, z, mask=index < numel)


def pack(masks: Sequence[Tensor]) -> Tensor:
    """Masks (any shapes, dtypes and strides; nonzero = keep) -> one network buffer."""
    if not masks:
        return torch.empty(0, dtype=torch.uint8)
    device, launch = masks[0].device, launch_parameters("bits")
    words = _tables.first_words([m.numel() for m in masks])
    bits = _tables.empty(4 * words[-1], dtype=torch.uint8, device=device)
    with _tables.device_guard(device):
        for indices in groups_of(masks):
            roles = [pick(masks, indices)]
            plan = _tables.plan(roles, launch, words=pick(words, indices))
            if plan.num_blocks:
                pack_kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.geometry, plan.blocks, bits.view(torch.int32),
                    mask_dtype=TL_DTYPES[roles[0][0].dtype], **plan.constants(launch),
                )  # fmt: skip
    return bits


def _flat_roles(numels: Sequence[int]) -> list[list[Tensor]]:
    """Shapes of 1-D tensors without memory, for plans that follow sizes alone."""
    return [[torch.empty(int(n), device="meta") for n in numels]]


def unpack(bits: Tensor, numels: Sequence[int]) -> list[Tensor]:
    """Network buffer -> one flat bool tensor per size."""
    if not numels:
        return []
    launch, words = launch_parameters("bits"), _tables.first_words(numels)
    with _tables.device_guard(bits.device):
        plan = _tables.plan(_flat_roles(numels), launch, outputs=(0,), words=words[:-1], device=bits.device)
        flat, views = plan.outputs(0, torch.bool)
        if plan.num_blocks:
            unpack_kernel[(plan.num_blocks,)](
                plan.rows, plan.geometry, plan.blocks, bits.contiguous().view(torch.int32), flat.view(torch.int8),
                **plan.constants(launch),
            )  # fmt: skip
    return views


def apply(bits: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Each weight where its bit is 1, else +0; strides and dtype kept."""
    launch, words = launch_parameters("bits"), _tables.first_words([w.numel() for w in weights])
    results = list(weights)
    with _tables.device_guard(bits.device):
        for indices in groups_of(weights):
            roles = [pick(weights, indices)]
            plan = _tables.plan(roles, launch, outputs=(0,), words=pick(words, indices))
            flat, views = plan.outputs(0, roles[0][0].dtype)
            for i, view in zip(indices, views, strict=True):
                results[i] = view
            if plan.num_blocks:
                apply_kernel[(plan.num_blocks,)](
                    pointers(roles), plan.rows, plan.geometry, plan.blocks,
                    bits.contiguous().view(torch.int32), flat, **plan.constants(launch),
                )  # fmt: skip
    return results


def _count(a: Tensor, b: Tensor, numels: Sequence[int], pair: bool) -> Tensor:
    words = _tables.first_words(numels)
    out = torch.zeros((len(numels), 2) if pair else (len(numels),), dtype=torch.int64, device=a.device)
    if not words[-1]:
        return out
    launch = launch_parameters("bits")
    with _tables.device_guard(a.device):
        sizes = [packed_nbytes(n) // 4 for n in numels]
        plan = _tables.plan(_flat_roles(sizes), launch, words=words[:-1], device=a.device)
        count_kernel[(plan.num_blocks,)](
            plan.rows, plan.blocks, a.contiguous().view(torch.int32), b.contiguous().view(torch.int32), out,
            PAIR=pair, BLOCK=launch.block, num_warps=launch.num_warps,
        )  # fmt: skip
    return out


def count(bits: Tensor, numels: Sequence[int]) -> Tensor:
    """Ones of each tensor, int64 (tensors,)."""
    return _count(bits, bits, numels, False)


def overlap(a: Tensor, b: Tensor, numels: Sequence[int]) -> Tensor:
    """Sizes of intersection and union of each tensor's bits, int64 (tensors, 2)."""
    return _count(a, b, numels, True)


def combine(a: Tensor, b: Tensor, op: str) -> Tensor:
    """Byte-wise "and", "or", "xor" or "andnot" (a and not b) of two buffers of equal length."""
    out = _tables.empty(a.numel(), dtype=torch.uint8, device=a.device)
    if a.numel():
        launch = launch_parameters("bits")
        with _tables.device_guard(a.device):
            combine_kernel[(triton.cdiv(a.numel(), launch.block),)](
                a.contiguous(), b.contiguous(), out, a.numel(), OP=COMBINATIONS[op], BLOCK=launch.block,
                num_warps=launch.num_warps,
            )  # fmt: skip
    return out
