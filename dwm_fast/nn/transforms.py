"""Transforms of torch that cannot see through a draw of masks, and what to do in their place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dwm_fast.errors import InputError


def refuse_transforms(learned: Iterable[Tensor]) -> None:
    """InputError where the learned tensors are seen through torch.func, or the network is written as ONNX."""
    if torch.compiler.is_dynamo_compiling():
        return
    if (torch._C._is_tracing() or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export():
        raise InputError("a masked network cannot be exported to ONNX; export the plain one, dwm_fast.merge(masked)")
    if torch._C._functorch.maybe_current_level() is None:
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in learned):
        raise InputError(
            "torch.func cannot transform a network in its mask parameters; use loss.backward(), or transform the "
            "plain network, dwm_fast.merge(masked), in its weights"
        )
