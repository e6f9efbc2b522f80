"""update: one optimiser step for many tensors; weights skip kept lanes, logits take the chain rule along.

Shared rules of the three operations (every backend keeps them):

- `bits` is the network buffer of the weights in list order; a lane whose bit is 1 is kept: neither weight nor
  state of it is ever written, whatever its gradient holds. An empty buffer means that no lane is kept.
- State is fp32 (fp64 for fp64 weights) with its weight's shape and strides. In compact form (`ranks` not
  empty) the state of tensor i is 1-D, one entry per FREE lane in logical contiguous order, and ranks[b]
  (int64, one per 16 bytes of `bits`) counts the free lanes of the same tensor before lane block b: lane e of
  a tensor whose bits start at byte o has its state at ranks[o / 16 + e // 128] + popcount(free bits of that
  block below e % 128).
- `steps` is fp32 (n,), one per tensor, counted from 1: the caller advances it before the call.
- `lr` is a 0-dim fp64 tensor. Step-wise scalars (bias corrections, lr * weight_decay) are formed in fp64 and
  rounded to fp32 once; lane arithmetic is fp32 in the order of torch.optim's single-tensor formulas; a weight
  is rounded to its own dtype once, at the end.
- All weights of a call share a dtype, all gradients share a floating dtype; strides are free on every tensor.
- Nothing waits for the device: scalars that change between steps are device tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dwm_fast.ops.bits import unpack_reference
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.packing import packed_offsets
from dwm_fast.ops.registration import call, define
from dwm_fast.ops.sample import sample_backward_reference

TensorList = Sequence[Tensor]
BLOCK = 128
"""Lanes per entry of `ranks`: the 16 bytes to which packed tensors are aligned."""


def free_ranks(bits: Tensor, numels: Sequence[int]) -> Tensor:
    """int64 (len(bits) / 16,): free lanes of the same tensor before each block of 128 lanes."""
    offsets = packed_offsets(numels)
    parts = []
    for start, end in itertools.pairwise(offsets):
        lanes = unpack_reference(bits[start:end], [8 * (end - start)])[0]
        free = (~lanes).view(-1, BLOCK).sum(1, dtype=torch.int64)
        parts.append(free.cumsum(0) - free)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=bits.device)


class _Lanes:
    """The free lanes of one weight: all of them (keep is None), masked in place, or gathered."""

    def __init__(self, keep: Tensor | None, compact_length: int | None) -> None:
        self.keep = keep
        self.index = None
        if keep is not None and compact_length is not None:
            order = torch.arange(1, compact_length + 1, device=keep.device)
            self.index = torch.searchsorted((~keep).reshape(-1).cumsum(0), order)

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.index is not None:
            tensor = tensor.reshape(-1)[self.index]
        return tensor.to(dtype)

    def write(self, target: Tensor, value: Tensor) -> None:
        value = value.to(target.dtype)
        if self.index is not None:
            target.copy_(target.reshape(-1).index_copy(0, self.index, value).view(target.shape))
        else:
            self.write_state(target, value)

    def write_state(self, target: Tensor, value: Tensor) -> None:
        masked = self.keep is not None and self.index is None
        target.copy_(torch.where(self.keep, target, value) if masked and self.keep is not None else value)


def _lanes(weights: TensorList, bits: Tensor, ranks: Tensor, state: TensorList) -> list[_Lanes]:
    if bits.numel() == 0:
        return [_Lanes(None, None) for _ in weights]
    masks = unpack_reference(bits, [w.numel() for w in weights])
    lengths = [s.numel() for s in state] if ranks.numel() and state else [None] * len(weights)
    return [_Lanes(m.view(w.shape), n) for m, w, n in zip(masks, weights, lengths, strict=True)]


def _state_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _add_scaled(tensor: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """tensor + scale * other; on the CPU, where a scalar is free to read, by torch.optim's own call."""
    if scale.is_cpu:
        return torch.add(tensor, other, alpha=scale.item())
    return tensor + scale * other


def _decay(
    weight: Tensor, grad: Tensor, lr: Tensor, weight_decay: float, decoupled: bool, maximize: bool
) -> tuple[Tensor, Tensor]:
    """Weight and gradient after the sign of `maximize` and weight decay, decoupled or not."""
    if maximize:
        grad = -grad
    if weight_decay == 0:
        return weight, grad
    if decoupled:
        return weight * (1 - lr * weight_decay), grad
    return weight, grad.add(weight, alpha=weight_decay)


