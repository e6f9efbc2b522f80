"""pattern_mask: N:M masks of a whole network (N weights kept of every M neighbours), drawn by Gumbel-softmax.

The reference below is the specification that every other backend is tested against. The learned tensor of a weight
(..., K) has the shape (..., K / M, P): one logit l for each of the P = C(M, N) patterns of each group of M neighbours
in the last dimension. Patterns are numbered in the order of itertools.combinations(range(M), N); S[p, e] is 1 where
pattern p keeps element e. tau holds two numbers, the temperature tau and the scale kappa of the logits:

    G_p = -log(-log(1 - u_p))              one uniform a pattern
    y   = softmax((kappa l + G) / tau)     hard: 1 for the pattern of the largest kappa l + G, in the forward pass alone
    m_e = sum over p of y_p S[p, e]        masked weight = m * W
    dl_p = kappa / tau * y_p (b_p - sum over q of y_q b_q),   b_p = sum over e of S[p, e] dL/dm_e,   dL/dm = G * W

Noise: a group takes ceil(P / 4) whole blocks of the noise contract, so pattern p of group g takes the word of element
4 ceil(P / 4) g + p. 1 - u is exact in the upper tail, where the contract counts from the end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.draw import Mode, check_layers
from dwm_fast.ops.philox import random_words, signed_uniform
from dwm_fast.ops.registration import define
from dwm_fast.ops.sample import check_noise

TensorList = Sequence[Tensor]
PATTERN_MODES = (Mode.GUMBEL_HARD, Mode.GUMBEL_SOFT, Mode.KEEP)
"""Rules of `pattern_mask`; KEEP is the deterministic mask: the pattern of the largest logit, the first of equals."""
MOST_PATTERNS = 70
"""Of 4:8: more would not fit in a thread's registers."""


def patterns(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """Kept places of every pattern, in the order of their numbers; InputError unless 1 <= n < m and P <= 70."""
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (n, m))
    if not (whole and 1 <= n < m and math.comb(m, n) <= MOST_PATTERNS):
        raise InputError(
            f"n={n!r} of m={m!r} is no known pattern; expected whole numbers 1 <= n < m with at most {MOST_PATTERNS} "
            "ways to choose, such as 2 of 4 or 4 of 8"
        )
    return tuple(itertools.combinations(range(m), n))


