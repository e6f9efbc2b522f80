"""torch.func and forward-mode derivatives: they follow torch's own operations, not those that a library registers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dwm_fast.errors import InputError
from dwm_fast.ops.bits import unpack


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: products are then torch's own."""
    if torch.compiler.is_compiling():
        return False
    return _forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None


def _forward_mode() -> bool:
    """Inside `torch.autograd.forward_ad.dual_level`, which `torch.func.jvp` opens too."""
    return forward_ad._current_level >= 0


def plainly_masked(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight under packed bits in `dtype` by torch's own operations, so that transforms go through it."""
    keep = unpack(bits, [weight.numel()])[0].view(weight.shape)
    return torch.where(keep, weight, 0).to(dtype)


def refuse_forward_mode(name: str) -> None:
    """InputError inside forward-mode differentiation, of which an operation without a rule for it would give zeros."""
    if not torch.compiler.is_compiling() and _forward_mode():
        raise InputError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad); call the bank "
            "under one domain at a time, or use a reverse mode"
        )