def _adam(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adam (Kingma and Ba 2015, algorithm 1): new weight, first and second moment.

    m = m + (1 - b1) (g - m);  v = b2 v + (1 - b2) g g;
    w = w - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    """
    exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    step = step.double()
    step_size = lr / (1 - beta1**step)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step).sqrt()).add_(eps)
    return weight + (-step_size) * exp_avg / denominator, exp_avg, exp_avg_sq


def frozen_adamw_reference(
    weights: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList, bits: Tensor,
    ranks: Tensor, steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    for i, lanes in enumerate(_lanes(weights, bits, ranks, exp_avg)):
        dtype = _state_dtype(weights[i])
        weight, grad = _decay(
            lanes.read(weights[i], dtype), lanes.read(grads[i], dtype), lr, weight_decay, decoupled, maximize
        )
        new = _adam(weight, grad, exp_avg[i], exp_avg_sq[i], steps[i], lr, beta1, beta2, eps)
        lanes.write(weights[i], new[0])
        lanes.write_state(exp_avg[i], new[1])
        lanes.write_state(exp_avg_sq[i], new[2])


def frozen_sgd_reference(
    weights: TensorList, grads: TensorList, momentum_buffers: TensorList, bits: Tensor, ranks: Tensor,
    steps: Tensor, lr: Tensor, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    for i, lanes in enumerate(_lanes(weights, bits, ranks, momentum_buffers)):
        dtype = _state_dtype(weights[i])
        weight, grad = _decay(
            lanes.read(weights[i], dtype), lanes.read(grads[i], dtype), lr, weight_decay, decoupled, maximize
        )
        if momentum != 0:
            moving = (momentum_buffers[i] * momentum).add_(grad, alpha=1 - dampening)
            buffer = torch.where(steps[i] == 1, grad, moving)
            lanes.write_state(momentum_buffers[i], buffer)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        lanes.write(weights[i], _add_scaled(weight, grad, -lr))


def mask_adam_reference(
    logits: TensorList, weights: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList,
    draw: Draw, penalty_scale: Tensor, steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    gradients, _ = sample_backward_reference(grads, penalty_scale, logits, weights, draw, True, False, total=1)
    nothing = draw.rng_state.new_empty(0)
    frozen_adamw_reference(
        logits, gradients, exp_avg, exp_avg_sq, nothing.to(torch.uint8), nothing, steps, lr, beta1, beta2,
        eps, weight_decay, decoupled, False,
    )  # fmt: skip


def _in_place_fake(*args: object) -> None:
    """Everything is written in place and nothing is returned."""


define(
    "frozen_adamw(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor bits, Tensor ranks, Tensor steps, Tensor lr, float beta1, float beta2, float eps, float "
    "weight_decay, bool decoupled, bool maximize) -> ()",
    reference=frozen_adamw_reference,
    fake=_in_place_fake,
    device_at=6,
)
define(
    "frozen_sgd(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor bits, Tensor "
    "ranks, Tensor steps, Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, "
    "bool decoupled, bool maximize) -> ()",
    reference=frozen_sgd_reference,
    fake=_in_place_fake,
    device_at=5,
)
define(
    # torch.compile passes arguments of a mutating operation by name, and keeps the name "mode" for itself.
    "mask_adam(Tensor(a!)[] logits, Tensor[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, "
    f"Tensor(c!)[] exp_avg_sq, {Draw.SCHEMA.replace('mode', 'mask_mode')}, Tensor penalty_scale, Tensor steps, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()",
    reference=mask_adam_reference,
    fake=_in_place_fake,
    device_at=5,
)


def _written(*lists: TensorList) -> None:
    """Tell autograd that a backend wrote these tensors in place."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


@torch.no_grad()
def frozen_adamw(
    weights: TensorList,
    grads: TensorList,
    exp_avg: TensorList,
    exp_avg_sq: TensorList,
    bits: Tensor,
    ranks: Tensor,
    steps: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
) -> None:
    """One Adam(W) step (torch.optim's formulas) on the free lanes of `weights`, in place; rules: this file's
    head.

    `decoupled` is AdamW's weight decay (Loshchilov and Hutter 2019); otherwise weight_decay * w joins the
    gradient.
    """
    torch.ops.dwm_fast.frozen_adamw(
        list(weights), list(grads), list(exp_avg), list(exp_avg_sq), bits, ranks, steps, lr, betas[0],
        betas[1], eps, weight_decay, decoupled, maximize,
    )  # fmt: skip
    _written(weights, exp_avg, exp_avg_sq)


@torch.no_grad()
def frozen_sgd(
    weights: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    bits: Tensor,
    ranks: Tensor,
    steps: Tensor,
    lr: Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """One SGD step (torch.optim's formulas) on the free lanes of `weights`, in place; rules: this file's
    head.

    At step 1 the buffer becomes the gradient, later buffer = momentum * buffer + (1 - dampening) * gradient;
    `momentum_buffers` is empty when momentum is 0.
    """
    torch.ops.dwm_fast.frozen_sgd(
        list(weights), list(grads), list(momentum_buffers), bits, ranks, steps, lr, momentum, dampening,
        weight_decay, nesterov, decoupled, maximize,
    )  # fmt: skip
    _written(weights, momentum_buffers)


@torch.no_grad()
def mask_adam(
    logits: TensorList,
    weights: TensorList,
    grads: TensorList,
    exp_avg: TensorList,
    exp_avg_sq: TensorList,
    rng_state: Tensor,
    tau: Tensor,
    penalty_scale: Tensor,
    steps: Tensor,
    lr: Tensor,
    *,
    mode: int,
    layers: Sequence[int],
    thresholds: Sequence[float],
    step_offset: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> None:
    """Chain rule, regulariser and Adam(W) on the logits of a network in one pass, in place.

    grads[i] is the gradient of masked weight i (any floating dtype and strides). The gradient of a logit is
    that of `sample_backward` (noise drawn again at step + step_offset) plus penalty_scale * (derivative of
    its own term of the penalty's sum): penalty_scale, a 0-dim fp32 tensor, is coefficient / (elements of the
    whole network).
    """
    step_masks(
        list(logits), list(weights), list(grads), list(exp_avg), list(exp_avg_sq),
        Draw(rng_state, tau, layers, thresholds, mode, step_offset), penalty_scale, steps, lr, betas, eps,
        weight_decay, decoupled,
    )  # fmt: skip


def step_masks(
    logits: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    draw: Draw,
    penalty_scale: Tensor,
    steps: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """`mask_adam` where gradients are off already: an optimiser's step, which pays for each detour."""
    call(
        "mask_adam", logits, weights, grads, exp_avg, exp_avg_sq, draw, penalty_scale, steps, lr, *betas, eps,
        weight_decay, decoupled,
    )  # fmt: skip
    _written(logits + exp_avg + exp_avg_sq)
