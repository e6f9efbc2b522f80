"""What masks cannot be drawn under: shards of the learned tensors, torch.func in them, a network written as ONNX."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.shards import refuse_shards


def refuse_transforms(learned: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """InputError where a draw of masks meets shards, or torch.func in what is learned, or a network written as ONNX."""
    if torch.compiler.is_dynamo_compiling():
        return
    refuse_shards(
        (*learned, *weights),
        "a draw of masks",
        "a part draws its masks where its forward has gathered its parameters: call fully_shard on masked layers, "
        "blocks or the masked model, logits and weights together, not on masks or on modules that are never called, "
        "and call the model whole",
    )
    if (torch._C._is_tracing() or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export():
        raise InputError("a masked network cannot be exported to ONNX; export the plain one, dwm_fast.merge(masked)")
    if torch._C._functorch.maybe_current_level() is None:
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in learned):
        raise InputError(
            "torch.func cannot transform a network in its mask parameters; use loss.backward(), or transform the "
            "plain network, dwm_fast.merge(masked), in its weights"
        )
