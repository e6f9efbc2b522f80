"""2:4 masks on sparse tensor cores: which masks and weights the vendor's products take. No kernel of ours is in it."""

from __future__ import annotations

import torch
from torch import Tensor

from dwm_fast.ops.bits import unpack

SPARSE = "sparse"
"""The way of a product on sparse tensor cores, beside those of `ways`; nothing forces it, the rule alone takes it."""
BLOCK = 16
"""A weight's sizes are multiples of this: what cuSPARSELt, which torch calls, takes of 16-bit weights."""
_CAPABILITY = (8, 0)


def keeps_two_of_four(bits: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a mask keeps at most two of every four neighbours of a row, counted from the row's first weight.

    On a GPU the answer is waited for.

    Args:
        bits: uint8 (packed_nbytes(numel),), LSB first, of a weight of `shape`.
    """
    if len(shape) != 2 or shape[1] % 4:
        return False
    groups = unpack(bits, [shape[0] * shape[1]])[0].view(-1, 4)
    return bool((groups.sum(1) <= 2).all())


def obstacle_of_weight(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Why no sparse tensor core multiplies a weight of `shape` in the compute dtype `dtype`, or ""."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"sparse tensor cores compute in bfloat16 and float16 here, not in {dtype}"
    if len(shape) != 2 or shape[0] % BLOCK or shape[1] % BLOCK or 0 in shape:
        return f"they take weights of whole blocks of {BLOCK} x {BLOCK}, not {shape}"
    return ""


def obstacle_of_device(device: torch.device) -> str:
    """Why a device does not multiply 2:4 weights through torch, or ""."""
    if device.type != "cuda":
        return f"there are no sparse tensor cores on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"sparse tensor cores came with sm_80; this GPU is sm_{capability[0]}{capability[1]}"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return ""
