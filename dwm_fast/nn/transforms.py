"""What masks cannot be drawn under: shards of the learned tensors, torch.func in them, a network written as ONNX."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dwm_fast.errors import InputError
from dwm_fast.ops.shards import refuse_shards


def refuse_transforms(learned: Sequence[Tensor]) -> None:
    """InputError where the learned tensors are shards or seen through torch.func, or the network is written as ONNX."""
    if torch.compiler.is_dynamo_compiling():
        return
    if any(type(tensor) is not nn.Parameter for tensor in learned):
        refuse_shards(
            learned,
            "a draw of masks",
            "a part draws its masks where its forward has gathered its parameters: call fully_shard on masked layers, "
            "blocks or the masked model, not on masks or on modules that are never called, and call the model whole",
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
