"""sample: the masks of a whole network drawn, applied and packed by one operation, and its backward.

`masked_weights` is what layers call; `sample` and `sample_backward` are the registered operations behind it.
The reference below is the specification that every other backend is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.bits import pack_reference
from dwm_fast.ops.coding import decoded, value_dtype
from dwm_fast.ops.draw import GUMBEL_MODES, SCALED_SOFT, Draw, Mode
from dwm_fast.ops.packing import packed_nbytes
from dwm_fast.ops.philox import random_words, signed_uniform
from dwm_fast.ops.registration import define

TensorList = Sequence[Tensor]
_KNOWN = (SCALED_SOFT, *map(int, Mode))
_PLAIN = (torch.float32, torch.float64)


def _noise(logits: Tensor, draw: Draw, i: int) -> Tensor:
    """Signed u, fp32, of the logits' shape; element index is the logical contiguous order."""
    words = random_words(logits.numel(), draw.rng_state, draw.layers[i], draw.step_offset)
    return signed_uniform(words).view(logits.shape)


def noisy(logits: Tensor, u: Tensor) -> Tensor:
    """l + log u - log(1 - u) of a signed u; in the upper tail |u| is 1 - u, and signs turn before and after."""
    side, near = u.sign(), u.abs()
    return side * (side * logits + near.log() - (1.0 - near).log())


def _soft_argument(logits: Tensor, u: Tensor, tau: Tensor) -> Tensor:
    """(l + log u - log(1 - u)) / tau, whose sigmoid is the Gumbel-sigmoid."""
    return noisy(logits, u) / tau


