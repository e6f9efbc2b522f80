"""soft_mask: SPG's importance of every parameter of a network, and the SGD step that spares the important ones.

Both write in place; scalars that change between steps are device tensors, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.registration import define

TensorList = Sequence[Tensor]


def importance(gradient: Tensor) -> Tensor:
    """abs(tanh((g - mean g) / std g)) of one tensor, unbiased std, fp32; 0 where std is 0 or there is one element.

    Mean, deviation and quotient are formed in fp64.
    """
    if gradient.numel() < 2:
        return torch.zeros_like(gradient, dtype=torch.float32)
    g = gradient.double()
    deviation = g.std(correction=1)
    return torch.where(deviation > 0, ((g - g.mean()) / deviation).tanh().abs(), 0.0).float()


def raise_importance_reference(gammas: TensorList, gradients: TensorList) -> None:
    for gamma, gradient in zip(gammas, gradients, strict=True):
        gamma.copy_(torch.maximum(gamma, importance(gradient)))


def soft_masked_sgd_reference(weights: TensorList, gradients: TensorList, gammas: TensorList, lr: Tensor) -> None:
    for weight, gradient, gamma in zip(weights, gradients, gammas, strict=True):
        wide = torch.promote_types(weight.dtype, torch.float32)
        move = lr.to(wide) * ((1.0 - gamma) * gradient.to(wide))
        weight.copy_(weight.to(wide) - move)


def _in_place_fake(*args: object) -> None:
    """Everything is written in place and nothing is returned."""


define(
    "raise_importance(Tensor(a!)[] gammas, Tensor[] gradients) -> ()",
    reference=raise_importance_reference,
    fake=_in_place_fake,
)
define(
    "soft_masked_sgd(Tensor(a!)[] weights, Tensor[] gradients, Tensor[] gammas, Tensor lr) -> ()",
    reference=soft_masked_sgd_reference,
    fake=_in_place_fake,
    device_at=3,
)


def _check_shape(op: str, name: str, i: int, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise InputError(
            f"{op}: {name}[{i}] has shape {tuple(tensor.shape)} for a tensor of shape {tuple(like.shape)}; expected "
            "equal shapes"
        )


@torch.no_grad()
def raise_importance(gammas: TensorList, gradients: TensorList) -> None:
    """gamma <- max(gamma, abs(tanh((g - mean g) / std g))), tensor by tensor, in place (SPG; Konishi et al. 2023).

    Args:
        gammas: importance so far, fp32, in [0, 1].
        gradients: signed sums of gradients over a task's batches, of their shapes. The std is the unbiased one; a
            tensor without spread (all zero, or one element) gives 0.

    Example:
        >>> import torch
        >>> from dwm_fast import ops
        >>> gamma = torch.tensor([0.9, 0.0, 0.0])
        >>> ops.raise_importance([gamma], [torch.tensor([1.0, 2.0, 3.0])])
        >>> [round(x, 4) for x in gamma.tolist()]
        [0.9, 0.0, 0.7616]
    """
    if len(gammas) != len(gradients):
        raise InputError(f"raise_importance got {len(gammas)} gammas and {len(gradients)} gradients; expected as many")
    for i, (gamma, gradient) in enumerate(zip(gammas, gradients, strict=True)):
        _check_shape("raise_importance", "gradients", i, gradient, gamma)
    if gammas:
        torch.ops.dwm_fast.raise_importance(list(gammas), list(gradients))
        torch.autograd.graph.increment_version(list(gammas))


@torch.no_grad()
def soft_masked_sgd(weights: TensorList, gradients: TensorList, gammas: TensorList, lr: Tensor) -> None:
    """w <- w - lr ((1 - gamma) g) for a whole network, in place: plain SGD on soft-masked gradients.

    Args:
        weights: parameters, any floating dtype and strides; each is rounded to its own dtype once.
        gradients: of their shapes.
        gammas: importance, fp32, of their shapes, or 0-dim for a whole tensor (SPG's heads).
        lr: rate, 0-dim fp64 on the device.

    Example:
        >>> import torch
        >>> from dwm_fast import ops
        >>> w = torch.ones(3)
        >>> lr = torch.tensor(0.25, dtype=torch.float64)
        >>> ops.soft_masked_sgd([w], [torch.full((3,), 2.0)], [torch.tensor([0.0, 0.5, 1.0])], lr)
        >>> w.tolist()
        [0.5, 0.75, 1.0]
    """
    if not len(weights) == len(gradients) == len(gammas):
        raise InputError(
            f"soft_masked_sgd got {len(weights)} weights, {len(gradients)} gradients and {len(gammas)} gammas; "
            "expected one of each per parameter"
        )
    for i, (weight, gradient, gamma) in enumerate(zip(weights, gradients, gammas, strict=True)):
        _check_shape("soft_masked_sgd", "gradients", i, gradient, weight)
        if gamma.dim():
            _check_shape("soft_masked_sgd", "gammas", i, gamma, weight)
    if weights:
        torch.ops.dwm_fast.soft_masked_sgd(list(weights), list(gradients), list(gammas), lr)
        torch.autograd.graph.increment_version(list(weights))