def pattern_shape(weight: Sequence[int], n: int, m: int) -> tuple[int, ...]:
    """Shape of the learned tensor for a weight's shape (..., K): (..., K / m, P)."""
    if not weight or weight[-1] % m:
        raise InputError(
            f"a weight of shape {tuple(weight)} has no whole groups of {m} in its last dimension; expected a multiple "
            f"of {m}: exclude it"
        )
    return (*weight[:-1], weight[-1] // m, len(patterns(n, m)))


def pattern_table(n: int, m: int, like: Tensor) -> Tensor:
    """S (P, m), in dtype and on the device of `like`; made once, so that a step waits for no copy from the host."""
    return _table(n, m, like.dtype, like.device)


@functools.cache
def _table(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    table = [[float(e in kept) for e in range(m)] for kept in patterns(n, m)]
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=dtype, device=device)


def pattern_keep(logits: Tensor, n: int, m: int) -> Tensor:
    """Deterministic keep mask (..., K), bool, of logits (..., K / m, P)."""
    best = _first_of_largest(logits)
    return (pattern_table(n, m, logits)[best] != 0).view(*logits.shape[:-2], logits.shape[-2] * m)


def _first_of_largest(scores: Tensor) -> Tensor:
    """Number of the largest score of the last dimension, the first of equals."""
    count = scores.shape[-1]
    numbers = torch.arange(count, device=scores.device)
    best = torch.where(scores == scores.amax(-1, keepdim=True), numbers, count - 1)
    return best.amin(-1)


def gumbel(u: Tensor) -> Tensor:
    """-log(-log(1 - u)) of a signed u (see `signed_uniform`): standard Gumbel noise, precise where it is large."""
    return -torch.where(u < 0, -(-u).log(), -torch.log1p(-u)).log()


def _noise(logits: Tensor, rng_state: Tensor, layer: int, step_offset: int) -> Tensor:
    """Gumbel noise of logits (groups, P)."""
    groups, count = logits.shape
    width = -(-count // 4) * 4
    words = random_words(groups * width, rng_state, layer, step_offset).view(groups, width)
    return gumbel(signed_uniform(words[:, :count]))


def _scores(logits: Tensor, rng_state: Tensor, tau: Tensor, layer: int, mode: int, step_offset: int) -> Tensor:
    """kappa l + G (groups, P); l alone under KEEP."""
    dense = logits.reshape(-1, logits.shape[-1])
    if mode == Mode.KEEP:
        return dense
    return dense * tau[1] + _noise(dense, rng_state, layer, step_offset)


def pattern_mask_reference(
    logits: TensorList, weights: TensorList, rng_state: Tensor, tau: Tensor, layers: Sequence[int], n: int, m: int,
    mode: int, step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    masked = []
    for scores, weight, layer in zip(logits, weights, layers, strict=True):
        drawn = _scores(scores, rng_state, tau, layer, mode, step_offset)
        table = pattern_table(n, m, scores)
        soft = mode == Mode.GUMBEL_SOFT
        value = torch.softmax(drawn / tau[0], -1) @ table if soft else table[_first_of_largest(drawn)]
        product = weight.to(scores.dtype) * value.view(weight.shape)
        product = product if soft else torch.where(value.view(weight.shape) != 0, product, 0.0)
        masked.append(torch.empty_like(weight, dtype=dtype or weight.dtype).copy_(product))
    return masked


def pattern_mask_backward_reference(
    grads: TensorList, logits: TensorList, weights: TensorList, rng_state: Tensor, tau: Tensor, layers: Sequence[int],
    n: int, m: int, mode: int, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    found = []
    for grad, scores, weight, layer in zip(grads, logits, weights, layers, strict=True):
        if mode == Mode.KEEP:
            found.append(torch.zeros_like(scores))
            continue
        y = torch.softmax(_scores(scores, rng_state, tau, layer, mode, step_offset) / tau[0], -1)
        over_mask = (grad.to(scores.dtype) * weight.to(scores.dtype)).reshape(-1, m)
        b = over_mask @ pattern_table(n, m, scores).t()
        change = y * (b - (y * b).sum(-1, keepdim=True)) * (tau[1] / tau[0])
        found.append(torch.empty_like(scores).copy_(change.view(scores.shape)))
    return found


def _fake(
    logits: TensorList, weights: TensorList, rng_state: Tensor, tau: Tensor, layers: Sequence[int], n: int, m: int,
    mode: int, step_offset: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(w, dtype=dtype or w.dtype) for w in weights]


def _backward_fake(
    grads: TensorList, logits: TensorList, weights: TensorList, rng_state: Tensor, tau: Tensor, layers: Sequence[int],
    n: int, m: int, mode: int, step_offset: int,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x) for x in logits]


_DRAW = "Tensor rng_state, Tensor tau, int[] layers, int n, int m, int mode, int step_offset"

define(
    f"pattern_mask(Tensor[] logits, Tensor[] weights, {_DRAW}, ScalarType? dtype) -> Tensor[]",
    reference=pattern_mask_reference,
    fake=_fake,
    device_at=2,
)
define(
    f"pattern_mask_backward(Tensor[] grads, Tensor[] logits, Tensor[] weights, {_DRAW}) -> Tensor[]",
    reference=pattern_mask_backward_reference,
    fake=_backward_fake,
    device_at=3,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, weights, rng_state, tau, layers, n, m, mode, step_offset, _ = inputs
    ctx.save_for_backward(rng_state, tau, *logits, *weights)
    ctx.arguments = (list(layers), n, m, mode, step_offset)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    rng_state, tau, *tensors = ctx.saved_tensors
    count = len(tensors) // 2
    logits, weights = tensors[:count], tensors[count:]
    filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    found = torch.ops.dwm_fast.pattern_mask_backward(filled, logits, weights, rng_state, tau, *ctx.arguments)
    return (found, [None] * count, *([None] * 8))


torch.library.register_autograd("dwm_fast::pattern_mask", _backward, setup_context=_setup_context)


def _check(logits: TensorList, weights: TensorList, rng_state: Tensor, tau: Tensor, layers: Sequence[int]) -> None:
    check_noise(rng_state, tau, scaled=True)
    check_layers(layers)
    if not len(logits) == len(weights) == len(layers):
        raise InputError(
            f"pattern_mask got {len(logits)} logits, {len(weights)} weights and {len(layers)} layers; expected one of "
            "each per layer"
        )


def pattern_mask(
    logits: TensorList,
    weights: TensorList,
    rng_state: Tensor,
    tau: Tensor,
    *,
    n: int = 2,
    m: int = 4,
    mode: int = Mode.GUMBEL_SOFT,
    layers: Sequence[int] | None = None,
    step_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Masked weights of all layers of a network, n of every m neighbours kept; differentiable in `logits` alone.

    Args:
        logits: fp32, logits[i] of shape (..., K / m, P) for a weight (..., K), P the number of patterns.
        weights: any floating dtype and strides. They are frozen: no gradient.
        rng_state: int64 (2,): seed and step of the noise.
        tau: fp32 (2,): temperature, above 0, and scale kappa of the logits.
        n, m: n of every m neighbours in the last dimension are kept.
        mode: GUMBEL_SOFT, GUMBEL_HARD (a drawn pattern, with the soft one's gradient) or KEEP (the largest logit's).
        layers: the noise contract's layer index of each tensor; 0, 1, 2, ... by default.
        step_offset: added to the step (sample j of a split batch).
        dtype: dtype of the masked weights; the weights' own by default.

    Returns:
        Masked weights, each with its weight's strides.

    Raises:
        InputError: lists of different lengths, logits of another shape, an unknown mode or pattern, a tau of another
            form.

    Example:
        >>> import torch
        >>> from dwm_fast import ops
        >>> logits = torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0, 0.0]])  # pattern 2 keeps elements 0 and 3
        >>> state, tau = torch.tensor([7, 0]), torch.tensor([1.0, 1.0])
        >>> ops.pattern_mask([logits], [torch.tensor([1.0, 2.0, 3.0, 4.0])], state, tau, mode=ops.Mode.KEEP)[0]
        tensor([1., 0., 0., 4.])
    """
    layers = range(len(weights)) if layers is None else layers
    _check(logits, weights, rng_state, tau, layers)
    if mode not in PATTERN_MODES:
        raise InputError(f"pattern_mask got mode={mode!r}; expected GUMBEL_SOFT, GUMBEL_HARD or KEEP")
    for i, (scores, weight) in enumerate(zip(logits, weights, strict=True)):
        expected = pattern_shape(weight.shape, n, m)
        if tuple(scores.shape) != expected:
            raise InputError(
                f"pattern_mask: logits[{i}] has shape {tuple(scores.shape)} for a weight of shape "
                f"{tuple(weight.shape)}; expected {expected}"
            )
    masked: list[Tensor] = torch.ops.dwm_fast.pattern_mask(
        list(logits), list(weights), rng_state, tau, list(layers), n, m, int(mode), step_offset, dtype
    )
    return masked
