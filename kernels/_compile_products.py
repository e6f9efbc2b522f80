"""The masked products that the compile gate compiles: every kernel with the tiles that its launcher chooses."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from dwm_fast.kernels import bank, conv, linear, linear_grad
from dwm_fast.kernels._configuration import Configuration
from dwm_fast.kernels._launch import Tiles
from dwm_fast.kernels._product_launch import convolution_tiles, gradient_tiles, precision, product_tiles
from dwm_fast.kernels._products import PACKED
from dwm_fast.ops.problem import Problem

_FP32, _BF16 = torch.float32, torch.bfloat16
_POINTER = {_FP32: "*fp32", _BF16: "*bf16"}
_HARD, _BITS = 0, PACKED.value
_UNIT = {"x_c": 1, "w_k": 1, "s_k": 1, "y_r": 1}
_ALIGNED = ("N", "K", "x_m", "w_n", "s_n", "y_m")


def product_configurations() -> Iterator[Configuration]:
    """Few rows and many, both directions, bits and drawn masks, rows inside words, TF32 and IEEE, convolutions."""
    for m in (1, 16, 64, 8192):
        yield _product(_BITS, _BF16, m)
    for m in (16, 8192):
        yield _product(_BITS, _BF16, m, k=4090)
    yield _product(_BITS, _BF16, 64, k=4090, back=True)
    for m in (1, 16, 64):
        yield _product(_BITS, _BF16, m, back=True)
    yield _product(_BITS, _FP32, 64, tf32=True)
    yield _product(_BITS, _FP32, 16, k=4090)
    for m in (1, 16, 64, 8192):
        yield _product(_HARD, _BF16, m)
    yield _product(_HARD, _BF16, 64, k=4090)
    yield _product(_HARD, _BF16, 16, back=True)
    for m in (16, 64):
        yield _product(_HARD, _FP32, m, tf32=True)
    yield Configuration(
        "linear parts",
        linear.parts_kernel,
        ("*fp32", "*bf16", "*bf16", *("i32",) * 4),
        {"HAS_BIAS": True, "ACTIVATION": 2, "BLOCK": linear.PARTS_BLOCK, "y_r": 1},
        4,
    )
    for mode, k in itertools.product((_HARD, _BITS), (4096, 4090)):
        yield _gradient(mode, 64, k)
    for dtype, k in itertools.product((_BF16, _FP32), (4096, 4090)):
        for rows in (4, 256):
            yield _bank(dtype, rows, k)
    yield from _convolutions()


def _problem(op: str, dtype: torch.dtype, m: int, k: int, tf32: bool = False, taps: int = 1) -> Problem:
    return Problem(op, "cuda", dtype, m, 4096, k, tf32, taps)


def _source(mode: int) -> str:
    return "*i32" if mode == _BITS else "*fp32"


def _name(what: str, mode: int, dtype: torch.dtype) -> str:
    return f"{what} {'bits' if mode == _BITS else 'drawn'} {str(dtype)[6:]}"


def _product(
    mode: int, dtype: torch.dtype, m: int, k: int = 4096, back: bool = False, tf32: bool = False
) -> Configuration:
    op = ("linear_packed" if mode == _BITS else "linear") + ("_input_grad" if back else "")
    problem = _problem(op, dtype, m, k, tf32)
    tiles = product_tiles(problem, back)
    constants = linear.product_constants(problem, tiles, mode, back, not back, 0, tl.int32) | _UNIT
    x, weight = _POINTER[dtype], _POINTER[dtype if mode == _BITS else _FP32]
    types: tuple[Any, ...] = (x, weight, _source(mode), x, x if tiles.splits == 1 else "*fp32", "*i64", "*fp32")
    sizes = ["M", "N", "K", "words", "x_m", "w_n", "s_n"]
    if m == 1:
        constants |= {"M": 1}
        sizes.remove("M")
    types += (*("i32",) * len(sizes), "i64", "i32", "i32", "fp32", "i32")
    plain = dtype == _FP32 and not tf32
    return Configuration(
        _name(f"linear{' back' if back else ''} M={m} K={k}", mode, dtype), linear.masked_product_kernel, types,
        constants, tiles.num_warps, _ALIGNED if k % 16 == 0 else ("N",), matrix=m > 1 and not plain,
        pipelined=tiles.stages > 1,
    )  # fmt: skip


def _gradient(mode: int, m: int, k: int) -> Configuration:
    bits = mode == _BITS
    problem = _problem("linear_packed_weight_grad" if bits else "linear_mask_grad", _BF16, m, k)
    tiles = gradient_tiles(problem)
    units = ("g_n", "x_k", "w_k", "s_k", "ds_k", "dw_k")
    constants = linear_grad.gradient_constants(problem, tiles, mode, not bits, True, tl.int32) | dict.fromkeys(units, 1)
    weight = _POINTER[_BF16 if bits else _FP32]
    types = ("*bf16", "*bf16", weight, _source(mode), "*fp32", weight, "*i64", "*fp32", *("i32",) * 10, "i32", "fp32",
             "i32")  # fmt: skip
    return Configuration(
        _name(f"linear gradient M={m} K={k}", mode, _BF16), linear_grad.mask_gradient_kernel, types, constants,
        tiles.num_warps, ("N", "K", "g_m", "x_m", "w_n", "s_n", "ds_n", "dw_n") if k % 16 == 0 else ("N", "g_m"),
        matrix=True, pipelined=True,
    )  # fmt: skip


def _bank(dtype: torch.dtype, rows: int, k: int) -> Configuration:
    tiles = bank.tiles_for(16 * rows, 16, 4096, k, dtype)
    kernel = bank.bank_linear_few_fwd_kernel if tiles.group else bank.bank_linear_many_fwd_kernel
    constants: dict[str, Any] = {"HAS_BIAS": True, "ALIGNED": k % 32 == 0, "PRECISION": "tf32"}
    constants |= {"BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "BLOCK_M": tiles.block_m}
    constants |= {"GROUP": tiles.group} if tiles.group else {}
    pointer = _POINTER[dtype]
    return Configuration(
        f"bank rows={rows} K={k} {str(dtype)[6:]}", kernel,
        (pointer, pointer, "*i32", pointer, "*i64", pointer, *("i32",) * 6), constants, tiles.num_warps,
        ("N", "K", "bits_stride", "bias_stride") if k % 16 == 0 else ("N", "bias_stride"),
    )  # fmt: skip


def _convolutions() -> Iterator[Configuration]:
    problem = _problem("conv2d", _BF16, 8 * 56 * 56, 9 * 64, taps=9)
    pair, four = ("i32", "i32"), ("i32",) * 4
    types: tuple[Any, ...]
    for mode, back in ((_BITS, False), (_HARD, True)):
        types = ("*bf16", "*fp32", _source(mode), "*bf16", "*bf16", "*i64", "*fp32", "i32", pair, pair, *four, four,
                 four, four, four, pair, pair, pair, "i32", "fp32", "i32")  # fmt: skip
        tiles = convolution_tiles(problem, back)
        constants = {"MODE": mode, "BACK": back, "HAS_BIAS": not back, **_convolution_constants(problem, tiles)}
        yield Configuration(
            _name(f"conv2d{' back' if back else ''}", mode, _BF16), conv.conv_product_kernel, types, constants,
            tiles.num_warps, matrix=True, pipelined=tiles.stages > 1,
        )  # fmt: skip
    problem = dataclasses.replace(problem, op="conv2d_mask_grad")
    tiles = convolution_tiles(problem)
    types = ("*bf16", "*bf16", "*fp32", "*fp32", "*fp32", "*fp32", "*i64", "*fp32", "i32", pair, pair, *("i32",) * 4,
             *(four,) * 6, pair, pair, pair, "i32", "fp32", "i32")  # fmt: skip
    yield Configuration(
        _name("conv2d gradient", _HARD, _BF16),
        conv.conv_mask_gradient_kernel,
        types,
        {"MODE": _HARD, "NEED_LOGITS": True, "NEED_WEIGHT": False, **_convolution_constants(problem, tiles)},
        tiles.num_warps,
        matrix=True,
    )


def _convolution_constants(problem: Problem, tiles: Tiles) -> dict[str, Any]:
    return {"PRECISION": precision(problem), "BLOCK_O": tiles.block_n, "BLOCK_I": tiles.block_k,
            "BLOCK_M": tiles.block_m, "STAGES": tiles.stages, "INDEX": tl.int32}  # fmt: skip
