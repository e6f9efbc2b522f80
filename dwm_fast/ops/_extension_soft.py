"""The C++ backend of KSM's masks and SPG's step; as `_extension`, with the signatures of the operations.

fp32 without noise (kernel_soft), dense tensors in one memory order; anything else takes the reference. Importance is
measured once a task and is the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwm_fast.errors import Unsupported
from dwm_fast.ops import _build

_build.load("cpu")

from dwm_fast.ops.layout import in_orders, known, order_of, restored  # noqa: E402
from dwm_fast.ops.problem import FLOATS  # noqa: E402
from dwm_fast.ops.soft_mask import raise_importance_reference  # noqa: E402

TensorList = Sequence[Tensor]

_OPS = torch.ops.dwm_fast_cpu

raise_importance = raise_importance_reference


def _fp32(*lists: TensorList) -> bool:
    return all(t.dtype == torch.float32 for tensors in lists for t in tensors)


def kernel_soft(
    reals: TensorList, weights: TensorList, rng_state: Tensor, layers: Sequence[int], threshold: float, noisy: bool,
    step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    if noisy or dtype not in (None, torch.float32) or not _fp32(reals, weights):
        raise Unsupported
    dense, _ = known(weights)
    masked = [torch.empty_like(w) for w in dense]
    _OPS.kernel_soft.default(masked, [r.contiguous() for r in reals], dense, threshold)
    return restored(masked, weights)


def kernel_soft_backward(
    grads: TensorList, reals: TensorList, weights: TensorList, rng_state: Tensor, layers: Sequence[int],
    threshold: float, noisy: bool, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    if noisy or not _fp32(reals, weights, grads):
        raise Unsupported
    dense, orders = known(weights)
    incoming = in_orders(grads, orders)
    scores = [r.contiguous() for r in reals]
    found = [torch.empty_like(r) for r in scores]
    _OPS.kernel_soft_backward.default(found, incoming, scores, dense, threshold)
    return restored(found, reals)


def soft_masked_sgd(weights: TensorList, gradients: TensorList, gammas: TensorList, lr: Tensor) -> None:
    orders = [order for order in map(order_of, weights) if order is not None]
    simple = all(len({t.dtype for t in tensors}) == 1 for tensors in (weights, gradients)) and _fp32(gammas)
    simple = simple and weights[0].dtype in FLOATS and gradients[0].dtype in FLOATS
    if not simple or len(orders) < len(weights):
        raise Unsupported
    incoming = in_orders(gradients, orders)
    whole = [torch.contiguous_format if g.dim() == 0 else order for g, order in zip(gammas, orders, strict=True)]
    free = in_orders(gammas, whole)
    _OPS.soft_masked_sgd.default(list(weights), incoming, free, lr)
