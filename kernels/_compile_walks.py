"""The kernels that walk a network, as the compile gate compiles them: types, dtypes, layouts, and what is meant."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from dwm_fast.kernels import _pointers, bits, coded_adam, kernel_soft, patterns, sample, soft_mask, update
from dwm_fast.kernels._configuration import Configuration
from dwm_fast.kernels._launch import Launch, launch_parameters
from dwm_fast.kernels._tables import TL_DTYPES
from dwm_fast.ops import coding
from dwm_fast.ops.draw import SCALED_SOFT, Mode
from dwm_fast.ops.packing import COMBINATIONS

_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
_MODES = {mode.value: mode.name.lower().removeprefix("gumbel_") for mode in Mode} | {SCALED_SOFT: "scaled"}


_Layout = tuple[str, bool, int]


def _walk(launch: Launch, taps: bool, rank: int) -> dict[str, Any]:
    return {"BLOCK": launch.block, "STRIDED_BLOCK": launch.strided, "GROUPS": launch.groups, "HAS_TAPS": taps,
            "RANK": rank}  # fmt: skip


def _meant(
    launch: Launch, layout: _Layout, reads: int, writes: int = 0, *, rolled: bool = False, strided_barriers: int = 0
) -> dict[str, Any]:
    """What a kernel has to come out as that reads and writes so many tensors of fp32, four elements an access.

    rolled: its nine taps are a loop. strided_barriers: of its STRIDED path, where a row's noise goes to four threads;
    nothing else of it goes through shared memory.
    """
    _, taps, rank = layout
    threads = 32 * launch.num_warps
    rows = launch.block // 4 // threads + (1 if rolled else 9) * taps * (launch.groups // threads)
    return {"loads": (128, reads * rows), "stores": (128, writes * rows), "barriers": strided_barriers if rank else 0}


def _short(dtype: torch.dtype) -> str:
    return _POINTER[dtype].removeprefix("*")


_TABLES = ("*i64", "*i64", "*i64", "*i32")
_LAYOUTS = (("flat", False, 0), ("taps+strided", True, 3), ("flat+strided5", False, 5), ("taps", True, 0))
_BARRIERS = 6
"""At most so many in the STRIDED path of a kernel that draws noise."""


_CODED = (("bf16", _LAYOUTS[0]), ("fixed16", _LAYOUTS[1]), ("fixed16", _LAYOUTS[2]))
"""Formats of logits beside fp32, and the layouts that they are compiled with."""


def _sample() -> Iterator[Configuration]:
    launch = launch_parameters("sample")
    for mode, weight, out, which in _sample_cases():
        layout, taps, rank = which
        fp32 = torch.float32
        meant = _meant(launch, which, 1 + (weight == fp32), int(out == fp32)) | {"barriers": None}
        yield Configuration(
            f"sample {_MODES[mode]} {_short(weight)}->{_short(out)} {layout}",
            sample.sample_fwd_kernel,
            (*_TABLES, _POINTER[out], "*i32", "*fp32", "*i64", "*fp32", "i32"),
            {"LOGIT": tl.float32, "WEIGHT": TL_DTYPES[weight], "MODE": mode, "PACK": True, **_walk(launch, taps, rank)},
            launch.num_warps,
            **meant,
        )
    for name, which in _CODED:
        layout, taps, rank = which
        yield Configuration(
            f"sample hard {name} logits, fp32->fp32 {layout}", sample.sample_fwd_kernel,
            (*_TABLES, "*fp32", "*i32", "*fp32", "*i64", "*fp32", "i32"),
            {"LOGIT": TL_DTYPES[coding.LOGITS[name]], "WEIGHT": tl.float32, "MODE": 0, "PACK": True,
             **_walk(launch, taps, rank)},
            launch.num_warps, **(_meant(launch, which, 1, 1) | {"barriers": None}),
        )  # fmt: skip
    yield Configuration("penalty", sample.penalty_fwd_kernel, ("*fp32", "*fp32", "i32", "i32"), {"BLOCK": 1024}, 4)


def _sample_cases() -> Iterator[tuple[int, torch.dtype, torch.dtype, _Layout]]:
    """Every mode with the paths of a convolutional network; every dtype and every set of paths with the hard mode."""
    for mode in _MODES:
        yield mode, torch.float32, torch.bfloat16, _LAYOUTS[1]
    yield 0, torch.float32, torch.float32, _LAYOUTS[1]
    yield 0, torch.float32, torch.float32, _LAYOUTS[0]
    yield 0, torch.bfloat16, torch.bfloat16, _LAYOUTS[2]
    yield 0, torch.float16, torch.float16, _LAYOUTS[0]
    yield 0, torch.float32, torch.float32, _LAYOUTS[3]


def _mask_reads(mode: int, weight: torch.dtype) -> int:
    """Of logits and weight, how many fp32 ones the chain rule of a mode reads; the others are dead code."""
    return (mode in (-1, 0, 1, 5)) + (weight == torch.float32 and mode in (-1, 0, 1, 3, 4))


def _sample_backward() -> Iterator[Configuration]:
    launch = launch_parameters("sample_backward")
    for mode, weight, grad, layout in _sample_cases():
        name, taps, rank = layout
        reads = _mask_reads(mode, weight) + (grad == torch.float32 and mode != 2)
        meant = _meant(launch, layout, reads, 1, strided_barriers=_BARRIERS)
        for need_weights in (False, True) if weight != grad and mode in (-1, 0, 1, 5) else (False,):
            yield Configuration(
                f"sample_backward {_MODES[mode]} {_short(weight)},{_short(grad)} {name}"
                + (" +weights" if need_weights else ""),
                sample.sample_bwd_kernel,
                (*_TABLES, "*fp32", _POINTER[weight] if need_weights else "*i64", "*fp32", "*i64", "*fp32", "i32",
                 "i32"),
                {"LOGIT": tl.float32, "WEIGHT": TL_DTYPES[weight], "GRAD": TL_DTYPES[grad], "MODE": mode,
                 "NEED_LOGITS": True, "NEED_WEIGHTS": need_weights, **_walk(launch, taps, rank)}, launch.num_warps,
                **meant,
            )  # fmt: skip
    for logits, layout in _CODED:
        name, taps, rank = layout
        yield Configuration(
            f"sample_backward hard {logits} logits, fp32,fp32 {name}", sample.sample_bwd_kernel,
            (*_TABLES, "*fp32", "*i64", "*fp32", "*i64", "*fp32", "i32", "i32"),
            {"LOGIT": TL_DTYPES[coding.LOGITS[logits]], "WEIGHT": tl.float32, "GRAD": tl.float32, "MODE": 0,
             "NEED_LOGITS": True, "NEED_WEIGHTS": False, **_walk(launch, taps, rank)}, launch.num_warps,
            **_meant(launch, layout, 2, 1, strided_barriers=_BARRIERS),
        )  # fmt: skip


def _bits() -> Iterator[Configuration]:
    launch = launch_parameters("bits")
    warps = launch.num_warps
    types: tuple[str, ...]
    for which in _LAYOUTS[:3]:
        layout, taps, rank = which
        walk = _walk(launch, taps, rank)
        masks = _meant(launch, which, 1)["loads"][1]
        for mask in (torch.bool, torch.float32) if taps else (torch.bool,):
            yield Configuration(
                f"pack {str(mask)[6:]} {layout}",
                bits.pack_kernel,
                (*_TABLES, "*i32"),
                {"mask_dtype": TL_DTYPES[mask], **walk},
                warps,
                loads=(32 if mask == torch.bool else 128, masks),
            )
        for dtype in (torch.bfloat16, torch.float32) if taps else (torch.float32,):
            types = (*_TABLES, "*i32", _POINTER[dtype])
            wide = int(dtype == torch.float32)
            meant = _meant(launch, which, wide, wide) | ({} if which == _LAYOUTS[0] else {"barriers": None})
            yield Configuration(f"apply {_short(dtype)} {layout}", bits.apply_kernel, types, walk, warps, **meant)
    types = ("*i64", "*i64", "*i32", "*i32", "*i8")
    yield Configuration("unpack", bits.unpack_kernel, types, _walk(launch, False, 1), warps)
    for pair in (False, True):
        yield Configuration(
            "overlap" if pair else "count", bits.count_kernel, ("*i64", "*i32", "*i32", "*i32", "*i64"),
            {"PAIR": pair, "BLOCK": launch.block}, warps, loads=(128, (1 + pair) * launch.block // 4 // (32 * warps)),
        )  # fmt: skip
    for name, op in COMBINATIONS.items():
        types = ("*u8", "*u8", "*u8", "i32")
        yield Configuration(
            f"combine {name}", bits.combine_kernel, types, {"OP": op, "BLOCK": launch.block}, warps, ("numel",),
            loads=(128, 4), stores=(128, 2), barriers=0,
        )  # fmt: skip


def _frozen() -> Iterator[Configuration]:
    """Both algorithms with every path; bits or none, dense and compact state, each dtype once."""
    launch = launch_parameters("update")
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    cases = [(fp32, _LAYOUTS[0], True, False), (fp32, _LAYOUTS[1], True, False), (fp32, _LAYOUTS[1], False, False)]
    cases += [(bf16, _LAYOUTS[2], True, False), (fp32, _LAYOUTS[2], True, True), (fp64, _LAYOUTS[1], True, False)]
    for adam in (True, False):
        for dtype, which, has_bits, compact in cases:
            layout, taps, rank = which
            tensors = 4 if adam else 3
            # fp32 alone fills 16 bytes with four lanes: state, and of bf16 networks nothing else
            wide = tensors if dtype == fp32 else tensors - 2
            meant = {} if compact or dtype == fp64 else _meant(launch, which, wide, min(wide, tensors - 1), rolled=True)
            state = torch.promote_types(dtype, torch.float32)
            yield Configuration(
                f"{'frozen_adamw' if adam else 'frozen_sgd'} {_short(dtype)} {layout}"
                + (" bits" if has_bits else "") + (" compact" if compact else ""),
                update.frozen_kernel,
                (*_TABLES, "*i32", "*i64", "*fp32", "*fp64", ("fp32",) * (12 if adam else 9)),
                {"WEIGHT": TL_DTYPES[dtype], "GRAD": TL_DTYPES[dtype], "STATE": TL_DTYPES[state],
                 "HAS_BITS": has_bits, "COMPACT": compact, "ADAM": adam, "MOMENTUM": not adam, "NESTEROV": not adam,
                 "DECAY": True, "DECOUPLED": adam, "MAXIMIZE": False, **_walk(launch, taps, rank)}, launch.num_warps,
                **meant,
            )  # fmt: skip


def _mask_adam() -> Iterator[Configuration]:
    launch = launch_parameters("update")
    for mode, weight, grad, which in _sample_cases():
        layout, taps, rank = which
        reads = 3 + _mask_reads(mode, weight) - (mode in (-1, 0, 1, 5)) + (grad == torch.float32 and mode != 2)
        meant = _meant(launch, which, reads, 3, strided_barriers=_BARRIERS)
        yield Configuration(
            f"mask_adam {_MODES[mode]} {_short(weight)},{_short(grad)} {layout}", update.mask_adam_kernel,
            (*_TABLES, "*i64", "*fp32", "*fp32", "*fp32", "*fp64", ("fp32",) * 12, "i32"),
            {"WEIGHT": TL_DTYPES[weight], "GRAD": TL_DTYPES[grad], "MODE": mode, "DECAY": True, "DECOUPLED": True,
             **_walk(launch, taps, rank)}, launch.num_warps, **meant,
        )  # fmt: skip


def _coded_adam() -> Iterator[Configuration]:
    """Each format of logits and of moments once with ragged ends, and the smallest alone as whole fours."""
    launch = launch_parameters("update")
    rows = launch.block // 4 // (32 * launch.num_warps)
    cases = [("fp32", "fp32", True), ("fp32", "8bit", True), ("bf16", "bf16", True), ("fixed16", "8bit", True)]
    for logits, moments, ragged in (*cases, ("fixed16", "8bit", False)):
        logit, (first, second) = coding.LOGITS[logits], coding.MOMENTS[moments]
        wide = 1 + (logits == "fp32") + 2 * (moments == "fp32")
        yield Configuration(
            f"coded_adam {logits} {moments} flat{'+ragged' if ragged else ''}", coded_adam.coded_adam_kernel,
            ("*i64", "*i64", "*i32", "*i64", "*fp32", "*fp64", ("fp32",) * 12),
            {"LOGIT": TL_DTYPES[logit], "FIRST": TL_DTYPES[first], "SECOND": TL_DTYPES[second],
             "ROLES": 6 if moments == "8bit" else 4, "DECAY": True, "DECOUPLED": True, "BLOCK": launch.block,
             "STRIDED_BLOCK": launch.strided, "STRIDED": ragged}, launch.num_warps,
            loads=(128, wide * rows), stores=(128, (wide - 1) * rows),
            barriers=0 if moments == "fp32" else None if ragged else 1,
        )  # fmt: skip


def _patterns() -> Iterator[Configuration]:
    """2:4 and 4:8 in every mode, and as many patterns as are unrolled, of no fours; fp32 weights by 16 bytes."""
    launch = launch_parameters("patterns")
    tables = ("*i64", "*i64", "*i32")
    for n, m, mode in ((2, 4, 0), (2, 4, 1), (2, 4, 2), (3, 6, 1)):
        shape = {"P": math.comb(m, n), "M": m, "TABLE": patterns.table(n, m), "GROUPS": launch.strided}
        fours = m // 4 if m % 4 == 0 else 0
        yield Configuration(
            f"pattern_mask {n}:{m} {_MODES[mode]} fp32->fp32", patterns.pattern_fwd_kernel,
            (*tables, "*fp32", "*i64", "*fp32", "i32"), {"WEIGHT": tl.float32, "MODE": mode, **shape},
            launch.num_warps, loads=(128, fours), stores=(128, fours), barriers=0,
        )  # fmt: skip
        if mode == 1:
            yield Configuration(
                f"pattern_mask_backward {n}:{m} fp32,fp32", patterns.pattern_bwd_kernel,
                (*tables, "*fp32", "*i64", "*fp32", "i32"), {"WEIGHT": tl.float32, "GRAD": tl.float32, **shape},
                launch.num_warps, loads=(128, 2 * fours), barriers=0,
            )  # fmt: skip
    shape = {"P": 70, "M": 8, "GROUPS": launch.strided}
    for mode in (0, 1, 2):
        yield Configuration(
            f"pattern_mask 4:8 {_MODES[mode]} fp32->fp32", patterns.many_patterns_fwd_kernel,
            (*tables, "*fp32", "*fp32", "*i64", "*fp32", "i32"), {"WEIGHT": tl.float32, "MODE": mode, **shape},
            launch.num_warps, loads=(128, 2), stores=(128, 2),
        )  # fmt: skip
    yield Configuration(
        "pattern_mask_backward 4:8 fp32,fp32", patterns.many_patterns_bwd_kernel,
        (*tables, "*fp32", "*fp32", "*i64", "*fp32", "i32"), {"WEIGHT": tl.float32, "GRAD": tl.float32, **shape},
        launch.num_warps, loads=(128, 4),
    )  # fmt: skip


def _kernel_soft() -> Iterator[Configuration]:
    launch = launch_parameters("kernel_soft")
    fp32, bf16 = torch.float32, torch.bfloat16
    block, warps = {"BLOCK": launch.block}, launch.num_warps
    tables, scalars = ("*i64", "*i64", "*i32"), ("*i64", "fp32", "i32")
    for noisy in (False, True):
        name, noise = " noisy" if noisy else "", {"NOISY": noisy, **block}
        yield Configuration(
            f"kernel_range{name}", kernel_soft.kernel_range_fwd_kernel, (*tables, "*fp32", *scalars), noise, warps
        )
        for weight, other in ((fp32, bf16), (fp32, fp32), (bf16, bf16)):
            yield Configuration(
                f"kernel_soft {_short(weight)}->{_short(other)}{name}",
                kernel_soft.kernel_soft_fwd_kernel,
                (*tables, "*fp32", _POINTER[other], *scalars),
                {"WEIGHT": TL_DTYPES[weight], "SPAN": 512, **noise},
                warps,
            )
            yield Configuration(
                f"kernel_soft_backward {_short(weight)},{_short(other)}{name}",
                kernel_soft.kernel_soft_bwd_kernel,
                (*tables, "*fp32", *scalars),
                {"WEIGHT": TL_DTYPES[weight], "GRAD": TL_DTYPES[other], **noise},
                warps,
            )


def _soft_mask() -> Iterator[Configuration]:
    update, launch = launch_parameters("update"), launch_parameters("importance")
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    for dtype, which in zip((fp32, bf16, fp64), (_LAYOUTS[1], _LAYOUTS[2], _LAYOUTS[0]), strict=True):
        layout, taps, rank = which
        pieces = {fp32: 1, bf16: 0, fp64: 2}[dtype]
        # a row of four is two accesses of fp64 and one of a gamma: they meet in shared memory
        meant = _meant(update, which, 1 + 2 * pieces, pieces) | ({"barriers": None} if dtype == fp64 else {})
        wide = TL_DTYPES[torch.promote_types(dtype, fp32)]
        yield Configuration(
            f"soft_masked_sgd {_short(dtype)} {layout}",
            soft_mask.soft_masked_sgd_kernel,
            (*_TABLES, "*fp64"),
            {"WEIGHT": TL_DTYPES[dtype], "GRAD": TL_DTYPES[dtype], "WIDE": wide, **_walk(update, taps, rank)},
            update.num_warps,
            **meant,
        )
    for which in (("flat", False, 0), ("flat+strided4", False, 4), ("taps+strided", True, 3)):
        layout, taps, rank = which
        walk = _walk(launch, taps, rank)
        for name, kernel, span, meant in (
            ("moments", soft_mask.moments_kernel, {}, _meant(launch, which, 1)),
            ("importance", soft_mask.importance_kernel, {"SPAN": 256}, _meant(launch, which, 2, 1, rolled=True)),
        ):
            yield Configuration(
                f"{name} {layout}", kernel, (*_TABLES, "*fp64"), {"GRAD": TL_DTYPES[fp32], **span, **walk},
                launch.num_warps, **(meant | {"barriers": None}),
            )  # fmt: skip


def _tables_writer() -> Iterator[Configuration]:
    count = _pointers.POINTERS_PER_LAUNCH
    yield Configuration("write_pointers", _pointers.write_pointers_kernel, ("*i64", ("i64",) * count), {"N": count}, 1)


def walk_configurations() -> Iterator[Configuration]:
    """Every kernel that reads the tables of a plan, and the one that fills them."""
    for cases in (
        _tables_writer,
        _sample,
        _sample_backward,
        _bits,
        _frozen,
        _mask_adam,
        _coded_adam,
        _patterns,
        _kernel_soft,
        _soft_mask,
    ):
        yield from cases()
