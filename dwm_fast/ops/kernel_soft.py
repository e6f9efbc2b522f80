"""kernel_soft: KSM's masks of a whole network (one real number a kernel, kept or scaled down), and their backward.

The reference below is the specification that every other backend is tested against. Per tensor, with r of one number
a kernel and z = 1200 (r - threshold) (+ logistic noise):

    b = 1[z >= 0]                          s = sigmoid(z / 100)       (s >= 1/2 where z >= 0)
    a = r where b = 0, else 0              a's non-zero entries <- (a - min a) / (max a - min a), 0 where that is 0 / 0
    M = b + a / 2                          masked weight = M * W
    dL/dr = dL/dM * 12 s (1 - s)           dL/dM = sum over the kernel of dL/d(M W) * W;  a passes nothing on

min and max go over the whole tensor, the zeros of kept kernels included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.draw import check_layers
from dwm_fast.ops.philox import random_words, signed_uniform
from dwm_fast.ops.registration import define
from dwm_fast.ops.sample import check_noise, hard
from dwm_fast.ops.sample import noisy as with_noise

TensorList = Sequence[Tensor]
SCALE, TEMPERATURE = 1200.0, 100.0
"""z = SCALE (r - threshold), s = sigmoid(z / TEMPERATURE): the authors' constants."""


def kernel_shape(weight: torch.Size | Sequence[int]) -> tuple[int, ...]:
    """Shape of r for a weight: its first two sizes, then ones."""
    return (*weight[:2], *[1] * (len(weight) - 2))


def _noise(real: Tensor, rng_state: Tensor, layer: int, step_offset: int) -> Tensor:
    """Signed u, fp32, of r's shape."""
    return signed_uniform(random_words(real.numel(), rng_state, layer, step_offset)).view(real.shape)


def _keep(real: Tensor, threshold: float, rng_state: Tensor, layer: int, noisy: bool, step_offset: int) -> Tensor:
    """b as bool. With noise z + log u - log(1 - u) >= 0 is decided without logarithms: u > sigmoid(-z)."""
    z = (real - threshold) * SCALE
    return hard(z, _noise(real, rng_state, layer, step_offset)) if noisy else z >= 0


def soft_values(real: Tensor, keep: Tensor) -> Tensor:
    """M of one tensor: 1 where `keep`, else the min-max scaled r over 2, in [0, 1/2]; fp32, without waiting."""
    if real.numel() == 0:
        return keep.to(real.dtype)
    a = torch.where(keep, torch.zeros_like(real), real)
    low, high = torch.aminmax(a)
    scaled = torch.where((a != 0) & (high > low), (a - low) / (high - low), torch.zeros_like(a))
    return keep.to(real.dtype) + 0.5 * scaled


