"""Compile every kernel configuration for a GPU that need not be there, and refuse spills.

    python -m dwm_fast.kernels._compile --target 90

prints one line per configuration (registers, spilled bytes, shared memory) and exits with 1 when one spills or takes
more shared memory than a block may have. It must not run under TRITON_INTERPRET=1, which leaves nothing to compile.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dwm_fast.kernels import _pointers, bits, kernel_soft, sample, soft_mask, update
from dwm_fast.kernels._compile_products import product_configurations
from dwm_fast.kernels._configuration import Configuration
from dwm_fast.kernels._launch import OPTIONS, Launch, launch_parameters
from dwm_fast.kernels._math import INTERPRETED
from dwm_fast.kernels._tables import TL_DTYPES
from dwm_fast.ops.draw import Mode
from dwm_fast.ops.packing import COMBINATIONS

MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have, by target."""

_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
_MODES = {mode.value: mode.name.lower().removeprefix("gumbel_") for mode in Mode}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What ptxas gave a configuration: registers a thread, spilled bytes a thread, shared bytes a block.

    matrix: whether it has matrix instructions of a warp group (wgmma).
    """

    registers: int
    spilled: int
    shared: int
    matrix: bool = False


def _walk(launch: Launch, taps: bool, rank: int) -> dict[str, Any]:
    return {"BLOCK": launch.block, "STRIDED_BLOCK": launch.strided, "GROUPS": launch.groups, "HAS_TAPS": taps,
            "RANK": rank}  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return _POINTER[dtype].removeprefix("*")


_TABLES = ("*i64", "*i64", "*i64", "*i32")
_LAYOUTS = (("flat", False, 0), ("taps+strided", True, 3), ("flat+strided5", False, 5))


def _sample() -> Iterator[Configuration]:
    launch = launch_parameters("sample")
    for mode, weight, out, (layout, taps, rank) in _sample_cases():
        yield Configuration(
            f"sample {_MODES[mode]} {_short(weight)}->{_short(out)} {layout}", sample.sample_fwd_kernel,
            (*_TABLES, _POINTER[out], "*i32", "*fp32", "*i64", "*fp32", "i32"),
            {"WEIGHT": TL_DTYPES[weight], "MODE": mode, "PACK": True, **_walk(launch, taps, rank)}, launch.num_warps,
        )  # fmt: skip
    yield Configuration("penalty", sample.penalty_fwd_kernel, ("*fp32", "*fp32", "i32", "i32"), {"BLOCK": 1024}, 4)


def _sample_cases() -> Iterator[tuple[int, torch.dtype, torch.dtype, tuple[str, bool, int]]]:
    """Every mode with the paths of a convolutional network; every dtype and every set of paths with the hard mode."""
    for mode in _MODES:
        yield mode, torch.float32, torch.bfloat16, _LAYOUTS[1]
    yield 0, torch.float32, torch.float32, _LAYOUTS[1]
    yield 0, torch.float32, torch.float32, _LAYOUTS[0]
    yield 0, torch.bfloat16, torch.bfloat16, _LAYOUTS[2]
    yield 0, torch.float16, torch.float16, _LAYOUTS[0]


def _sample_backward() -> Iterator[Configuration]:
    launch = launch_parameters("sample_backward")
    for mode, weight, grad, layout in _sample_cases():
        name, taps, rank = layout
        for need_weights in (False, True) if weight != grad and mode in (0, 1, 5) else (False,):
            yield Configuration(
                f"sample_backward {_MODES[mode]} {_short(weight)},{_short(grad)} {name}"
                + (" +weights" if need_weights else ""),
                sample.sample_bwd_kernel,
                (*_TABLES, "*fp32", _POINTER[weight] if need_weights else "*i64", "*fp32", "*i64", "*fp32", "i32",
                 "i32"),
                {"WEIGHT": TL_DTYPES[weight], "GRAD": TL_DTYPES[grad], "MODE": mode, "NEED_LOGITS": True,
                 "NEED_WEIGHTS": need_weights, **_walk(launch, taps, rank)}, launch.num_warps,
            )  # fmt: skip


def _bits() -> Iterator[Configuration]:
    launch = launch_parameters("bits")
    warps = launch.num_warps
    types: tuple[str, ...]
    for layout, taps, rank in _LAYOUTS:
        walk = _walk(launch, taps, rank)
        for mask in (torch.bool, torch.float32) if taps else (torch.bool,):
            yield Configuration(
                f"pack {str(mask)[6:]} {layout}", bits.pack_kernel, (*_TABLES, "*i32"),
                {"mask_dtype": TL_DTYPES[mask], **walk}, warps,
            )  # fmt: skip
        for dtype in (torch.bfloat16, torch.float32) if taps else (torch.float32,):
            types = (*_TABLES, "*i32", _POINTER[dtype])
            yield Configuration(f"apply {_short(dtype)} {layout}", bits.apply_kernel, types, walk, warps)
    types = ("*i64", "*i64", "*i32", "*i32", "*i8")
    yield Configuration("unpack", bits.unpack_kernel, types, _walk(launch, False, 1), warps)
    for pair in (False, True):
        yield Configuration(
            "overlap" if pair else "count", bits.count_kernel, ("*i64", "*i32", "*i32", "*i32", "*i64"),
            {"PAIR": pair, "BLOCK": launch.block}, warps,
        )  # fmt: skip
    for name, op in COMBINATIONS.items():
        types = ("*u8", "*u8", "*u8", "i32")
        yield Configuration(f"combine {name}", bits.combine_kernel, types, {"OP": op, "BLOCK": launch.block}, warps)


def _frozen() -> Iterator[Configuration]:
    """Both algorithms with every path; bits or none, dense and compact state, each dtype once."""
    launch = launch_parameters("update")
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    cases = [(fp32, _LAYOUTS[0], True, False), (fp32, _LAYOUTS[1], True, False), (fp32, _LAYOUTS[1], False, False)]
    cases += [(bf16, _LAYOUTS[2], True, False), (fp32, _LAYOUTS[2], True, True), (fp64, _LAYOUTS[1], True, False)]
    for adam in (True, False):
        for dtype, (layout, taps, rank), has_bits, compact in cases:
            state = torch.promote_types(dtype, torch.float32)
            yield Configuration(
                f"{'frozen_adamw' if adam else 'frozen_sgd'} {_short(dtype)} {layout}"
                + (" bits" if has_bits else "") + (" compact" if compact else ""),
                update.frozen_kernel,
                (*_TABLES, "*i32", "*i64", "*fp32", "*fp64", ("fp32",) * (12 if adam else 9)),
                {"WEIGHT": TL_DTYPES[dtype], "GRAD": TL_DTYPES[dtype], "STATE": TL_DTYPES[state],
                 "HAS_BITS": has_bits, "COMPACT": compact, "ADAM": adam, "MOMENTUM": not adam, "NESTEROV": not adam,
                 "DECAY": True, "DECOUPLED": adam, "MAXIMIZE": False, **_walk(launch, taps, rank)}, launch.num_warps,
            )  # fmt: skip


def _mask_adam() -> Iterator[Configuration]:
    launch = launch_parameters("update")
    for mode, weight, grad, (layout, taps, rank) in _sample_cases():
        yield Configuration(
            f"mask_adam {_MODES[mode]} {_short(weight)},{_short(grad)} {layout}", update.mask_adam_kernel,
            (*_TABLES, "*i64", "*fp32", "*fp32", "*fp32", "*fp64", ("fp32",) * 12, "i32"),
            {"WEIGHT": TL_DTYPES[weight], "GRAD": TL_DTYPES[grad], "MODE": mode, "DECAY": True, "DECOUPLED": True,
             **_walk(launch, taps, rank)}, launch.num_warps,
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
                f"kernel_soft {_short(weight)}->{_short(other)}{name}", kernel_soft.kernel_soft_fwd_kernel,
                (*tables, "*fp32", _POINTER[other], *scalars), {"WEIGHT": TL_DTYPES[weight], "SPAN": 512, **noise},
                warps,
            )  # fmt: skip
            yield Configuration(
                f"kernel_soft_backward {_short(weight)},{_short(other)}{name}", kernel_soft.kernel_soft_bwd_kernel,
                (*tables, "*fp32", *scalars), {"WEIGHT": TL_DTYPES[weight], "GRAD": TL_DTYPES[other], **noise}, warps,
            )  # fmt: skip


def _soft_mask() -> Iterator[Configuration]:
    update, launch = launch_parameters("update"), launch_parameters("importance")
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    for dtype, (layout, taps, rank) in zip((fp32, bf16, fp64), (_LAYOUTS[1], _LAYOUTS[2], _LAYOUTS[0]), strict=True):
        wide = TL_DTYPES[torch.promote_types(dtype, fp32)]
        yield Configuration(
            f"soft_masked_sgd {_short(dtype)} {layout}", soft_mask.soft_masked_sgd_kernel, (*_TABLES, "*fp64"),
            {"WEIGHT": TL_DTYPES[dtype], "GRAD": TL_DTYPES[dtype], "WIDE": wide, **_walk(update, taps, rank)},
            update.num_warps,
        )  # fmt: skip
    for layout, rank in (("flat", 0), ("flat+strided4", 4)):
        walk = _walk(launch, False, rank)
        for name, kernel, span in (
            ("moments", soft_mask.moments_kernel, {}), ("importance", soft_mask.importance_kernel, {"SPAN": 256}),
        ):  # fmt: skip
            yield Configuration(
                f"{name} {layout}", kernel, (*_TABLES, "*fp64"), {"GRAD": TL_DTYPES[fp32], **span, **walk},
                launch.num_warps,
            )  # fmt: skip


def _tables_writer() -> Iterator[Configuration]:
    count = _pointers.POINTERS_PER_LAUNCH
    yield Configuration("write_pointers", _pointers.write_pointers_kernel, ("*i64", ("i64",) * count), {"N": count}, 1)


def configurations() -> list[Configuration]:
    """The configurations that the launchers use, without those that leave out paths or change dtypes of one here."""
    return [
        *_tables_writer(), *_sample(), *_sample_backward(), *_bits(), *_frozen(), *_mask_adam(), *_kernel_soft(),
        *_soft_mask(), *product_configurations(),
    ]  # fmt: skip


def compile_configuration(configuration: Configuration, target: int) -> Usage:
    """Compile for compute capability `target` (90 = sm_90) and read the resources from the binary."""
    kernel = configuration.kernel
    names = [name for name in kernel.arg_names if name not in configuration.constants]
    signature = dict(zip(names, configuration.types, strict=True))
    signature |= dict.fromkeys(configuration.constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(kernel.arg_names)
        if str(signature[name]).startswith("*") or name in configuration.aligned
    }
    source = ASTSource(kernel, signature, constexprs=configuration.constants, attrs=attributes)
    options = {"num_warps": configuration.num_warps, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage = _resources(compiled.asm["cubin"], compiled.metadata.shared)
    return dataclasses.replace(usage, matrix="wgmma.mma_async" in compiled.asm["ptx"])


def _resources(cubin: bytes, shared: int) -> Usage:
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [os.path.join(folder, "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], shared)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dwm_fast.kernels._compile", description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, default=90, choices=sorted(MAX_SHARED), help="90 means sm_90")
    parser.add_argument("--match", default="", help="only configurations whose name contains this")
    arguments = parser.parse_args()
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET=1 is set and leaves nothing to compile; unset it and run again")
    bad = 0
    for configuration in configurations():
        if arguments.match not in configuration.name:
            continue
        usage = compile_configuration(configuration, arguments.target)
        ok = usage.spilled == 0 and usage.shared <= MAX_SHARED[arguments.target]
        lacking = arguments.target == 90 and configuration.matrix and not usage.matrix
        ok = ok and not lacking
        bad += not ok
        print(
            f"sm_{arguments.target} {configuration.name}: {usage.registers} registers, {usage.spilled} bytes spilled, "
            f"{usage.shared} bytes shared{'' if ok else '  <- no wgmma' if lacking else '  <- too much'}", flush=True,
        )  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
