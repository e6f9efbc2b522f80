"""soft_mask: SPG's importance of every parameter of a network, and the SGD step that spares the important ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


@torch.no_grad()
def raise_importance(gammas: TensorList, gradients: TensorList) -> None:
    """gamma <- max(gamma, importance of the gradient), in place, tensor by tensor."""
    for gamma, gradient in zip(gammas, gradients, strict=True):
        torch.maximum(gamma, importance(gradient), out=gamma)


@torch.no_grad()
def soft_masked_sgd(weights: TensorList, gradients: TensorList, gammas: TensorList, lr: Tensor) -> None:
    """w <- w - lr * ((1 - gamma) * g), in place.

    Args:
        weights: parameters.
        gradients: of their shapes.
        gammas: fp32, of their shapes or 0-dim.
        lr: rate, 0-dim.
    """
    for weight, gradient, gamma in zip(weights, gradients, gammas, strict=True):
        weight.sub_(lr.to(weight.dtype) * ((1.0 - gamma) * gradient))
