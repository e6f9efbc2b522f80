"""coded_adam: Adam(W) on logits whose values, or moments, or both are stored in fewer bits; in place.

Decode, step in fp32, encode. Formats and rounding: `dwm_fast.ops.coding`. Rounding draws the noise contract's words at
(seed, step count of the tensor, layer), from one stream for logits and one for both moments; masks are of a third.

Rules, which every backend keeps to the last bit:

- All tensors are contiguous: blocks of 128 are neighbours in logical order. Gradients are fp32. Those of one role
  share a dtype; the moments are both fp32, both bf16, or int8 and uint8.
- Scalars of a step are formed in fp64 and rounded to fp32 once. A lane, in fp32 and in this order:
  decay:  w = w (1 - lr decay), or g = g + decay w
  m = m + (1 - b1) (g - m), but g - (g - m) (1 - (1 - b1)) where 1 - b1 >= 1/2;  v = v b2 + ((1 - b2) g) g
  w = w + (-lr / (1 - b1^t) m) / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.coding import (
    LOGITS,
    MOMENTS,
    decoded,
    decoded_moment,
    encoded,
    encoded_moment,
    scales_of,
    square_root,
)
from dwm_fast.ops.draw import LOGIT_ROUNDING, MOMENT_ROUNDING, check_layers
from dwm_fast.ops.philox import random_words
from dwm_fast.ops.registration import call, define

TensorList = Sequence[Tensor]


def _stepped(
    values: tuple[Tensor, Tensor, Tensor, Tensor], step: Tensor, lr: Tensor, betas: tuple[float, float], eps: float,
    weight_decay: float, decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weight and moments after a step; `values` are weight, gradient and moments before it."""
    w, g, m, v = values
    t = step.double()
    rates = torch.tensor([1.0 - beta for beta in betas], dtype=torch.float64, device=w.device).float()
    step_size, root = (-lr / (1.0 - betas[0] ** t)).float(), (1.0 - betas[1] ** t).sqrt().float()
    if weight_decay != 0 and decoupled:
        w = w * (1.0 - lr * weight_decay).float()
    elif weight_decay != 0:
        g = g + weight_decay * w
    m = m + rates[0] * (g - m) if 1.0 - betas[0] < 0.5 else g - (g - m) * (1.0 - rates[0])
    v = v * betas[1] + (rates[1] * g) * g
    return w + (step_size * m) / (square_root(v) / root + eps), m, v


def coded_adam_reference(
    logits: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList, exp_avg_scale: TensorList,
    exp_avg_sq_scale: TensorList, rng_state: Tensor, layers: Sequence[int], steps: Tensor, lr: Tensor, beta1: float,
    beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    for i, codes in enumerate(logits):
        state = [(exp_avg, exp_avg_scale), (exp_avg_sq, exp_avg_sq_scale)]
        stored = [(moment[i], scale[i] if scale else None) for moment, scale in state]
        before = decoded(codes), grads[i], *(decoded_moment(*pair) for pair in stored)
        w, *moments = _stepped(before, steps[i], lr, (beta1, beta2), eps, weight_decay, decoupled)  # type: ignore[arg-type]
        at = torch.stack([rng_state[0], steps[i].to(torch.int64)])
        of_logits, of_moments = (
            random_words(w.numel(), at, layers[i], stream=stream).view(w.shape)
            for stream in (LOGIT_ROUNDING, MOMENT_ROUNDING)
        )
        codes.copy_(encoded(w, codes.dtype, of_logits))
        for (old, old_scale), value, half in zip(stored, moments, (of_moments, of_moments >> 16), strict=True):
            new, scale = encoded_moment(value, old.dtype, half)
            old.copy_(new)
            if old_scale is not None and scale is not None:
                old_scale.copy_(scale)


define(
    "coded_adam(Tensor(a!)[] logits, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] exp_avg_scale, Tensor(e!)[] exp_avg_sq_scale, Tensor rng_state, int[] layers, Tensor steps, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()",
    reference=coded_adam_reference,
    fake=lambda *args: None,
    device_at=6,
)


def _check(logits: TensorList, grads: TensorList, moments: Sequence[TensorList], scales: Sequence[TensorList]) -> None:
    if len({len(role) for role in (logits, grads, *moments)}) > 1:
        raise InputError("coded_adam got lists of different lengths; expected gradient and moments of each logits")
    formats = {tuple(role[i].dtype for role in (logits, grads, *moments)) for i in range(len(logits))}
    for dtype, grad, *pair in formats:
        if (
            len(formats) > 1
            or dtype not in LOGITS.values()
            or grad != torch.float32
            or tuple(pair) not in MOMENTS.values()
        ):
            raise InputError(
                f"coded_adam got logits of {dtype}, gradients of {grad}, moments of {pair[0]} and {pair[1]}; expected "
                "logits of float32, bfloat16 or int16, gradients of float32, and moments both float32, both bfloat16, "
                "or int8 and uint8, the same for all tensors of a call"
            )
    coded = bool(moments[0]) and moments[0][0].dtype == torch.int8
    for i, x in enumerate(logits):
        if any(
            len(s) != (len(logits) if coded else 0) or (coded and s[i].numel() != scales_of(x.numel())) for s in scales
        ):
            raise InputError(
                f"coded_adam got wrong scales; expected {scales_of(x.numel())} of each moment for logits {i} where "
                "moments are in 8 bits, and empty lists otherwise"
            )
        stored = [x, grads[i], *(m[i] for m in moments), *(s[i] for s in scales if s)]
        if not all(t.is_contiguous() for t in stored) or any(t.shape != x.shape for t in stored[:4]):
            raise InputError(f"coded_adam: logits {i} and what goes with them differ in shape or are not contiguous")


@torch.no_grad()
def coded_adam(
    logits: TensorList, grads: TensorList, exp_avg: TensorList, exp_avg_sq: TensorList, exp_avg_scale: TensorList,
    exp_avg_sq_scale: TensorList, rng_state: Tensor, steps: Tensor, lr: Tensor, *, layers: Sequence[int],
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15, weight_decay: float = 0.0, decoupled: bool = True,
) -> None:  # fmt: skip
    """One Adam(W) step on logits and moments in few bits (rules: this file's head), in place.

    Args:
        logits: fp32, bf16, or int16 for fixed point. grads: their gradients, fp32.
        exp_avg, exp_avg_sq: fp32, bf16, or int8 and uint8, of the logits' shapes.
        exp_avg_scale, exp_avg_sq_scale: of 8-bit moments, fp32, ceil(elements / 128) each; else empty lists.
        rng_state: int64 (2,), whose seed rounding draws by. layers: the noise contract's layer of each tensor.
        steps: fp32, one a tensor, counted from 1. lr: 0-dim fp64.

    Raises:
        InputError: formats that do not go together, tensors that are not contiguous, missing scales.
    """
    _check(logits, grads, (exp_avg, exp_avg_sq), (exp_avg_scale, exp_avg_sq_scale))
    check_layers(layers)
    written = [list(role) for role in (logits, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale)]
    first, *others = written
    args: tuple[Any, ...] = (rng_state, list(layers), steps, lr, *betas, eps, weight_decay, decoupled)
    call("coded_adam", first, list(grads), *others, *args)
    for tensors in written:
        torch.autograd.graph.increment_version(tensors)