def _sigmoid_slope(x: Tensor) -> Tensor:
    """sigmoid'(x), with full relative accuracy at both ends."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def hard(logits: Tensor, u: Tensor) -> Tensor:
    """soft > 1/2 for a signed u, decided without logarithms: u > sigmoid(-l); in the upper tail 1 - u < e^l.

    There e^l stands for sigmoid(l) = e^l / (1 + e^l): it is below 2^-16 wherever it matters, so they differ by less
    than one step of 2^-32.
    """
    odds = torch.exp(logits)
    return u > torch.where(u < 0, -odds, 1.0 / (1.0 + odds))


def mask_value(logits: Tensor, draw: Draw, i: int) -> tuple[Tensor, Tensor]:
    """Mask value m (fp32; for EDIT: ones) and keep bits (bool) of tensor i, each of the logits' shape.

    Computed in contiguous order: vectorised exponentials round an element by its place in memory.
    """
    logits, threshold, mode = logits.contiguous(), draw.thresholds[i], draw.mode
    if mode == SCALED_SOFT:
        u, scaled = _noise(logits, draw, i), logits * draw.tau[1]
        return torch.sigmoid(_soft_argument(scaled, u, draw.tau[0])), hard(scaled, u)
    if mode in GUMBEL_MODES:
        u = _noise(logits, draw, i)
        keep = hard(logits, u)
        return (keep.float() if mode == Mode.GUMBEL_HARD else torch.sigmoid(_soft_argument(logits, u, draw.tau))), keep
    if mode == Mode.KEEP:
        keep = logits >= 0
    elif mode == Mode.THRESHOLD:
        keep = logits > threshold
    elif mode == Mode.TERNARY:
        value = (logits > threshold).float() - (logits < 0).float()
        return value, value != 0
    else:
        return torch.ones_like(logits), logits.abs() <= 1
    return keep.float(), keep


def _no_penalty(logits: TensorList, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=value_dtype(logits[0].dtype) if logits else torch.float32, device=device)


def penalty(logits: TensorList, mode: int, device: torch.device | None = None, tau: Tensor | None = None) -> Tensor:
    """The regulariser that `sample` returns, alone and without a draw; differentiable in the logits.

    Args:
        logits: learned tensors of every layer of the network.
        mode: a `Mode`: mean sigmoid(l) for the Gumbel rules, mean exp(-abs(e)) for EDIT, 0 for the others. SCALED_SOFT,
            whose own is the mean of a drawn mask: mean sigmoid(kappa l), that of its hard values.
        device: device of the result where `logits` is empty.
        tau: of SCALED_SOFT.

    Returns:
        0-dim tensor in [0, 1]: a mean over every element, so a coefficient means the same for any size.
    """
    device = logits[0].device if logits else device or torch.device("cpu")
    logits = [x if x.dtype in _PLAIN else decoded(x) for x in logits]
    total = sum(x.numel() for x in logits)
    if mode == SCALED_SOFT:
        if tau is None:
            raise InputError(
                "the penalty of a scaled soft mask is that of a draw; add coefficient * masked.sparsity_penalty() to "
                "the loss"
            )
        parts = [torch.sigmoid(tau[1] * x.contiguous()).sum() for x in logits]
    elif mode in GUMBEL_MODES:
        parts = [torch.sigmoid(x.contiguous()).sum() for x in logits]
    elif mode == Mode.EDIT:
        parts = [torch.exp(-x.contiguous().abs()).sum() for x in logits]
    else:
        parts = []
    if not parts or total == 0:
        return _no_penalty(logits, device)
    return torch.stack(parts).sum() / total


def sample_reference(
    logits: TensorList, weights: TensorList, draw: Draw, dtype: torch.dtype | None, pack: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    masked, keeps, sums = [], [], []
    logits = [x if x.dtype in _PLAIN else decoded(x) for x in logits]
    for i, (scores, weight) in enumerate(zip(logits, weights, strict=True)):
        value, keep = mask_value(scores, draw, i)
        if draw.mode == Mode.EDIT:
            product = weight.to(scores.dtype) + draw.thresholds[i] * scores
        elif draw.mode in (SCALED_SOFT, Mode.GUMBEL_SOFT, Mode.TERNARY):
            product = weight.to(scores.dtype) * value
        else:
            product = torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        masked.append(torch.empty_like(weight, dtype=dtype or weight.dtype).copy_(product))
        keeps.append(keep)
        if draw.mode == SCALED_SOFT:
            sums.append(value.sum())
    bits = pack_reference(keeps) if pack and keeps else draw.rng_state.new_empty(0, dtype=torch.uint8)
    total = sum(x.numel() for x in logits)
    if sums and total:
        return masked, bits, torch.stack(sums).sum() / total
    return masked, bits, penalty(logits, draw.mode, draw.rng_state.device, draw.tau)


def _logits_gradient(grad: Tensor, logits: Tensor, weight: Tensor, draw: Draw, i: int, rise: Tensor) -> Tensor:
    """d loss / d logits of tensor i without the regulariser, fp32; of SCALED_SOFT with it, `rise` being its d / d m."""
    if draw.mode == SCALED_SOFT:
        argument = _soft_argument(logits * draw.tau[1], _noise(logits, draw, i), draw.tau[0])
        over_mask = grad * weight.to(logits.dtype) + rise
        return over_mask * (_sigmoid_slope(argument) * (draw.tau[1] / draw.tau[0]))
    if draw.mode in GUMBEL_MODES:
        argument = _soft_argument(logits, _noise(logits, draw, i), draw.tau)
        return grad * weight.to(logits.dtype) * (_sigmoid_slope(argument) / draw.tau)
    if draw.mode in (Mode.THRESHOLD, Mode.TERNARY):
        return grad * weight.to(logits.dtype)
    if draw.mode == Mode.EDIT:
        return grad * draw.thresholds[i]
    return torch.zeros_like(logits)


def _penalty_gradient(logits: Tensor, mode: int, total: int) -> Tensor | float:
    if mode in GUMBEL_MODES:
        return _sigmoid_slope(logits) / total
    if mode == Mode.EDIT:
        return -torch.sign(logits) * torch.exp(-logits.abs()) / total
    return 0.0


def sample_backward_reference(
    grads: TensorList, grad_penalty: Tensor, logits: TensorList, weights: TensorList, draw: Draw, need_logits: bool,
    need_weights: bool, total: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """With `total` the penalty is a sum over so many elements, of which `logits` are a part."""
    total = total or max(1, sum(x.numel() for x in logits))
    logits = [x if x.dtype in _PLAIN else decoded(x) for x in logits]
    dlogits, dweights = [], []
    for i, (grad, scores, weight) in enumerate(zip(grads, logits, weights, strict=True)):
        g = grad.to(scores.dtype)
        if need_logits:
            dense = scores.contiguous()
            d = _logits_gradient(g, dense, weight, draw, i, grad_penalty / total)
            d = d + grad_penalty * _penalty_gradient(dense, draw.mode, total)
            dlogits.append(torch.empty_like(scores).copy_(d))
        if need_weights:
            value, keep = mask_value(scores, draw, i)
            chosen = draw.mode in (Mode.GUMBEL_HARD, Mode.KEEP, Mode.THRESHOLD)  # 0 where dropped, were g infinite
            dweights.append(torch.empty_like(weight).copy_(torch.where(keep, g, 0.0) if chosen else g * value))
    return dlogits, dweights


def _sample_fake(
    logits: TensorList, weights: TensorList, draw: Draw, dtype: torch.dtype | None, pack: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    masked = [torch.empty_like(w, dtype=dtype or w.dtype) for w in weights]
    nbytes = sum(packed_nbytes(w.numel()) for w in weights) if pack else 0
    state = draw.rng_state
    return masked, state.new_empty(nbytes, dtype=torch.uint8), _no_penalty(logits, state.device)


def _sample_backward_fake(
    grads: TensorList, grad_penalty: Tensor, logits: TensorList, weights: TensorList, draw: Draw, need_logits: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    return (
        [torch.empty_like(x, dtype=value_dtype(x.dtype)) for x in logits] if need_logits else [],
        [torch.empty_like(w) for w in weights] if need_weights else [],
    )


define(
    f"sample(Tensor[] logits, Tensor[] weights, {Draw.SCHEMA}, ScalarType? dtype, bool pack) "
    "-> (Tensor[] masked, Tensor bits, Tensor penalty)",
    reference=sample_reference,
    fake=_sample_fake,
    device_at=2,
)
define(
    f"sample_backward(Tensor[] grads, Tensor grad_penalty, Tensor[] logits, Tensor[] weights, {Draw.SCHEMA}, "
    "bool need_logits, bool need_weights) -> (Tensor[] dlogits, Tensor[] dweights)",
    reference=sample_backward_reference,
    fake=_sample_backward_fake,
    device_at=4,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, weights, rng_state, tau, *ctx.rule, _, _ = inputs
    ctx.save_for_backward(rng_state, tau, *logits, *weights)
    ctx.needed = any(x.requires_grad for x in logits), any(w.requires_grad for w in weights)


def _backward(ctx: Any, grads: list[Tensor | None], grad_bits: Any, grad_penalty: Tensor | None) -> tuple[Any, ...]:
    rng_state, tau, *tensors = ctx.saved_tensors
    count = len(tensors) // 2
    logits, weights = tensors[:count], tensors[count:]
    filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    if grad_penalty is None:
        grad_penalty = torch.zeros((), device=rng_state.device)
    found = torch.ops.dwm_fast.sample_backward(
        filled, grad_penalty, logits, weights, rng_state, tau, *ctx.rule, *ctx.needed
    )
    return (*(g if needed else [None] * count for g, needed in zip(found, ctx.needed, strict=True)), *([None] * 8))


torch.library.register_autograd("dwm_fast::sample", _backward, setup_context=_setup_context)


def check_noise(rng_state: Tensor, tau: Tensor, scaled: bool = False) -> None:
    """InputError unless `rng_state` is int64 (2,) and `tau` one floating number, or two where `scaled`."""
    if rng_state.dtype != torch.int64 or tuple(rng_state.shape) != (2,):
        raise InputError(
            f"rng_state is {rng_state.dtype} of shape {tuple(rng_state.shape)}; expected int64 of shape "
            "(2,): torch.tensor([seed, step])"
        )
    if scaled:
        if tuple(tau.shape) != (2,) or not tau.is_floating_point():
            raise InputError(
                f"tau is {tau.dtype} of shape {tuple(tau.shape)}; expected temperature and scale, fp32 of shape (2,): "
                "torch.tensor([tau, kappa])"
            )
        return
    if tau.dim() != 0 or not tau.is_floating_point():
        raise InputError(
            f"tau is {tau.dtype} of shape {tuple(tau.shape)}; expected a 0-dim fp32 tensor: torch.tensor(1.0)"
        )


def _check_sample(
    logits: TensorList, weights: TensorList, rng_state: Tensor, tau: Tensor, layers: list[int],
    thresholds: list[float], mode: int,
) -> None:  # fmt: skip
    check_noise(rng_state, tau, mode == SCALED_SOFT)
    given = (len(logits), len(weights), len(layers), len(thresholds))
    if len(set(given)) > 1:
        raise InputError(
            f"sample got {given[0]} logits, {given[1]} weights, {given[2]} layers and {given[3]} thresholds; "
            "expected one of each per layer"
        )
    for i, (scores, weight) in enumerate(zip(logits, weights, strict=True)):
        if scores.shape != weight.shape:
            raise InputError(
                f"sample: logits[{i}] has shape {tuple(scores.shape)} and weights[{i}] "
                f"{tuple(weight.shape)}; expected equal shapes"
            )


def sample(
    logits: TensorList,
    weights: TensorList,
    rng_state: Tensor,
    tau: Tensor,
    *,
    mode: int = Mode.GUMBEL_HARD,
    layers: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    step_offset: int = 0,
    dtype: torch.dtype | None = None,
    pack: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Draw and apply the masks of all layers of a network at once; differentiable in logits and weights.

    Args:
        logits: learned tensors, fp32, logits[i] of the shape of weights[i] with any strides; without gradients also
            bf16, or int16 for fixed point (`dwm_fast.ops.coding`), all of one dtype.
        weights: weights, any floating dtype and strides.
        rng_state: int64 (2,): seed and step. The backward draws the same noise from it again, so it must not
            be changed in place before: pass what `advance` returned.
        tau: 0-dim fp32 tensor, temperature > 0 (read by the Gumbel modes); of SCALED_SOFT fp32 (2,): tau and kappa.
        mode: a `Mode`, or `SCALED_SOFT`.
        layers: the noise contract's layer index of each tensor; 0, 1, 2, ... by default.
        thresholds: one number per layer (THRESHOLD, TERNARY: the threshold; EDIT: the unit of the edit).
        step_offset: added to the step (sample j of a split batch).
        dtype: dtype of the masked weights; the weights' own by default.
        pack: whether keep bits are wanted.

    Returns:
        masked weights (each with its weight's strides), keep bits (uint8 network buffer, empty
        unless `pack`), and the penalty: mean expected keep value over the network, 0-dim, differentiable.

    Raises:
        InputError: lists of different lengths, a logit tensor of another shape than its weight, or a noise
            state or temperature of another form.

    Example:
        >>> import torch
        >>> from dwm_fast import ops
        >>> state, tau = torch.tensor([7, 0]), torch.tensor(1.0)
        >>> logits, weight = torch.tensor([3.0, -3.0, 0.0]), torch.tensor([1.0, 2.0, 4.0])
        >>> masked, bits, penalty = ops.sample([logits], [weight], state, tau, mode=ops.Mode.KEEP, pack=True)
        >>> masked[0].tolist(), int(bits[0])
        ([1.0, 0.0, 4.0], 5)
    """
    layers = range(len(weights)) if layers is None else layers
    thresholds = [0.0] * len(weights) if thresholds is None else thresholds
    mode = int(mode) if mode in _KNOWN else int(Mode(mode))  # torch 2.11 does not compile the call of an enum
    flat = (rng_state, tau, list(layers), list(thresholds), mode, step_offset)
    _check_sample(logits, weights, *flat[:5])
    result: tuple[list[Tensor], Tensor, Tensor] = torch.ops.dwm_fast.sample(
        list(logits), list(weights), *flat, dtype, pack
    )
    return result