def kernel_soft_reference(
    reals: TensorList, weights: TensorList, rng_state: Tensor, layers: Sequence[int], threshold: float, noisy: bool,
    step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    masked = []
    for real, weight, layer in zip(reals, weights, layers, strict=True):
        dense = real.contiguous()
        value = soft_values(dense, _keep(dense, threshold, rng_state, layer, noisy, step_offset))
        out = torch.empty_like(weight, dtype=dtype or weight.dtype)
        masked.append(out.copy_(weight.to(value.dtype) * value))
    return masked


def kernel_soft_backward_reference(
    grads: TensorList, reals: TensorList, weights: TensorList, rng_state: Tensor, layers: Sequence[int],
    threshold: float, noisy: bool, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    found = []
    for grad, real, weight, layer in zip(grads, reals, weights, layers, strict=True):
        dense = real.contiguous()
        z = (dense - threshold) * SCALE
        if noisy:
            z = with_noise(z, _noise(dense, rng_state, layer, step_offset))
        s = torch.sigmoid(z / TEMPERATURE)
        over_mask = (grad.to(real.dtype) * weight.to(real.dtype)).reshape(*real.shape[:2], -1).sum(-1).view(real.shape)
        slope = SCALE / TEMPERATURE * s * (1.0 - s)
        found.append(torch.empty_like(real).copy_(over_mask * slope))
    return found


def _fake(
    reals: TensorList, weights: TensorList, rng_state: Tensor, layers: Sequence[int], threshold: float, noisy: bool,
    step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(w, dtype=dtype or w.dtype) for w in weights]


def _backward_fake(
    grads: TensorList, reals: TensorList, weights: TensorList, rng_state: Tensor, layers: Sequence[int],
    threshold: float, noisy: bool, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(r) for r in reals]


define(
    "kernel_soft(Tensor[] reals, Tensor[] weights, Tensor rng_state, int[] layers, float threshold, bool noisy, "
    "int step_offset, ScalarType? dtype) -> Tensor[]",
    reference=kernel_soft_reference,
    fake=_fake,
    device_at=2,
)
define(
    "kernel_soft_backward(Tensor[] grads, Tensor[] reals, Tensor[] weights, Tensor rng_state, int[] layers, "
    "float threshold, bool noisy, int step_offset) -> Tensor[]",
    reference=kernel_soft_backward_reference,
    fake=_backward_fake,
    device_at=3,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    reals, weights, rng_state, layers, threshold, noisy, step_offset, _ = inputs
    ctx.save_for_backward(rng_state, *reals, *weights)
    ctx.arguments = (list(layers), threshold, noisy, step_offset)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    rng_state, *tensors = ctx.saved_tensors
    count = len(tensors) // 2
    reals, weights = tensors[:count], tensors[count:]
    filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    found = torch.ops.dwm_fast.kernel_soft_backward(filled, reals, weights, rng_state, *ctx.arguments)
    return (found, [None] * count, *([None] * 6))


torch.library.register_autograd("dwm_fast::kernel_soft", _backward, setup_context=_setup_context)


def kernel_soft(
    reals: TensorList,
    weights: TensorList,
    rng_state: Tensor,
    *,
    threshold: float = 5e-3,
    noisy: bool = False,
    layers: Sequence[int] | None = None,
    step_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Masked weights of all layers of a network under KSM's rule; differentiable in `reals` alone.

    Args:
        reals: fp32, reals[i] of shape (C_out, C_in, 1, 1) for a weight (C_out, C_in, kh, kw), (out, in) for a Linear.
        weights: weights with two sizes or more, any floating dtype and strides. They are frozen in KSM: no gradient.
        rng_state: int64 (2,): seed and step of the noise; read where `noisy`.
        threshold: a kernel is kept where r >= threshold (authors' code: 5e-3).
        noisy: whether logistic noise (the difference of two Gumbels) is added to z.
        layers: the noise contract's layer index of each tensor; 0, 1, 2, ... by default.
        step_offset: added to the step (sample j of a split batch).
        dtype: dtype of the masked weights; the weights' own by default.

    Returns:
        Masked weights, each with its weight's strides.

    Raises:
        InputError: lists of different lengths, an r of another shape than its weight's kernels, or a layer number
            outside 0 .. 2^32 - 1.

    Example:
        >>> import torch
        >>> from dwm_fast import ops
        >>> r = torch.tensor([[0.01, 0.0], [0.001, 0.002]]).view(2, 2, 1, 1)
        >>> ops.kernel_soft([r], [torch.ones(2, 2, 1, 1)], torch.tensor([0, 0]))[0].flatten().tolist()
        [1.0, 0.0, 0.25, 0.5]
    """
    layers = range(len(weights)) if layers is None else layers
    check_noise(rng_state, torch.ones((), device=rng_state.device))
    check_layers(layers)
    if not len(reals) == len(weights) == len(layers):
        raise InputError(
            f"kernel_soft got {len(reals)} reals, {len(weights)} weights and {len(layers)} layers; expected one of "
            "each per layer"
        )
    for i, (real, weight) in enumerate(zip(reals, weights, strict=True)):
        if weight.dim() < 2 or tuple(real.shape) != kernel_shape(weight.shape):
            raise InputError(
                f"kernel_soft: reals[{i}] has shape {tuple(real.shape)} for a weight of shape {tuple(weight.shape)}; "
                "expected (out, in) and a 1 for every further size"
            )
    masked: list[Tensor] = torch.ops.dwm_fast.kernel_soft(
        list(reals), list(weights), rng_state, list(layers), threshold, noisy, step_offset, dtype
    )
    return masked
